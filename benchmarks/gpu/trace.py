"""What a trace of the profiler says of a step: pure functions over the list of its events, in Chrome's trace format.

Source: the format is Google's "Trace Event Format" (complete events: ``ph`` "X", ``ts`` and ``dur`` in microseconds); names and categories
are those of Kineto: ``kernel``, ``gpu_memcpy`` and ``gpu_memset`` on the device, ``cuda_runtime`` and ``cuda_driver`` on the host, joined
by ``args.correlation``; ``user_annotation`` is ``torch.profiler.record_function``.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

Event = Mapping[str, Any]
_ON_DEVICE = ("kernel", "gpu_memcpy", "gpu_memset")
_ON_HOST = ("cuda_runtime", "cuda_driver")
_WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize", "cuStreamSynchronize", "cuCtxSynchronize")


@dataclass(frozen=True)
class Span:
    """A stretch of the host's time, in microseconds."""

    name: str
    begin: float
    end: float

    def holds(self, event: Event) -> bool:
        """Tell whether an event of the host began inside."""
        return self.begin <= float(event["ts"]) < self.end


@dataclass(frozen=True)
class Copy:
    """One copy from the device to the host: bytes, and whether the host's memory is page-locked."""

    nbytes: int
    pinned: bool


def spans(events: Sequence[Event], prefix: str) -> list[Span]:
    """Return the annotations whose names begin with ``prefix``, in order of time, named by what follows it."""
    found = [
        Span(str(e["name"]).removeprefix(prefix), float(e["ts"]), float(e["ts"]) + float(e["dur"]))
        for e in events
        if e.get("ph") == "X" and e.get("cat") == "user_annotation" and str(e.get("name", "")).startswith(prefix)
    ]
    return sorted(found, key=lambda span: span.begin)


def launched(events: Sequence[Event], span: Span) -> list[Event]:
    """Return what ran on the device because the host asked for it within the span, in order of the device's time."""
    asked = {_correlation(e) for e in events if e.get("cat") in _ON_HOST and span.holds(e)} - {None}
    found = [e for e in events if e.get("cat") in _ON_DEVICE and _correlation(e) in asked]
    return sorted(found, key=lambda e: float(e["ts"]))


def waits(events: Sequence[Event], span: Span) -> Counter[str]:
    """Count the calls within the span by which the host waits for the device, by name."""
    return Counter(str(e["name"]) for e in events if e.get("cat") in _ON_HOST and e["name"] in _WAITS and span.holds(e))


def copies_to_host(events: Sequence[Event], span: Span) -> list[Copy]:
    """Return the copies from the device to the host that were asked for within the span."""
    return [
        Copy(int(e.get("args", {}).get("bytes", 0)), "Pinned" in str(e["name"]))
        for e in launched(events, span)
        if e["cat"] == "gpu_memcpy" and "DtoH" in str(e["name"])
    ]


def kernels(events: Sequence[Event], span: Span) -> int:
    """Count the kernels launched within the span."""
    return sum(e["cat"] == "kernel" for e in launched(events, span))


def longest_gap_us(events: Sequence[Event], inside: Sequence[Span]) -> float:
    """Return the longest time that the busiest stream stood idle before something that was launched within one of the spans.

    0 where nothing was. Such a gap is time in which the device waited for the host to be done with the probe's work.
    """
    device = sorted((e for e in events if e.get("cat") in _ON_DEVICE), key=lambda e: float(e["ts"]))
    mine = {id(e) for span in inside for e in launched(events, span)}
    longest = 0.0
    busiest = _busiest(device)
    for before, after in pairwise([e for e in device if _stream(e) == busiest]):
        if id(after) in mine:
            longest = max(longest, float(after["ts"]) - float(before["ts"]) - float(before["dur"]))
    return longest


def _busiest(device: Sequence[Event]) -> Any:
    busy: dict[Any, float] = {}
    for event in device:
        busy[_stream(event)] = busy.get(_stream(event), 0.0) + float(event["dur"])
    return max(busy, key=busy.__getitem__, default=None)


def _stream(event: Event) -> Any:
    return event.get("args", {}).get("stream", event.get("tid"))


def _correlation(event: Event) -> Any:
    return event.get("args", {}).get("correlation")
