"""The meter: adds up the time that the probe itself takes, part by part, without waiting for the device."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import torch

WAITING = ""
"""The part of what is not counted: time in which the host only waits for numbers that are under way."""


@dataclass(frozen=True, slots=True)
class Spent:
    """What a meter added up: seconds by part, and the seconds of wall time in which they were spent."""

    parts: dict[str, float]
    wall: float


class Meter:
    """Time by part, in sections: ``with meter.section("heads"): …``. Each moment counts once, for the innermost section it lies in.

    What is counted. Of most sections the host's time (``time.perf_counter``): the hooks' own work, their registration and removal,
    packing, and publication (records, findings, files, terminal). On a CPU that is all there is, because operations run while the host
    waits for them. Sections opened with ``launches=True`` put work on a device's stream: on CUDA they count the time between two events on
    that stream, recorded where the section begins and ends, instead of the host's time. Where the device is the bottleneck that is the
    time that its kernels take; where the host is, it is the time in which the device waited for it, so either way it is what the step
    became longer by. Events come from a pool and are read when a record is made, if they have passed by then, else with the next one.

    What is not counted: waiting for the copy of a step's numbers (the device is at work on the training then) and for other ranks; the
    passing on of function calls inside attention modules, about a microsecond a call; the look at the schedule in steps that are not
    sampled; and setting up.

    Events are recorded on the stream of the device that the meter was made for: work on the other devices of a model that is spread over
    several is not in it.

    A section costs about a microsecond of the host, on CUDA two events more. Sections open and close on one thread at a time, as autograd's
    own thread runs while the one that called it waits.
    """

    def __init__(self, device: torch.device | None = None, *, clock: Callable[[], float] = time.perf_counter) -> None:
        """Start at zero.

        Args:
            device: Where the model is; ``None`` or a CPU: no events.
            clock: Returns seconds.
        """
        self._clock = clock
        self._events = EventPool(device) if device is not None and device.type == "cuda" else None
        self._sections: dict[tuple[str, bool], Section] = {}
        self.seconds: dict[str, float] = {}
        self._open: list[Section] = []
        self._on_device = 0
        self._since = self._began = clock()

    def section(self, part: str, *, launches: bool = False) -> Section:
        """Return the context whose time counts for ``part``; ``launches``: it puts work on the device (sections inside it count for it)."""
        found = self._sections.get((part, launches))
        if found is None:
            found = self._sections[part, launches] = Section(self, part, launches and self._events is not None)
        return found

    def waiting(self) -> Section:
        """Return the context whose time is not counted."""
        return self.section(WAITING)

    def restart(self) -> None:
        """Forget what was counted: wall time begins now."""
        self.take()

    def take(self) -> Spent:
        """Return what was counted since the last call, or since the beginning, and begin anew. Waits for nothing.

        Device time that has not passed yet is left for the next call.
        """
        now = self.tick()
        parts, wall = {part: seconds for part, seconds in self.seconds.items() if part != WAITING}, now - self._began
        self.seconds, self._began = {}, now
        for part, seconds in self._events.passed() if self._events is not None else ():
            parts[part] = parts.get(part, 0.0) + seconds
        return Spent(parts, wall)

    def tick(self) -> float:
        """Count the time up to now for the section that is open, and return now, in seconds."""
        now = self._clock()
        if self._open and not self._on_device:
            part = self._open[-1].part
            self.seconds[part] = self.seconds.get(part, 0.0) + now - self._since
        self._since = now
        return now

    def enter(self, section: Section) -> None:
        """Open a section."""
        self.tick()
        self._open.append(section)
        if section.on_device and self._events is not None:
            self._on_device += 1
            if self._on_device == 1:
                self._events.begin()

    def leave(self) -> None:
        """Close the section that was opened last."""
        self.tick()
        section = self._open.pop()
        if section.on_device and self._events is not None:
            self._on_device -= 1
            if self._on_device == 0:
                self._events.end(section.part)


class Section:
    """The context that :meth:`Meter.section` returns; one object a part, entered any number of times, inside itself too."""

    __slots__ = ("_meter", "on_device", "part")

    def __init__(self, meter: Meter, part: str, on_device: bool) -> None:
        self._meter, self.part, self.on_device = meter, part, on_device

    def __enter__(self) -> None:
        """Count for this part from now on."""
        self._meter.enter(self)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """Count for the section round this one again, or for nothing."""
        self._meter.leave()


class EventPool:
    """Pairs of CUDA events round work on a stream, in the order in which they were recorded; used again when they were read."""

    def __init__(self, device: torch.device, *, new: Callable[[], Any] | None = None) -> None:
        """Record on the device's current stream; ``new`` makes an event."""
        self._device = device
        self._new = new or _timing_event
        self._free: list[Any] = []
        self._begun: Any = None
        self._pairs: deque[tuple[str, Any, Any]] = deque()

    def begin(self) -> None:
        """Record the first event of a pair."""
        self._begun = self._record()

    def end(self, part: str) -> None:
        """Record the second one."""
        if self._begun is not None:
            self._pairs.append((part, self._begun, self._record()))
            self._begun = None

    def passed(self) -> list[tuple[str, float]]:
        """Return part and seconds of the pairs that the device has passed, oldest first, and take them back. Waits for nothing."""
        found = []
        while self._pairs and self._pairs[0][2].query():
            part, begin, end = self._pairs.popleft()
            found.append((part, begin.elapsed_time(end) / 1000.0))
            self._free += (begin, end)
        return found

    def _record(self) -> Any:
        event = self._free.pop() if self._free else self._new()
        event.record(torch.cuda.current_stream(self._device))
        return event


def _timing_event() -> Any:
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call,unused-ignore]
