"""What a sampled step holds at its peak beyond the same step without the probe, by the allocator's own counters, and who holds it.

On the CPU the allocator reports each block to the profiler; the sum over time is the curve. On CUDA the allocator counts by itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function

import probe
from benchmarks.units.parts import watched
from benchmarks.units.targets import Target
from benchmarks.units.training import quiet, trainer
from benchmarks.units.workloads import Workload

MIB = 1 << 20
STEPS = 2
BOUND_MIB = 64.0
_MARK = "probe part: "


@dataclass(frozen=True)
class Part:
    """One part of the probe: the most it took beside what was there when it began, and what it left behind, in MiB."""

    name: str
    most_mib: float
    left_mib: float


@dataclass(frozen=True)
class Peak:
    """The extra peak memory of one workload's sampled step.

    Attributes:
        workload: Its name.
        plain_mib: Peak of the plain step, above what was allocated before it.
        extra_mib: By how much the peak of a sampled step (attaching included) stands above that.
        at_peak: What was running at the peak of the sampled step: a part of the probe, or "the training".
        parts: By part, the largest first.
    """

    workload: str
    plain_mib: float
    extra_mib: float
    at_peak: str
    parts: list[Part] = field(default_factory=list)


def extra_peak(workload: Workload, *, device: torch.device, dtype: torch.dtype = torch.float32) -> Peak:
    """Measure one workload: a few steps of a Trainer without the probe, and as many sampled ones, all on but counterfactual passes."""
    model, batch = workload.make()
    model = model.to(device, dtype)
    inputs = {key: tensor.to(dtype) if tensor.is_floating_point() else tensor for key, tensor in batch.items()}

    def plain() -> None:
        model.zero_grad(set_to_none=True)
        trainer(model, inputs, steps=STEPS, device=device).train()

    def sampled() -> None:
        model.zero_grad(set_to_none=True)
        with watched(marked), probe.attach(model, every=1, settings=quiet()):
            trainer(model, inputs, steps=STEPS, device=device).train()

    if device.type == "cuda":
        return _on_cuda(workload.name, plain, sampled, device)
    without, with_probe = curve(plain), curve(sampled)
    return Peak(workload.name, without.peak / MIB, (with_probe.peak - without.peak) / MIB, with_probe.at_peak(), with_probe.parts())


def _on_cuda(name: str, plain: Callable[[], None], sampled: Callable[[], None], device: torch.device) -> Peak:
    peaks = []
    plain()  # libraries keep workspaces from their first use on
    for run in (plain, sampled):
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        torch.cuda.synchronize(device)
        peaks.append(torch.cuda.max_memory_allocated(device) - before)
    return Peak(name, peaks[0] / MIB, (peaks[1] - peaks[0]) / MIB, "not known on CUDA")


@dataclass(frozen=True)
class Span:
    """A part of the probe at work, ``begin`` to ``end`` in ns."""

    name: str
    begin: int
    end: int


@dataclass(frozen=True)
class Curve:
    """Bytes allocated over time, above the start: (ns, change) in order, and the parts of the probe that were at work."""

    changes: Sequence[tuple[int, int]]
    spans: Sequence[Span]

    @property
    def peak(self) -> int:
        """The most bytes that were allocated at once."""
        return max((height for _, height in self._heights()), default=0)

    def at_peak(self) -> str:
        """Name the innermost part that was at work at the peak."""
        when = max(self._heights(), key=lambda point: point[1])[0]
        inside = [span for span in self.spans if span.begin <= when <= span.end]
        return min(inside, key=lambda span: span.end - span.begin).name if inside else "the training"

    def parts(self) -> list[Part]:
        """Return for each part the most it took and left in one go, the largest first."""
        heights = list(self._heights())
        times = [when for when, _ in heights]
        most: dict[str, tuple[float, float]] = {}
        for span in self.spans:
            first, last = _index(times, span.begin), _index(times, span.end)
            start = heights[first - 1][1] if first else 0
            inside = [height for _, height in heights[first:last]] or [start]
            taken, left = (max(inside) - start) / MIB, (inside[-1] - start) / MIB
            known = most.get(span.name, (0.0, 0.0))
            most[span.name] = (max(known[0], taken), max(known[1], left))
        return sorted((Part(name, *values) for name, values in most.items()), key=lambda part: -part.most_mib)

    def _heights(self) -> Iterator[tuple[int, int]]:
        height = 0
        for when, change in self.changes:
            height += change
            yield when, height


def curve(run: Callable[[], Any]) -> Curve:
    """Return the CPU allocator's curve while ``run`` runs."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as prof:
        run()
    events = prof.profiler.kineto_results.events()
    changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    spans = [Span(e.name().removeprefix(_MARK), e.start_ns(), e.start_ns() + e.duration_ns()) for e in events if e.name().startswith(_MARK)]
    return Curve(changes, spans)


def marked(part: str, site: str | None) -> Any:
    """Mark a part of the probe in the profiler, for :func:`benchmarks.units.parts.watched`."""
    return record_function(_MARK + part)


class PartPeaks:
    """The most that each part took on a CUDA device in one go, in bytes, by the allocator's counters. Nested parts hide each other's."""

    def __init__(self, device: torch.device) -> None:
        """Start with no part seen."""
        self.most: dict[str, int] = {}
        self._device = device

    @contextmanager
    def around(self, part: str, site: str | None) -> Iterator[None]:
        """Measure one call."""
        torch.cuda.reset_peak_memory_stats(self._device)
        before = torch.cuda.memory_allocated(self._device)
        yield
        self.most[part] = max(self.most.get(part, 0), torch.cuda.max_memory_allocated(self._device) - before)


def _index(times: Sequence[int], when: int) -> int:
    """Return the first place in sorted ``times`` that is not before ``when``."""
    low, high = 0, len(times)
    while low < high:
        middle = (low + high) // 2
        low, high = (middle + 1, high) if times[middle] < when else (low, middle)
    return low


def target(rows: Sequence[Peak]) -> Target:
    """Judge the worst workload."""
    worst = max(rows, key=lambda row: row.extra_mib)
    parts = ", ".join(f"{part.name} {part.most_mib:.1f}" for part in worst.parts[:4])
    largest = max((part for row in rows for part in row.parts), key=lambda part: part.most_mib, default=None)
    met = worst.extra_mib <= BOUND_MIB
    said = f"{worst.extra_mib:.1f} MiB at most over {len(rows)} workloads ({worst.workload}; peak in {worst.at_peak})"
    said += f"; the largest temporary of any part: {largest.most_mib:.1f} MiB ({largest.name})" if largest is not None else ""
    return Target(
        "extra peak memory of a sampled step, everything on",
        f"<= {BOUND_MIB:.0f} MiB whatever the model, batch and vocabulary",
        said,
        met,
        "" if met else f"held at most at once by part, MiB: {parts}",
    )
