"""Diagnosis: each new record is judged by the rules; it gets verdict and open findings, and whoever wants to know is told of events."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import replace

from probe.capture.breaker import Breaker
from probe.findings.life import SEVERITIES, Judgement, Life
from probe.findings.rule import WINDOW, Rule
from probe.findings.rules import RULES
from probe.findings.verdict import pooled_verdict
from probe.records import Finding, Setup, Severity, StepRecord

_METRIC = "probe/findings/"
Listener = Callable[[Finding], object]


class Diagnosis:
    """Judges the records of one training, in order. An error in a rule, in the verdict or in the listener switches off only that one.

    Runs on the host, on finished records: no tensor is touched.
    """

    def __init__(
        self,
        breaker: Breaker,
        *,
        setup: Setup | None = None,
        stop_on: Severity | None = None,
        listener: Listener | None = None,
        rules: Sequence[Rule] = RULES,
    ) -> None:
        """Begin with nothing open.

        Args:
            breaker: Told of errors.
            setup: The run's facts, which rules judge by; ``None`` where there is no Trainer.
            stop_on: The least severity at which training is to end; ``None``: never.
            listener: Called with every event (the user's ``on_finding``).
            rules: The rules.
        """
        self._breaker = breaker
        self._stop_on = stop_on
        self._listener = listener
        self._passes: deque[StepRecord] = deque(maxlen=WINDOW)  # rarer than records, and wanted for longer
        self._life = Life(rules, setup, lambda code, error: breaker.trip(f"rule {code}", error))
        self.stop_asked = ""

    def judge(self, record: StepRecord) -> tuple[StepRecord, tuple[Finding, ...]]:
        """Return the record with verdict, open findings and their numbers, and the events of its step.

        ``stop_asked`` says from then on which finding asks that training ends, once one does.
        """
        metrics, reasons = dict(record.metrics), dict(record.not_measured)
        record = replace(record, metrics=metrics, not_measured=reasons)
        with self._breaker.guard("verdict"):
            record = self._with_verdict(record)
        judgement = None
        if not self._breaker.is_off("findings"):
            with self._breaker.guard("findings"):
                judgement = self._life.judge(record)
        failures = self._breaker.failures
        reasons.update(failures)
        if judgement is None:
            reasons.update((f"{_METRIC}{severity}", failures["findings"]) for severity in SEVERITIES)
            return record, ()
        for severity in SEVERITIES:
            metrics[f"{_METRIC}{severity}"] = float(sum(finding.severity == severity for finding in judgement.open))
        self._ask_to_stop(judgement)
        return replace(record, findings=judgement.open), judgement.events

    def tell(self, events: Sequence[Finding]) -> None:
        """Call the listener with each event."""
        listener = self._listener
        if listener is None:
            return
        for event in events:
            if not self._breaker.is_off("on_finding"):
                with self._breaker.guard("on_finding"):
                    listener(event)

    def _with_verdict(self, record: StepRecord) -> StepRecord:
        if record.counterfactual is not None:
            self._passes.append(record)
        if not self._passes or self._breaker.is_off("verdict"):
            return record
        window = (*self._life.records[1 - WINDOW :], record)
        older = [made for made in self._passes if made.step < window[0].step]
        verdict = pooled_verdict([*older, *window])
        if isinstance(verdict, str):
            record.not_measured.setdefault("verdict", verdict)
            return record
        return replace(record, verdict=verdict)

    def _ask_to_stop(self, judgement: Judgement) -> None:
        if self._stop_on is None or self.stop_asked:
            return
        bad = SEVERITIES[: SEVERITIES.index(self._stop_on) + 1]
        event = next((event for event in judgement.events if event.state != "closed" and event.severity in bad), None)
        if event is not None:
            at = f" at {event.site}" if event.site else ""
            self.stop_asked = f"{event.severity} finding {event.code}{at}, {event.state} at step {event.step}: {event.message}"
