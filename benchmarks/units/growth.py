"""How the cost of a sampled step grows: with sites, bytes of activations, micro-batches, and along a run."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import probe
from benchmarks.units.targets import Target
from benchmarks.units.timing import Estimate, estimate, interleaved, ratio
from benchmarks.units.training import quiet
from benchmarks.units.workloads import Workload, llama

LAYERS = (2, 4, 8, 16, 32)
#: 8 to 64 MiB: none of them lies in a core's cache, whose speed would be another.
TOKENS = (4096, 8192, 16384, 32768)
ROUNDS = 16
MICRO_BATCHES = (1, 2, 4, 8)
EARLY, LATE, SPAN = 10, 2000, 100
MOST_EXPONENT = 1.1


@dataclass(frozen=True)
class Growth:
    """What the probe adds to a sampled step at several sizes of one thing.

    Attributes:
        over: The thing.
        sizes: Its sizes.
        added_ms: What the probe added, median of paired differences.
        slope_us: By how much that grows with one more, least squares.
        fixed_ms: What is left at size 0.
        exponent: Of the growth from the second size to the last, cost less what is fixed: 1 is linear, with its 95 % interval. ``None``
            if no round tells one, because what was added lies below the noise.
    """

    over: str
    sizes: Sequence[int]
    added_ms: Sequence[float]
    slope_us: float
    fixed_ms: float
    exponent: Estimate | None


@dataclass(frozen=True)
class Ageing:
    """The time of sampled steps late in a run over that of early ones."""

    early: str
    late: str
    early_ms: float
    over_early: Estimate


def over_sites(device: torch.device, *, layers: Sequence[int] = LAYERS, rounds: int = ROUNDS) -> Growth:
    """Measure Llamas of tiny width with more and more layers: two sites a layer."""
    added = [_added(llama(vocabulary=256, rows=1, tokens=16, width=64, layers=n), device, rounds=rounds) for n in layers]
    return fit("sites", [n * 2 for n in layers], added)


def over_bytes(device: torch.device, *, tokens: Sequence[int] = TOKENS, rounds: int = ROUNDS) -> Growth:
    """Measure one chain of wide identities, fed more and more: only statistics look at it, and their cost is of its bytes."""
    added = []
    for count in tokens:
        added.append(_added(Workload(f"{count} rows", lambda count=count: _wide(count)), device, rounds=rounds, sites=["body"]))
    return fit("KiB of an activation", [count * _WIDTH * 4 // 1024 for count in tokens], added)


def over_micro_batches(device: torch.device, *, counts: Sequence[int] = MICRO_BATCHES, rounds: int = ROUNDS) -> Growth:
    """Measure steps of more and more micro-batches."""
    load = llama(vocabulary=256, rows=1, tokens=16, width=64, layers=4)
    return fit("micro-batches", list(counts), [_added(load, device, rounds=rounds, micro_batches=count) for count in counts])


def along_a_run(device: torch.device, *, late: int = LATE, span: int = SPAN) -> Ageing:
    """Measure sampled steps late in a long run beside those of a run that has just begun, in turns, so that the machine's drift is in both.

    Each step is made into a record and judged by all rules.
    """
    with ExitStack() as stack:
        old = _small_run(device, stack)
        for _ in range(late):
            old()
        new = _small_run(device, stack)
        for _ in range(EARLY):
            new()
        times = interleaved({"old": old, "new": new}, rounds=span, device=device, warm_up=0)
    return Ageing(
        f"steps {EARLY + 1} to {EARLY + span} of a run beside it",
        f"steps {late + 1} to {late + span}",
        statistics.median(times["new"]) * 1e3,
        ratio(times["old"], times["new"]),
    )


def _small_run(device: torch.device, stack: ExitStack) -> Callable[[], None]:
    """Return a sampled step of a model of its own."""
    model, batch = llama(vocabulary=256, rows=1, tokens=16, width=64, layers=1).make()
    model.to(device)
    inputs = {key: tensor.to(device) for key, tensor in batch.items()}
    return _step(model, inputs, stack.enter_context(probe.attach(model, every=1, settings=quiet())), 1)


_WIDTH = 512


class _Wide(nn.Module):
    """A parameter, and an identity that is fed what it scaled."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))
        self.body = nn.Identity()

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"loss": self.body(x * self.weight).sum()}


