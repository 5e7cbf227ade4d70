"""Recall, precision and steps until found, from what the findings said of each run."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median

from benchmarks.faults.fault import Fault
from benchmarks.faults.healthy import Healthy
from benchmarks.faults.running import SUBJECTS, Outcome
from benchmarks.faults.split import Part, part_of
from probe.records import Severity

INFORMATION = frozenset({"dropout-off", "same-batch-repeated", "encoder-frozen"})
"""Findings that are only worth knowing; where one of them is expected, any severity counts."""
_GRAVE: tuple[Severity, ...] = ("critical", "warning")


@dataclass(frozen=True)
class Score:
    """What the findings of one run are worth.

    Attributes:
        outcome: The run.
        subject: The fault, or the healthy run.
        part: Of the split.
        named_at: Steps from the fault to the expected finding, ``None`` without.
        found_at: Steps from the fault to the first finding that counts as right.
        right: Codes of warnings and critical findings that are right.
        wrong: Those that are not; of a healthy run all.
        critical: Codes of critical findings that are not right.
    """

    outcome: Outcome
    subject: Fault | Healthy
    part: Part
    named_at: int | None
    found_at: int | None
    right: frozenset[str]
    wrong: frozenset[str]
    critical: frozenset[str]


@dataclass(frozen=True)
class Summary:
    """Many runs together. ``recall`` and ``precision`` are shares, ``None`` of nothing; ``steps`` is the median until found."""

    faults: int
    found: int
    named: int
    right: int
    wrong: int
    healthy: int
    healthy_critical: int
    healthy_warned: int
    steps: float | None

    @property
    def recall(self) -> float | None:
        """Share of faults of which a right finding appeared."""
        return self.found / self.faults if self.faults else None

    @property
    def precision(self) -> float | None:
        """Share of critical findings and warnings, one a code and run, that are right."""
        return self.right / (self.right + self.wrong) if self.right + self.wrong else None


def score(outcome: Outcome) -> Score:
    """Hold one run against what was written down beforehand."""
    subject = SUBJECTS[outcome.name]
    grave = _first_steps(outcome, _GRAVE)
    critical = _first_steps(outcome, ("critical",))
    if isinstance(subject, Healthy):
        part = part_of("healthy", subject.area, subject.kind)
        return Score(outcome, subject, part, None, None, frozenset(), frozenset(grave), frozenset(critical))
    kind = subject.kind
    accepted = kind.also | {kind.expected}
    counting = _first_steps(outcome, (*_GRAVE, "info")) if kind.expected in INFORMATION else grave
    counting = {code: step - outcome.onset for code, step in counting.items() if step > outcome.onset}
    found = [step for code, step in counting.items() if code in accepted]
    return Score(
        outcome,
        subject,
        part_of("faults", kind.area, kind.name),
        named_at=counting.get(kind.expected),
        found_at=min(found, default=None),
        right=frozenset(code for code in grave if code in accepted),
        wrong=frozenset(code for code in grave if code not in accepted),
        critical=frozenset(code for code in critical if code not in accepted),
    )


def _first_steps(outcome: Outcome, severities: Sequence[Severity]) -> Mapping[str, int]:
    """Return, by code, the first step at which a finding of one of these severities stood; closing lines say nothing new."""
    first: dict[str, int] = {}
    for finding in outcome.findings:
        if finding.state != "closed" and finding.severity in severities:
            first[finding.code] = min(first.get(finding.code, finding.step), finding.step)
    return first


def summary(scores: Iterable[Score]) -> Summary:
    """Put runs together."""
    scores = list(scores)
    faults = [one for one in scores if isinstance(one.subject, Fault)]
    healthy = [one for one in scores if isinstance(one.subject, Healthy)]
    until = [one.found_at for one in faults if one.found_at is not None]
    return Summary(
        faults=len(faults),
        found=len(until),
        named=sum(one.named_at is not None for one in faults),
        right=sum(len(one.right) for one in faults),
        wrong=sum(len(one.wrong) for one in scores),
        healthy=len(healthy),
        healthy_critical=sum(bool(one.critical) for one in healthy),
        healthy_warned=sum(bool(one.wrong - one.critical) for one in healthy),
        steps=median(until) if until else None,
    )
