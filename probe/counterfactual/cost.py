"""How long the device was at work between two points, without waiting for it: host time on a CPU, events on CUDA."""

from __future__ import annotations

import time
from typing import Any

import torch


class Stopwatch:
    """Runs from its making until :meth:`stop`. Neither waits for the device."""

    def __init__(self, device: torch.device) -> None:
        """Start. Of a device that has no events (other than CUDA's) only the host's part is timed."""
        self._stream = torch.cuda.current_stream(device) if device.type == "cuda" else None
        self._begin: Any = self._now()
        self._end: Any = None

    def stop(self) -> None:
        """Stop."""
        self._end = self._now()

    def milliseconds(self) -> float | None:
        """Return the time between start and stop; ``None`` if it was not stopped. On CUDA waits until the device is past the stop."""
        if self._end is None:
            return None
        if self._stream is None:
            return 1000.0 * float(self._end - self._begin)
        self._end.synchronize()
        return float(self._begin.elapsed_time(self._end))

    def _now(self) -> Any:
        if self._stream is None:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call,unused-ignore]
        event.record(self._stream)
        return event
