"""The life of findings: when they open, change and close, and what an error in a rule costs."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace

import pytest

from judging import record
from probe.findings.life import CLEAN_STEPS, SEVERITIES, Life
from probe.findings.rule import WINDOW, History, Rule, Symptom
from probe.records import Finding, Setup, Severity

pytestmark = pytest.mark.pure  # of torch and probe alone: the same with every transformers

SEEN = Symptom("it is 3 (bound: 2)", "site", {"value": 3.0})
Script = dict[int, Sequence[Symptom] | None]


def scripted(script: Script, code: str = "a-code", severity: Severity = "warning") -> Rule:
    """A rule that says of each step what the script says; nothing of others."""
    return Rule(code, severity, "meaning", "advice", lambda history: script.get(history.last.step, ()))


def live(*rules: Rule, steps: Sequence[int], failed: list[tuple[str, str]] | None = None) -> dict[int, tuple[Finding, ...]]:
    """The events of each step."""
    life = Life(rules, None, lambda code, error: (failed if failed is not None else []).append((code, str(error))))
    return {step: life.judge(record(step)).events for step in steps}


def told(events: dict[int, tuple[Finding, ...]]) -> list[tuple[int, str, str]]:
    return [(step, event.state, event.severity) for step, found in events.items() for event in found]


def test_opened_once_and_closed_after_two_clean_steps() -> None:
    """A finding is told when it begins and when two steps without it have passed, and not between."""
    events = live(scripted({10: [SEEN], 20: [SEEN], 30: [SEEN]}), steps=range(10, 70, 10))
    assert told(events) == [(10, "opened", "warning"), (50, "closed", "warning")]
    assert events[10][0] == Finding("a-code", "warning", "site", 10, SEEN.message, {"value": 3.0}, "opened", 10, "advice")
    assert events[50][0] == replace(events[10][0], state="closed", step=50)
    assert CLEAN_STEPS == 2


def test_one_clean_step_is_not_the_end() -> None:
    """A symptom after a clean step counts anew, and is not told again."""
    assert told(live(scripted({1: [SEEN], 3: [SEEN], 5: [SEEN]}), steps=range(1, 8))) == [
        (1, "opened", "warning"),
        (7, "closed", "warning"),
    ]


def test_records_that_do_not_tell() -> None:
    """``None`` counts neither as clean nor as a symptom: the clean step before it still counts."""
    script: Script = {1: [SEEN], 3: None, 4: None, 6: [SEEN], 7: None, 8: None, 9: None}
    assert told(live(scripted(script), steps=range(1, 10))) == [
        (1, "opened", "warning"),
        (5, "closed", "warning"),
        (6, "opened", "warning"),
    ]


def test_a_change_of_severity_is_told() -> None:
    """Either way; the finding keeps the step it began at, and an unchanged one is not told."""
    worse = replace(SEEN, severity="critical", message="worse")
    events = live(scripted({1: [SEEN], 2: [worse], 3: [worse], 4: [SEEN]}), steps=range(1, 5))
    assert told(events) == [(1, "opened", "warning"), (2, "changed", "critical"), (4, "changed", "warning")]
    assert events[2][0].since_step == 1
    assert events[2][0].message == "worse"


def test_sites_live_apart() -> None:
    """Code and site are the identity: one site's end is not the other's; of two symptoms at one site the worse counts."""
    other = replace(SEEN, site="other")
    events = live(scripted({1: [SEEN, other], 2: [other], 3: [other]}), steps=range(1, 4))
    assert [(event.site, event.state) for found in events.values() for event in found] == [
        ("site", "opened"),
        ("other", "opened"),
        ("site", "closed"),
    ]
    worse = replace(SEEN, severity="critical", message="worse")
    for both in ([SEEN, worse], [worse, SEEN]):
        (event,) = live(scripted({1: both}), steps=[1])[1]
        assert (event.severity, event.message) == ("critical", "worse")


def test_rules_live_apart() -> None:
    """The same site of two rules is two findings."""
    events = live(scripted({1: [SEEN]}), scripted({1: [SEEN], 2: [SEEN], 3: [SEEN]}, "b-code"), steps=range(1, 4))
    assert [(event.code, event.state) for found in events.values() for event in found] == [
        ("a-code", "opened"),
        ("b-code", "opened"),
        ("a-code", "closed"),
    ]


def test_what_is_open() -> None:
    """After each record: the worst first, then the oldest, with the newest message and the state of the last event."""
    script: Script = {1: [SEEN], 2: [replace(SEEN, message="newer", evidence={"value": 4.0})]}
    info, bad = scripted({2: [SEEN]}, "told", "info"), scripted({2: [SEEN]}, "bad", "critical")
    life = Life([info, scripted({2: [SEEN]}, "late"), scripted(script), bad], None, lambda code, error: None)
    life.judge(record(1, time=11.0))
    found = life.judge(record(2, time=12.0)).open
    assert [finding.code for finding in found] == ["bad", "a-code", "late", "told"]
    assert found[1] == Finding("a-code", "warning", "site", 1, "newer", {"value": 4.0}, "opened", 1, "advice", 11.0)
    assert found[0].time == 12.0


def test_a_rule_that_raises_is_asked_no_more() -> None:
    """It is reported once, what it had found stays open, and the others go on."""
    asked = []

    def breaks(history: History) -> list[Symptom]:
        asked.append(history.last.step)
        if history.last.step == 2:
            raise ZeroDivisionError("planted")
        return [SEEN]

    def breaks_late(history: History) -> list[Symptom]:
        return (symptom for symptom in [SEEN] if 1 / (history.last.step - 1))  # type: ignore[return-value]

    failed: list[tuple[str, str]] = []
    rules = [Rule("breaks", "warning", "", "", breaks), Rule("lazy", "warning", "", "", breaks_late), scripted({4: [SEEN]})]
    life = Life(rules, None, lambda code, error: failed.append((code, str(error))))
    events = {step: life.judge(record(step)) for step in range(1, 8)}
    assert failed == [("lazy", "division by zero"), ("breaks", "planted")]
    assert asked == [1, 2]
    assert [finding.code for finding in events[7].open] == ["breaks"]
    assert [event.code for event in events[4].events] == ["a-code"]


def test_an_interrupt_is_no_error() -> None:
    """Ctrl-C in the middle of a rule ends the training."""

    def interrupted(history: History) -> list[Symptom]:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        live(Rule("a-code", "warning", "", "", interrupted), steps=[1])


def test_rules_see_a_window_and_what_was_open() -> None:
    """At most the newest records, the facts, and in each earlier record what was open after it."""
    given: list[History] = []

    def looks(history: History) -> list[Symptom]:
        given.append(history)
        return [SEEN] if history.last.step >= 40 else []

    setup = Setup(max_steps=50)
    life = Life([Rule("looks", "info", "", "", looks)], setup, lambda code, error: None)
    for step in range(1, 42):
        life.judge(record(step))
    assert [len(history.records) for history in given] == [*range(1, WINDOW + 1), *[WINDOW] * 9]
    assert given[-1].setup is setup
    assert [each.step for each in given[-1].records] == list(range(41 - WINDOW + 1, 42))
    assert [len(each.findings) for each in given[-1].records[-3:]] == [0, 1, 0]
    assert [each.step for each in life.records] == [each.step for each in given[-1].records]


@pytest.mark.parametrize("back", [1, 4])
def test_steps_that_go_back_begin_anew(back: int) -> None:
    """What was open before is forgotten, and so are the records."""
    lengths: list[int] = []

    def looks(history: History) -> list[Symptom]:
        lengths.append(len(history.records))
        return [SEEN] if history.last.step == 2 else []

    life = Life([Rule("looks", "info", "", "", looks)], None, lambda code, error: None)
    events = [life.judge(record(step)).events for step in (2, 4, back, 5, 6)]
    assert [len(found) for found in events] == [1, 0, 0, 0, 0]
    assert lengths == [1, 2, 1, 2, 3]


@pytest.mark.parametrize("seed", range(20))
def test_any_history_adds_up(seed: int) -> None:
    """Whatever rules say: the events of each finding alternate, and those without an end are what is open."""
    rng = random.Random(seed)
    choices: list[Sequence[Symptom] | None] = [None, [], [], [SEEN], [replace(SEEN, severity="critical")], [replace(SEEN, site="b"), SEEN]]
    rules = [scripted({step: rng.choice(choices) for step in range(60)}, code) for code in ("x", "y")]
    life = Life(rules, None, lambda code, error: None)
    now: dict[tuple[str, str], Finding] = {}
    for step in range(60):
        judgement = life.judge(record(step))
        for event in judgement.events:
            key = (event.code, event.site)
            assert (event.state == "opened") == (key not in now)
            assert event.step == step
            if event.state == "changed":
                assert event.severity != now[key].severity
            if event.state == "closed":
                del now[key]
            else:
                now[key] = event
        assert {(f.code, f.site): (f.severity, f.since_step) for f in judgement.open} == {
            key: (f.severity, f.since_step) for key, f in now.items()
        }
        ranks = [SEVERITIES.index(f.severity) for f in judgement.open]
        assert ranks == sorted(ranks)
