"""Which steps are observed: the first of each ``train()`` call, and every step that a cadence divides."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

EARLY = 20
"""Steps after which the counterfactual passes are made for the first time where the cadence alone would make them later."""


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


@dataclass(frozen=True, slots=True)
class PassCadence:
    """In which of the sampled steps the counterfactual passes are made.

    With ``own`` = ``None``: where 5 · ``every`` divides the step, and in the first sampled step before which 20 were made in this
    ``train()`` call. With a number: in those sampled steps that it divides. With 0: never.

    Attributes:
        every: The cadence that ``attach`` was given.
        own: The user's choice.
        sampled: All cadences by which steps are sampled.
    """

    every: int
    own: int | None = None
    sampled: tuple[int, ...] = ()

    @property
    def steps(self) -> int:
        """The number that divides the steps of the passes; 0 if there are none."""
        return 5 * self.every if self.own is None else self.own

    def has(self, step: int, *, first: int) -> bool:
        """Tell whether the passes are made in a sampled step; ``first`` is the first step of this ``train()`` call."""
        return self.steps > 0 and (step % self.steps == 0 or step == self._early(first))

    def after(self, step: int, *, first: int) -> int:
        """Return the next step after ``step`` in which the passes are made; 0 if there is none."""
        if not self.steps:
            return 0
        together = [math.lcm(self.steps, every) for every in self._cadences]
        following = [(step // each + 1) * each for each in together]
        early = self._early(first)
        return min([*following, early] if early > step else following)

    def _early(self, first: int) -> int:
        """Return the first sampled step before which 20 steps were made; 0 where the user chose another cadence."""
        if self.own is not None:
            return 0
        begin = first + EARLY
        return min(math.ceil(begin / every) * every for every in self._cadences)

    @property
    def _cadences(self) -> tuple[int, ...]:
        return self.sampled or (self.every,)
