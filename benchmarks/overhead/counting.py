"""What one step does, counted and not timed: tensor operations, reads that make the host wait, and the peak of its memory."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

MIB = 1 << 20
#: Operators that make the host wait for a device, or whose result has a size that only the device knows.
SYNCS = frozenset(
    (
        "_local_scalar_dense",
        "nonzero",
        "is_nonzero",
        "masked_select",
        "_unique2",
        "unique_dim",
        "unique_consecutive",
        "equal",
        "bincount",
    )
)
# Functions that bring values to the host and dispatch none of these operators where the tensor lies there already.
_READS = {"tolist", "numpy", "cpu", "__array__"}
_BY_INDEX = {"index", "index_put", "index_put_", "_index_put_impl_"}


@dataclass(frozen=True)
class Counts:
    """One step: operators that launch work, views and aliases, and reads that would make the host wait for a device."""

    kernels: int
    views: int
    syncs: int


def count(step: Callable[[], Any]) -> Counts:
    """Count what one step dispatches. On a GPU the synchronisations are those of that step that torch itself reports."""
    operators, reads = _Operators(), _Reads()
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        if torch.cuda.is_available():
            torch.cuda.set_sync_debug_mode("warn")
        try:
            with operators, reads:
                step()
        finally:
            if torch.cuda.is_available():
                torch.cuda.set_sync_debug_mode("default")
    waits = sum("synchronizing CUDA operation" in str(warning.message) for warning in told)
    return Counts(operators.kernels, operators.views, waits if torch.cuda.is_available() else operators.syncs + reads.reads)


def peak_mib(step: Callable[[], Any]) -> float:
    """Return by how many MiB torch's allocator stood above its level at the beginning of a step, at most."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - before) / MIB
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        step()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak / MIB


class _Operators(TorchDispatchMode):
    kernels = views = syncs = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        aliases = _aliases(func)
        self.views += aliases
        self.kernels += not aliases
        self.syncs += name in SYNCS or (name in _BY_INDEX and _by_mask(args[1]))
        return func(*args, **(kwargs or {}))


class _Reads(TorchFunctionMode):
    reads = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        self.reads += name in _READS or (name == "to" and _to_host((*args[1:], *(kwargs or {}).values())))
        return func(*args, **(kwargs or {}))


def _aliases(func: Any) -> bool:
    """Tell whether an operator's results are nothing but views of its arguments."""
    returns = func._schema.returns
    return bool(returns) and all(r.alias_info is not None and not r.alias_info.is_write for r in returns)


def _to_host(arguments: tuple[Any, ...]) -> bool:
    return any(isinstance(value, (str, torch.device)) and str(value) == "cpu" for value in arguments)


def _by_mask(indices: Any) -> bool:
    return any(isinstance(index, Tensor) and index.dtype in (torch.bool, torch.uint8) for index in indices)
