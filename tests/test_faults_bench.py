"""The fault benchmark's books: the split by its rule, what is expected of each fault, and how findings are counted."""

from __future__ import annotations

import pytest

from flash_stand_in import VERSION

if VERSION < (5, 0):
    pytest.skip("the benchmark is made with the newest transformers", allow_module_level=True)

from benchmarks.faults import split
from benchmarks.faults.__main__ import chosen
from benchmarks.faults.fault import kind
from benchmarks.faults.faults import FAULTS, KINDS
from benchmarks.faults.healthy import HEALTHY
from benchmarks.faults.page import page
from benchmarks.faults.running import SUBJECTS, Outcome, planned
from benchmarks.faults.scoring import INFORMATION, Score, score, summary
from benchmarks.faults.subset import QUICK
from benchmarks.faults.training import Training
from probe.findings.rules import RULES
from probe.records import Finding, FindingState, Severity


def said(code: str, severity: Severity, step: int, state: FindingState = "opened") -> Finding:
    return Finding(code=code, severity=severity, site="", since_step=step, message="", state=state, step=step)


def outcome(name: str, *findings: Finding, onset: int = 0) -> Outcome:
    return Outcome(name, 24, onset, findings, (1.0, 0.5), (), "", 1.0)


def test_there_are_enough() -> None:
    """At least 40 kinds of faults and 20 healthy runs, each with a name of its own and a note."""
    assert len({one.name for one in KINDS}) == len(KINDS) >= 40
    assert len(HEALTHY) >= 20
    assert len(SUBJECTS) == len(FAULTS) + len(HEALTHY)
    assert all(one.note.endswith(".") for one in KINDS)


def test_the_split_is_by_names_alone() -> None:
    """The committed split is what the rule makes of the names, and a third of the kinds of each larger area is in the test part."""
    assert split.computed() == {
        table: {area: {name: split.part_of(table, area, name) for name in names} for area, names in areas.items()}
        for table, areas in split.computed().items()
    }
    for areas in split.computed().values():
        for area, parts in areas.items():
            share = list(parts.values()).count("test") / len(parts)
            assert len(parts) < 3 or 0.24 < share < 0.45, area


def test_every_code_is_brought_about() -> None:
    """Every rule has a fault that it is expected to find, and every code that is written down belongs to a rule."""
    codes = {rule.code for rule in RULES}
    assert {one.expected for one in KINDS} == codes
    assert {code for one in KINDS for code in one.also} <= codes
    assert {rule.code for rule in RULES if rule.severity == "info"} == INFORMATION


@pytest.mark.parametrize("name", sorted(QUICK))
def test_the_quick_ones_are_of_the_development_part(name: str) -> None:
    """What is run every day is not what is kept to test on."""
    assert name in chosen("*", "development")


def test_a_pattern_chooses() -> None:
    """By name, by part, and both."""
    assert chosen("llama/no-backward", "all") == ["llama/no-backward"]
    assert chosen("llama/no-backward", "test") == []
    assert set(chosen("*", "development")) | set(chosen("*", "test")) == set(SUBJECTS)
    assert set(chosen("*", "all", quick=True)) == QUICK


CHANGEABLE = ("arguments", "tokenizer", "mixins", "waveforms", "features", "rows", "batches", "models", "trainers", "collate")


def test_every_fault_changes_its_training() -> None:
    """An injection leaves its mark on the plan of the training: the healthy one is another."""
    for fault in FAULTS:
        changed = planned(fault.name)
        healthy = Training(changed.case)
        assert any(getattr(changed, what) != getattr(healthy, what) for what in CHANGEABLE), fault.name


