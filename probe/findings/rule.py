"""What a rule is: a code, a severity, what it means and what to do, and one pure function over the newest records."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from probe.records import Setup, Severity, StepRecord

WINDOW = 32
"""How many of the newest records rules see."""


@dataclass(frozen=True, slots=True)
class History:
    """What a rule judges by: the run's facts and its newest records.

    Attributes:
        setup: The facts; ``None`` where there is no Trainer.
        records: At least one and at most ``WINDOW``, oldest first; the last is the one that is judged.
    """

    setup: Setup | None
    records: tuple[StepRecord, ...]

    @property
    def last(self) -> StepRecord:
        """The record that is judged."""
        return self.records[-1]

    def newest(self, count: int) -> tuple[StepRecord, ...]:
        """Return the newest ``count`` records, oldest first; an empty tuple if there are fewer."""
        return self.records[-count:] if len(self.records) >= count else ()


@dataclass(frozen=True, slots=True)
class Symptom:
    """What a rule has seen: where, in words with the value and the bound, and the numbers. ``severity``: ``None`` is the rule's own."""

    message: str
    site: str = ""
    evidence: dict[str, float] = field(default_factory=dict)
    severity: Severity | None = None


Check = Callable[[History], Sequence[Symptom] | None]
"""Returns what is wrong (nothing: all is well), or ``None`` if this history does not tell: then open findings stay as they are."""


@dataclass(frozen=True, slots=True)
class Rule:
    """One diagnosis.

    Attributes:
        code: Its name, in words joined by hyphens.
        severity: Unless a symptom says otherwise.
        meaning: What it means when it is found, in one or two sentences.
        advice: What to do next, in one or two sentences.
        threshold: The bound and why it is that, in one or two sentences; "" where there is nothing to choose.
        check: The function.
    """

    code: str
    severity: Severity
    meaning: str
    advice: str
    check: Check
    threshold: str = ""
