"""The process group's key-value store, which torch keeps private.

Checked on torch 2.13.0: ``torch.distributed.distributed_c10d._get_default_store`` (there since 1.8); ``Store.check`` (there since 2.3).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch.distributed as dist

if dist.is_available():  # not in every build of torch
    from torch.distributed import distributed_c10d

if TYPE_CHECKING:
    from torch._C._distributed_c10d import Store as Store


def default_store() -> Store:
    """Return the store of the default process group.

    Raises:
        ValueError: if no process group was initialised.
    """
    store: Store = distributed_c10d._get_default_store()
    return store
