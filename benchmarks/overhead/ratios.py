"""Paired ratios: their median, and the interval that 95 % of bootstrapped medians lie in."""

from __future__ import annotations

import random
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

_BOOTSTRAPS = 2000


@dataclass(frozen=True)
class Ratio:
    """A ratio of step times, its 95 % interval, and the pairs it comes from."""

    value: float
    low: float
    high: float
    pairs: int

    def text(self) -> str:
        """Return the ratio with its interval, with as many digits as the interval has meaning."""
        digits = 4 if self.high - self.low < 0.01 else 3 if self.high - self.low < 0.2 else 2
        return f"{self.value:.{digits}f} [{self.low:.{digits}f}, {self.high:.{digits}f}]"


@dataclass(frozen=True)
class Pair:
    """One step of a contender and the plain step next to it, in seconds; ``step`` is the number of the contender's step."""

    step: int
    contender: float
    plain: float

    @property
    def ratio(self) -> float:
        """Return how many times the plain step's time it took."""
        return self.contender / self.plain


def median_ratio(pairs: Sequence[Pair], *, seed: int = 1) -> Ratio:
    """Return the median of the pairs' ratios; the interval is the percentile bootstrap's, over pairs.

    Source: Efron and Tibshirani, An Introduction to the Bootstrap, chapter 13.
    """
    return cycle_ratio(pairs, every=1, seed=seed)


def cycle_ratio(pairs: Sequence[Pair], *, every: int, seed: int = 1) -> Ratio:
    """Return the mean of a cadence's cycle: its sampled step, the step after it, which publishes, and the others, by their medians.

    With ``every`` = 1 there is one kind of step, and the mean is the median. A kind of which there are no pairs leaves its steps to
    the others.

    Args:
        pairs: At least one.
        every: Steps in a cycle.
        seed: Of the bootstrap.
    """
    kinds = [kind for kind in _kinds(pairs, every) if kind.ratios]
    rng = random.Random(seed)
    drawn = sorted(_mean([_Kind(kind.steps, rng.choices(kind.ratios, k=len(kind.ratios))) for kind in kinds]) for _ in range(_BOOTSTRAPS))
    outside = _BOOTSTRAPS // 40
    return Ratio(_mean(kinds), drawn[outside], drawn[-1 - outside], len(pairs))


@dataclass(frozen=True)
class _Kind:
    """One kind of step of a cycle: how many of them there are in it, and the ratios of those that were measured."""

    steps: int
    ratios: list[float]


def _kinds(pairs: Sequence[Pair], every: int) -> list[_Kind]:
    if every == 1:
        return [_Kind(1, [pair.ratio for pair in pairs])]
    sampled = [pair.ratio for pair in pairs if pair.step % every == 0]
    publishing = [pair.ratio for pair in pairs if pair.step % every == 1]
    others = [pair.ratio for pair in pairs if pair.step % every > 1]
    return [_Kind(1, sampled), _Kind(1, publishing), _Kind(every - 2, others)]


def _mean(kinds: Sequence[_Kind]) -> float:
    return sum(kind.steps * statistics.median(kind.ratios) for kind in kinds) / sum(kind.steps for kind in kinds)
