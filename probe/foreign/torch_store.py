"""The process group's key-value store, which torch keeps private.

Checked on torch 2.13.0: ``torch.distributed.distributed_c10d._get_default_store`` (there since 1.8).
"""

from __future__ import annotations

import torch.distributed as dist
from torch.distributed import distributed_c10d


def default_store() -> dist.Store:
    """Return the store of the default process group.

    Raises:
        ValueError: if no process group was initialised.
    """
    store: dist.Store = distributed_c10d._get_default_store()
    return store
