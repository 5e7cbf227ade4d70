"""Diagnosis: what a record gets of findings and verdict, who is told, what asks for an end, and what an error costs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest

import probe.diagnosis as module
from judging import record
from probe.capture.breaker import Breaker
from probe.diagnosis import Diagnosis
from probe.findings.rule import WINDOW, History, Rule, Symptom
from probe.records import Counterfactual, Finding, Severity, StepRecord, Verdict

pytestmark = pytest.mark.pure  # of torch and probe alone: the same with every transformers

PASS = Counterfactual(("input_features",))


def rule(code: str, severity: Severity, *steps: int) -> Rule:
    return Rule(code, severity, "", "", lambda history: [Symptom(f"{code} is so")] if history.last.step in steps else [])


RULES = (rule("bad", "critical", 3, 4), rule("odd", "warning", 2, 3), rule("told", "info", 1))


class Said:
    """A breaker with what it says, and a diagnosis with what its listener hears."""

    def __init__(self, rules: Sequence[Rule] = RULES, **options: Any) -> None:
        self.lines: list[str] = []
        self.heard: list[tuple[int, str, str]] = []
        self.breaker = Breaker(self.lines.append)
        listener = options.pop("listener", lambda event: self.heard.append((event.step, event.code, event.state)))
        self.diagnosis = Diagnosis(self.breaker, rules=rules, listener=listener, **options)

    def judge(self, *records: StepRecord) -> list[StepRecord]:
        made = []
        for each in records:
            judged, events = self.diagnosis.judge(each)
            self.diagnosis.tell(events)
            made.append(judged)
        return made


def steps(last: int, **changes: Any) -> list[StepRecord]:
    return [record(step, metrics={"mine": 1.0}, not_measured={"x": "y"}, **changes) for step in range(1, last + 1)]


def test_records_carry_what_is_open() -> None:
    """Findings and their numbers stand in the record; nothing else of it changes, and the given one stays as it was."""
    given = steps(6)
    made = Said().judge(*given)
    assert [[finding.code for finding in each.findings] for each in made] == [
        ["told"], ["odd", "told"], ["bad", "odd"], ["bad", "odd"], ["bad"], [],
    ]  # fmt: skip
    counts = [tuple(each.metrics[f"probe/findings/{severity}"] for severity in ("critical", "warning", "info")) for each in made]
    assert counts == [(0, 0, 1), (0, 1, 1), (1, 1, 0), (1, 1, 0), (1, 0, 0), (0, 0, 0)]
    for before, after in zip(given, made):
        assert before == record(before.step, metrics={"mine": 1.0}, not_measured={"x": "y"})
        kept = {name: value for name, value in after.metrics.items() if not name.startswith("probe/findings/")}
        assert replace(after, findings=(), metrics=kept) == before


def test_the_listener_hears_every_event_once() -> None:
    """In order, with the finding as it is written."""
    said = Said()
    said.judge(*steps(6))
    assert said.heard == [
        (1, "told", "opened"), (2, "odd", "opened"), (3, "bad", "opened"),
        (3, "told", "closed"), (5, "odd", "closed"), (6, "bad", "closed"),
    ]  # fmt: skip


def test_a_listener_that_raises() -> None:
    """It is said once, the listener is not called again, and records are judged on."""
    called: list[Finding] = []

    def broken(event: Finding) -> None:
        called.append(event)
        raise ValueError("planted")

    said = Said(listener=broken)
    made = said.judge(*steps(3))
    assert len(called) == 1
    assert len(said.lines) == 1
    assert said.lines[0].startswith("on_finding switched off after ValueError: planted")
    assert [finding.code for finding in made[-1].findings] == ["bad", "odd"]


def test_an_interrupt_in_the_listener_is_no_error() -> None:
    """Ctrl-C passes."""

    def interrupted(event: Finding) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Said(listener=interrupted).judge(*steps(1))


def test_nobody_listens() -> None:
    """Without a listener events are told to nobody."""
    said = Said(listener=None)
    said.judge(*steps(3))
    assert said.heard == said.lines == []


@pytest.mark.parametrize(("stop_on", "first"), [("critical", 3), ("warning", 2), (None, None)])
def test_what_asks_for_an_end(stop_on: Any, first: int | None) -> None:
    """The first finding that is at least as severe, in words; once asked it stays so."""
    said = Said(stop_on=stop_on)
    asked = []
    for each in steps(6):
        said.judge(each)
        asked.append(said.diagnosis.stop_asked)
    assert [bool(why) for why in asked] == [first is not None and step >= first for step in range(1, 7)]
    if first is not None:
        code = "bad" if stop_on == "critical" else "odd"
        assert set(asked[first - 1 :]) == {f"{stop_on} finding {code}, opened at step {first}: {code} is so"}


def test_a_finding_that_gets_worse_asks_for_an_end() -> None:
    """So does a change; the end of one does not."""

    def worse(history: History) -> list[Symptom]:
        severity: Severity = "critical" if history.last.step == 2 else "warning"
        return [Symptom("it", "here", severity=severity)] if history.last.step < 3 else []

    said = Said([Rule("worse", "warning", "", "", worse)], stop_on="critical")
    said.judge(*steps(1))
    assert not said.diagnosis.stop_asked
    said.judge(record(2))
    assert said.diagnosis.stop_asked == "critical finding worse at here, changed at step 2: it"
    ends = Said([rule("bad", "critical", 1)], stop_on="critical")
    ends.judge(record(1))
    ends.diagnosis.stop_asked = ""
    ends.judge(record(2), record(3))
    assert ends.heard[-1] == (3, "bad", "closed")
    assert not ends.diagnosis.stop_asked


def test_a_rule_that_raises_is_named() -> None:
    """It is said once, stands in the records from then on, and the other rules go on."""

    def broken(history: History) -> list[Symptom]:
        raise ValueError("planted")

    said = Said([Rule("broken", "warning", "", "", broken), *RULES])
    made = said.judge(*steps(3))
    assert len(said.lines) == 1
    for each in made:
        assert each.not_measured["rule broken"].startswith("switched off after ValueError: planted")
        assert each.not_measured["x"] == "y"
    assert [finding.code for finding in made[-1].findings] == ["bad", "odd"]


def test_findings_that_fail_as_a_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """Then there is no number of findings, and its reason; nothing raises."""
    said, asked = Said(), []
    monkeypatch.setattr(type(said.diagnosis._life), "judge", lambda self, record: asked.append(record.step) or 1 / 0)
    made = said.judge(*steps(2))
    assert len(said.lines) == 1
    assert asked == [1]
    for each in made:
        assert each.findings == ()
        for severity in ("critical", "warning", "info"):
            assert f"probe/findings/{severity}" not in each.metrics
            assert "ZeroDivisionError" in each.not_measured[f"probe/findings/{severity}"]


def test_the_verdict_is_there_before_the_rules(monkeypatch: pytest.MonkeyPatch) -> None:
    """From the first counterfactual pass on every record has a verdict, which rules see, or the reason why not."""
    verdict = Verdict("used", "audio", 3, "so it is", {})
    monkeypatch.setattr(module, "pooled_verdict", lambda records: verdict if len(records) > 2 else "too few passes")
    given: list[Verdict | None] = []

    def looks(history: History) -> list[Symptom]:
        given.append(history.last.verdict)
        return []

    said = Said([Rule("looks", "info", "", "", looks)])
    made = said.judge(record(1), record(2, counterfactual=PASS), record(3), record(4))
    assert [each.verdict for each in made] == given == [None, None, verdict, verdict]
    assert ["verdict" in each.not_measured for each in made] == [False, True, False, False]
    assert made[1].not_measured["verdict"] == "too few passes"


def test_passes_older_than_the_window_count(monkeypatch: pytest.MonkeyPatch) -> None:
    """Counterfactual passes are rarer than records: the newest of them are pooled, however long ago they were made, in order, each once."""
    pooled: list[list[int]] = []
    monkeypatch.setattr(module, "pooled_verdict", lambda records: pooled.append([each.step for each in records]) or "none yet")
    said = Said([])
    said.judge(*[record(step, counterfactual=PASS if step in (1, 2, 50, 70) else None) for step in range(1, 71)])
    assert pooled[-1] == [1, 2, *range(71 - WINDOW, 71)]
    assert pooled[0] == [1]


def test_a_verdict_that_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is said once and not asked again; findings go on."""
    asked: list[int] = []
    monkeypatch.setattr(module, "pooled_verdict", lambda records: asked.append(len(records)) or 1 / 0)
    said = Said()
    made = said.judge(*steps(3, counterfactual=PASS))
    assert len(said.lines) == 1
    assert asked == [1]
    assert all(each.verdict is None and "ZeroDivisionError" in each.not_measured["verdict"] for each in made)
    assert [finding.code for finding in made[-1].findings] == ["bad", "odd"]