class TestScore:
    """``llama/loss-without-shift``: ``labels-shifted`` is expected, ``loss-off`` is right as well."""

    NAME = "llama/loss-without-shift"

    def test_the_expected_one(self) -> None:
        """Counts as found and named at the step at which it first stood."""
        one = score(outcome(self.NAME, said("labels-shifted", "critical", 3), said("labels-shifted", "critical", 9, "changed")))
        assert (one.named_at, one.found_at, one.right, one.wrong) == (3, 3, {"labels-shifted"}, frozenset())

    def test_a_consequence(self) -> None:
        """Counts as found, not as named."""
        one = score(outcome(self.NAME, said("loss-off", "warning", 2)))
        assert (one.named_at, one.found_at, one.right) == (None, 2, {"loss-off"})

    def test_an_information(self) -> None:
        """Finds nothing where a warning is expected, and is never wrong."""
        one = score(outcome(self.NAME, said("labels-shifted", "info", 3), said("encoder-frozen", "info", 1)))
        assert (one.found_at, one.right, one.wrong) == (None, frozenset(), frozenset())

    def test_an_expected_information(self) -> None:
        """Is found at any severity."""
        assert score(outcome("whisper/encoder-frozen", said("encoder-frozen", "info", 1))).named_at == 1

    def test_something_else(self) -> None:
        """Is wrong, once a code, and told apart by severity."""
        one = score(
            outcome(
                self.NAME, said("audio-silent", "warning", 1), said("loss-not-finite", "critical", 2), said("audio-silent", "warning", 8)
            )
        )
        assert (one.found_at, one.wrong, one.critical) == (None, {"audio-silent", "loss-not-finite"}, {"loss-not-finite"})

    def test_a_closing_line(self) -> None:
        """Opens nothing."""
        assert score(outcome(self.NAME, said("labels-shifted", "critical", 3, "closed"))).found_at is None

    def test_before_the_fault(self) -> None:
        """A finding from before the fault does not find it, and steps count from the fault."""
        name = "llama/layer-explodes"
        assert score(outcome(name, said("activation-exploding", "warning", 14), onset=14)).found_at is None
        assert score(outcome(name, said("activation-exploding", "warning", 16), onset=14)).found_at == 2

    def test_a_healthy_run(self) -> None:
        """Whatever is said of it, short of an information, is wrong."""
        one = score(
            outcome("llama/plain", said("labels-shifted", "critical", 1), said("loss-off", "warning", 1), said("encoder-frozen", "info", 1))
        )
        assert (one.wrong, one.critical, one.found_at) == ({"labels-shifted", "loss-off"}, {"labels-shifted"}, None)


def scores() -> list[Score]:
    return [
        score(outcome("llama/loss-without-shift", said("labels-shifted", "critical", 3), said("audio-silent", "warning", 1))),
        score(outcome("llama/no-backward", said("part-without-gradient", "critical", 1))),
        score(outcome("whisper/loss-times-three")),
        score(outcome("llama/plain", said("labels-shifted", "critical", 1), said("loss-off", "warning", 1))),
        score(outcome("whisper/plain")),
    ]


def test_the_summary_counts() -> None:
    """Recall over faults, precision over all grave findings, and healthy runs with findings."""
    whole = summary(scores())
    assert (whole.faults, whole.found, whole.named, whole.right, whole.wrong) == (3, 2, 1, 2, 3)
    assert (whole.healthy, whole.healthy_critical, whole.healthy_warned, whole.steps) == (2, 1, 1, 2)
    assert whole.recall == pytest.approx(2 / 3)
    assert whole.precision == pytest.approx(2 / 5)
    nothing = summary([])
    assert nothing.recall is nothing.precision is nothing.steps is None


def test_the_page_tells_what_went_wrong() -> None:
    """The missed fault stands in its table, the healthy run with a finding in its, and the remarks on top."""
    text = page(scores(), remarks="Something was changed afterwards.")
    missed, wrong = text.split("## Missed")[1].split("## Not right")[0], text.split("## Not right")[1].split("## Every fault")[0]
    assert "whisper/loss-times-three" in missed and "llama/no-backward" not in missed
    assert "llama/plain" in wrong and "whisper/plain" not in wrong
    assert "| llama" not in missed
    assert "Something was changed afterwards." in text
    assert "2 (66.7 %)" in text


def test_the_page_tells_which_runs_ended_early() -> None:
    """A run that failed is not taken for a healthy one in silence."""
    failed = Outcome("whisper/plain", 3, 0, (), (), ("record: switched off: ValueError",), "RuntimeError: no", 1.0)
    text = page([score(failed)]).split("## Ended early")[1]
    assert "| `whisper/plain` | 3 | RuntimeError: no; record: switched off: ValueError |" in text
    assert "Ended early" not in page(scores())


def test_a_kind_is_called_like_its_function() -> None:
    """Names and notes are taken from the injection."""

    def some_fault(training: object) -> None:
        """Something breaks."""

    one = kind("area", "loss-off", some_fault, "llama", also=["labels-shifted"])
    assert (one.name, one.note, one.models, one.also) == ("some-fault", "Something breaks.", ("llama",), {"labels-shifted"})
