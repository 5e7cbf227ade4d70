"""What a call costs: the peak of extra memory and the number of tensor operations, both counted, not timed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

MIB = 1 << 20


def peak_mib(call: Callable[[], Any]) -> float:
    """Return by how many MiB the CPU allocator stood above its start at most while ``call`` ran, results included."""
    call()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        call()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    assert events, "the profiler saw no allocation"
    now = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak / MIB


def operations(call: Callable[[], Any]) -> int:
    """Return how many tensor operations ``call`` dispatched."""
    with _Counter() as counter:
        call()
    return counter.count


def kernels(call: Callable[[], Any]) -> int:
    """Return how many of them launch work: those whose result is no view of an argument, and that do more than name a tensor anew."""
    with _Counter() as counter:
        call()
    return counter.kernels


class _Counter(TorchDispatchMode):
    count = 0
    kernels = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        self.kernels += launches(func)
        return func(*args, **(kwargs or {}))


def launches(func: Any) -> bool:
    """Tell whether an operator launches work: its results are more than views of its arguments, or memory that nothing was written to."""
    returns = func._schema.returns
    if "empty" in func._schema.name:
        return False
    return not returns or not all(r.alias_info is not None and not r.alias_info.is_write for r in returns)
