"""Ending a training because of a finding: on every rank at the same step, or not at all."""

from __future__ import annotations

from collections.abc import Callable

from probe.observation import Observation
from probe.records import Severity


class Stopping:
    """Decides whether training ends (``stop_on``).

    One process decides as soon as the record is published. Merged ranks publish at moments of their own (a log that only rank 0 writes),
    so they meet where all of them come by: at the end of the step after a sampled one, in one all-reduce of one number, which waits for
    the device. Without ``stop_on`` nothing is done.
    """

    def __init__(self, stop_on: Severity | None, observation: Observation, say: Callable[[str], None]) -> None:
        """Decide for the training that ``observation`` observes; ``say`` receives what the user has to know."""
        self._stop_on = stop_on
        self._observation = observation
        self._say = say
        self._sampled = False
        self._agreed = False
        self._said = False

    def begin(self) -> None:
        """Say that ranks which are not merged cannot agree on an end; called when they have tried to."""
        ranks = self._observation.ranks
        if self._stop_on is not None and not ranks.merged:
            self._say(f"stop_on={self._stop_on!r} is not in force: {ranks.reason}")

    def agree(self, asked: str, *, sampled: bool) -> None:
        """Let merged ranks decide at the end of a step, if the record of the step before could have asked for it.

        Args:
            asked: Why this rank asks that training ends, or "".
            sampled: Whether the step that ends now is a sampled one, the same on every rank.
        """
        due, self._sampled = self._sampled, sampled
        if self._stop_on is None or not due or self._agreed or self._alone():
            return
        self._agreed = self._observation.any_rank(bool(asked))
        if self._agreed:
            self._tell(asked or "a finding of another rank")

    def wanted(self, asked: str) -> bool:
        """Tell whether training is to end now; on merged ranks what they last agreed on."""
        if not self._alone():
            return self._agreed
        if self._stop_on is not None and asked and self._observation.ranks.merged:
            self._tell(asked)
            return True
        return False

    def _alone(self) -> bool:
        ranks = self._observation.ranks
        return ranks.world == 1 or not ranks.merged

    def _tell(self, asked: str) -> None:
        if not self._said:
            self._said = True
            self._say(f"training ends here, as stop_on={self._stop_on!r} asks: {asked}")
