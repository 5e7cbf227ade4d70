"""The life of findings: what opens, changes and closes as records come in; a pure state machine over rules and records."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from probe.findings.rule import WINDOW, History, Rule, Symptom
from probe.records import Finding, Setup, Severity, StepRecord

CLEAN_STEPS = 2
"""Sampled steps in a row without the symptom after which a finding closes; steps that do not tell are not counted."""

SEVERITIES: tuple[Severity, ...] = ("critical", "warning", "info")
"""The worst first."""


@dataclass(frozen=True, slots=True)
class Judgement:
    """What one record brought: the events of its step, and the findings that are open after it, the worst first, then the oldest."""

    events: tuple[Finding, ...] = ()
    open: tuple[Finding, ...] = ()


@dataclass(slots=True)
class _Open:
    finding: Finding
    clean: int = 0


@dataclass(slots=True)
class Life:
    """Applies rules to each record, and follows every finding (identified by code and site) from its begin to its end.

    A rule that raises is never asked again; what it had found stays open, because nothing tells of it any more. Holds the newest
    ``WINDOW`` records. A record whose step is not after the last one begins a new life: earlier records and findings are forgotten.

    Attributes:
        rules: In the order in which their findings are told.
        setup: The run's facts, if there are any.
        failed: Told the code of a rule that raised, and the exception.
    """

    rules: Sequence[Rule]
    setup: Setup | None
    failed: Callable[[str, Exception], None]
    _records: deque[StepRecord] = field(default_factory=lambda: deque(maxlen=WINDOW), init=False)
    _open: dict[tuple[str, str], _Open] = field(default_factory=dict, init=False)
    _broken: set[str] = field(default_factory=set, init=False)

    @property
    def records(self) -> tuple[StepRecord, ...]:
        """The newest records, oldest first."""
        return tuple(self._records)

    def judge(self, record: StepRecord) -> Judgement:
        """Return the events of a record, and what is open after it."""
        if self._records and record.step <= self._records[-1].step:
            self._records.clear()
            self._open.clear()
        self._records.append(record)
        history = History(self.setup, tuple(self._records))
        events = [event for rule in self.rules for event in self._apply(rule, history)]
        found = tuple(sorted((known.finding for known in self._open.values()), key=lambda f: (SEVERITIES.index(f.severity), f.since_step)))
        self._records[-1] = replace(record, findings=found)  # rules may look at what was open before
        return Judgement(tuple(events), found)

    def _apply(self, rule: Rule, history: History) -> list[Finding]:
        symptoms = self._ask(rule, history)
        if symptoms is None:
            return []
        seen: dict[str, Symptom] = {}
        for symptom in sorted(symptoms, key=lambda s: SEVERITIES.index(s.severity or rule.severity)):
            seen.setdefault(symptom.site, symptom)  # of several at one site the worst
        events = [event for symptom in seen.values() if (event := self._sight(rule, symptom, history.last)) is not None]
        gone = [key for key in self._open if key[0] == rule.code and key[1] not in seen]
        return [*events, *(event for key in gone if (event := self._miss(key, history.last)) is not None)]

    def _ask(self, rule: Rule, history: History) -> Sequence[Symptom] | None:
        if rule.code in self._broken:
            return None
        try:
            symptoms = rule.check(history)
            return None if symptoms is None else tuple(symptoms)
        except Exception as error:  # one rule's error must not cost the other rules
            self._broken.add(rule.code)
            self.failed(rule.code, error)
            return None

    def _sight(self, rule: Rule, symptom: Symptom, record: StepRecord) -> Finding | None:
        """Take note of a symptom; return the event if the finding begins, or its severity changes."""
        key, severity = (rule.code, symptom.site), symptom.severity or rule.severity
        known = self._open.get(key)
        finding = Finding(
            code=rule.code,
            severity=severity,
            site=symptom.site,
            since_step=record.step if known is None else known.finding.since_step,
            message=symptom.message,
            evidence=dict(symptom.evidence),
            state="opened" if known is None else "changed",
            step=record.step,
            advice=rule.advice,
            time=record.time,
        )
        if known is not None and known.finding.severity == severity:
            old = known.finding
            known.finding = replace(finding, state=old.state, step=old.step, time=old.time)
            known.clean = 0
            return None
        self._open[key] = _Open(finding)
        return finding

    def _miss(self, key: tuple[str, str], record: StepRecord) -> Finding | None:
        """Take note of a record without the symptom; return the event if the finding ends."""
        known = self._open[key]
        known.clean += 1
        if known.clean < CLEAN_STEPS:
            return None
        del self._open[key]
        return replace(known.finding, state="closed", step=record.step, time=record.time)
