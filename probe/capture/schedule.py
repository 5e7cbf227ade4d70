"""Which steps are observed: the first of each ``train()`` call, and every step that a cadence divides."""

from __future__ import annotations

from collections.abc import Iterable


def in_cadence(step: int, *, every: int, first: int) -> bool:
    """Tell whether one cadence shows a step.

    Args:
        step: Number of the optimizer step, as ``global_step`` is at ``on_step_end`` (the first step of a run is 1).
        every: The cadence, at least 1.
        first: The first step of this ``train()`` call.
    """
    return step == first or step % every == 0


def is_sampled(step: int, *, cadences: Iterable[int], first: int) -> bool:
    """Tell whether a step is observed: whether any of the cadences shows it."""
    return any(in_cadence(step, every=every, first=first) for every in cadences)
