"""A dispatch mode for tests: fails on operators that would wait for the device or draw random numbers."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

FORBIDDEN = frozenset(
    {"_local_scalar_dense", "nonzero", "masked_select", "item", "is_nonzero", "equal", "unique", "random", "rand", "randn", "bernoulli"}
)


class NoWaiting(TorchDispatchMode):
    """Inside it, no operator may need the host to know a value of a tensor; ``operators`` counts those that ran."""

    def __init__(self) -> None:
        super().__init__()
        self.operators = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        assert name.strip("_") not in {word.strip("_") for word in FORBIDDEN}, f"{name} waits for the device or draws random numbers"
        if name.startswith("index") and len(args) > 1 and isinstance(args[1], (list, tuple)):
            masks = [part for part in args[1] if part is not None and part.dtype in (torch.bool, torch.uint8)]
            assert not masks, "indexing by a mask waits for the device"
        self.operators += 1
        return func(*args, **(kwargs or {}))