def _wide(count: int) -> tuple[nn.Module, dict[str, Tensor]]:
    torch.manual_seed(0)
    return _Wide(), {"x": torch.randn(1, count, _WIDTH)}


def _added(load: Workload, device: torch.device, *, rounds: int, micro_batches: int = 1, sites: Sequence[str] | None = None) -> list[float]:
    """Return the seconds that a sampled step takes beyond the plain one next to it, round by round."""
    model, batch = load.make()
    model.to(device)
    inputs = {key: tensor.to(device) for key, tensor in batch.items()}
    with probe.attach(model, every=1, settings=quiet(), sites={"custom": list(sites)} if sites else "auto") as p:
        calls = {kind: _step(model, inputs, p if kind == "sampled" else None, micro_batches) for kind in ("plain", "sampled")}
        times = interleaved(calls, rounds=rounds, device=device, warm_up=3)
    return [a - b for a, b in zip(times["sampled"], times["plain"], strict=True)]


def _step(model: nn.Module, inputs: dict[str, Tensor], p: probe.Probe | None, micro_batches: int) -> Callable[[], None]:
    def step() -> None:
        model.zero_grad()
        with nullcontext() if p is None else p.step():
            for _ in range(micro_batches):
                model(**inputs)["loss"].backward()

    return step


def fit(over: str, sizes: Sequence[int], added: Sequence[Sequence[float]]) -> Growth:
    """Fit a line to the medians, and the exponent of what grows to what the size is.

    The exponent is of cost less its fixed part, from the second size to the last, for each round of measurements on its own.

    Args:
        over: What the sizes are of.
        sizes: At least three, growing.
        added: For each size the seconds of each round.
    """
    middles = [statistics.median(each) for each in added]
    slope, fixed = _line(sizes, middles)
    exponents = []
    for times in zip(*added, strict=True):
        _, mine = _line(sizes, times)
        mine = max(0.0, min(mine, 0.9 * times[1]))
        first, last = times[1] - mine, times[-1] - mine
        if first > 0 and last > 0:
            exponents.append(math.log(last / first) / math.log(sizes[-1] / sizes[1]))
    return Growth(
        over, list(sizes), [value * 1e3 for value in middles], slope * 1e6, fixed * 1e3, estimate(exponents) if exponents else None
    )


def _line(sizes: Sequence[float], values: Sequence[float]) -> tuple[float, float]:
    """Return slope and value at 0, each point weighted by 1 / size so that small sizes count, too."""
    weights = [1 / size for size in sizes]
    total = sum(weights)
    x = sum(w * s for w, s in zip(weights, sizes, strict=True)) / total
    y = sum(w * v for w, v in zip(weights, values, strict=True)) / total
    slope = sum(w * (s - x) * (v - y) for w, s, v in zip(weights, sizes, values, strict=True))
    slope /= sum(w * (s - x) ** 2 for w, s in zip(weights, sizes, strict=True))
    return slope, y - slope * x


def targets(rows: Sequence[Growth], ageing: Ageing) -> list[Target]:
    """Judge: linear where the exponent is at most 1.1; flat where late steps take at most 1.1 times as long as early ones."""
    made = []
    for row in rows:
        met, why = _judged(row.exponent, MOST_EXPONENT, "it grows faster than the size")
        said = (
            f"exponent {row.exponent.text() if row.exponent else 'not told'}; {row.slope_us:.3g} us each, {row.fixed_ms:.3g} ms fixed "
            f"({row.sizes[0]} to {row.sizes[-1]}: {row.added_ms[0]:.3g} to {row.added_ms[-1]:.3g} ms)"
        )
        made.append(Target(f"growth: linear in {row.over}", f"exponent <= {MOST_EXPONENT}", said, met, why))
    flat, why = _judged(ageing.over_early, 1.1, "a late step takes longer than an early one")
    said = f"{ageing.over_early.text()} ({ageing.late} over {ageing.early}, {ageing.early_ms:.3g} ms)"
    return [*made, Target("growth: flat in steps", "ratio <= 1.1", said, flat, why)]


def _judged(found: Estimate | None, bound: float, why: str) -> tuple[bool | None, str]:
    """Return whether a bound is met, and why not; nothing is told of one that lies between the interval's lower end and the median."""
    if found is None:
        return None, "what is added lies below the noise"
    if found.median <= bound:
        return True, ""
    return (None, "undecided, the interval holds the bound") if found.low <= bound else (False, why)
