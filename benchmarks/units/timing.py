"""Times taken side by side: calls in changing order, medians, and the interval that holds 95 % of bootstrapped medians."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

BOOTSTRAPS = 1000


@dataclass(frozen=True)
class Estimate:
    """A median and its 95 % interval."""

    median: float
    low: float
    high: float

    def text(self, *, scale: float = 1.0, digits: int = 3, unit: str = "") -> str:
        """Return ``median [low, high] unit``, multiplied by ``scale``, with so many significant digits."""
        values = [f"{value * scale:.{digits}g}" for value in (self.median, self.low, self.high)]
        return f"{values[0]} [{values[1]}, {values[2]}]{' ' if unit else ''}{unit}"


def estimate(values: Sequence[float]) -> Estimate:
    """Return the median of ``values`` with the interval of its bootstrap (fixed seed).

    Raises:
        ValueError: if there are none.
    """
    if not values:
        raise ValueError("no values to take a median of")
    rng = random.Random(1)
    medians = sorted(statistics.median(rng.choices(values, k=len(values))) for _ in range(BOOTSTRAPS))
    cut = BOOTSTRAPS // 40
    return Estimate(statistics.median(values), medians[cut], medians[-cut - 1])


def ratio(over: Sequence[float], under: Sequence[float]) -> Estimate:
    """Return the median of paired ratios."""
    return estimate([a / b for a, b in zip(over, under, strict=True)])


def difference(minuend: Sequence[float], subtrahend: Sequence[float]) -> Estimate:
    """Return the median of paired differences."""
    return estimate([a - b for a, b in zip(minuend, subtrahend, strict=True)])


def interleaved(
    calls: Mapping[str, Callable[[], Any]], *, rounds: int, device: torch.device, warm_up: int = 1, repeat: int = 1
) -> dict[str, list[float]]:
    """Time each call once a round, in random order; the k-th times of all calls are neighbours in time.

    Args:
        calls: What to time, by name.
        rounds: How often.
        device: Where they work: a CUDA device is waited for before and after each.
        warm_up: Rounds that do not count.
        repeat: How often a call runs while the clock runs once; the time is divided by it.

    Returns:
        Seconds a call, by name.
    """
    rng, names = random.Random(0), list(calls)
    times: dict[str, list[float]] = {name: [] for name in names}
    for i in range(warm_up + rounds):
        rng.shuffle(names)
        for name in names:
            took = timed(calls[name], device=device, repeat=repeat)
            if i >= warm_up:
                times[name].append(took)
    return times


def timed(call: Callable[[], Any], *, device: torch.device, repeat: int = 1) -> float:
    """Return the seconds that one call takes, the device's work included."""
    begin = now(device)
    for _ in range(repeat):
        call()
    return (now(device) - begin) / repeat


def now(device: torch.device) -> float:
    """Return the clock, in seconds, when the device has done all that it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
