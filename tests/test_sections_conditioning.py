from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from probe.records import Counterfactual, Effect, Modality, SampleEffect, StepRecord, Verdict
from probe.sections import verification
from probe.sections.blocks import Block, Fact, Facts, Table
from probe.sections.conditioning import ADAPTATION, CONSISTENCY, EFFECTIVENESS, GROUPS, TABLE, conditioning_blocks
from probe.sections.reasons import VERIFICATION, Reasons
from records_factory import speech_record, whisper_record

pytestmark = pytest.mark.pure  # of torch and probe alone: the same with every transformers

NEXT = "the counterfactual passes run every 500 steps (next: 1000)"


def effect(what: Any, modality: Modality = "audio", **changes: Any) -> Effect:
    made = Effect(what, modality, 8, 640, 2.5, 0.3214, 0.0211, 0.875, 0.01234, 64)
    return replace(made, **changes)


def sample(index: int, group: str, swap: float, *, modality: Modality = "audio", tokens: int = 10) -> SampleEffect:
    return SampleEffect(index, modality, group, tokens, 2.0, 2.0 + swap, 2.5, 1.9)


def passes(*effects: Effect, **changes: Any) -> Counterfactual:
    return replace(Counterfactual(("input_features",), effects, (), 41.27), **changes)


def verdict(use: Any = "used", modality: Modality = "audio", **evidence: float) -> Verdict:
    return Verdict(use, modality, 5, "extra nats a token: 0.300 ± 0.020", evidence)


def blocks(record: StepRecord) -> tuple[Block, ...]:
    return conditioning_blocks(record, Reasons(record, VERIFICATION))


def facts(record: StepRecord) -> dict[str, Fact]:
    rows = [row for block in blocks(record) if isinstance(block, Facts) for row in block.rows]
    assert len({row.label for row in rows}) == len(rows)
    return {row.label.strip(): row for row in rows}


def table(record: StepRecord, title: str) -> Table:
    (found,) = [block for block in blocks(record) if isinstance(block, Table) and block.title == title]
    assert {len(row) for row in found.rows} == {len(found.columns)}
    return found


def measured(*effects: Effect, reasons: dict[str, str] | None = None, verdict: Verdict | None = None, **changes: Any) -> StepRecord:
    return speech_record(counterfactual=passes(*effects, **changes), not_measured=reasons or {}, verdict=verdict)


def test_a_step_without_passes_answers_with_the_reason() -> None:
    """Each of the three old questions is answered: not measured, and why; nothing else is shown."""
    record = speech_record(not_measured={"counterfactual": NEXT, "probe/reference/win_rate": NEXT})
    assert list(facts(record)) == [EFFECTIVENESS, CONSISTENCY, ADAPTATION]
    assert {row.value for row in facts(record).values()} == {f"not measured: {NEXT}"}
    assert {row.tone for row in facts(record).values()} == {"missing"}
    assert not [block for block in blocks(record) if isinstance(block, Table)]
    assert "Also missing" not in [block.title for block in verification.section(record).blocks if isinstance(block, Facts)]


def test_a_verdict_stands_at_steps_without_passes_too() -> None:
    """It is pooled over earlier passes, and so is its win rate."""
    record = speech_record(not_measured={"counterfactual": NEXT}, verdict=verdict(win_rate=0.9375))
    assert facts(record)[EFFECTIVENESS] == Fact(EFFECTIVENESS, "used (audio tokens, 5 passes): extra nats a token: 0.300 ± 0.020")
    assert facts(record)[CONSISTENCY].value.startswith("93.8 % of samples are predicted better with their own audio")
    assert facts(record)[CONSISTENCY].value.endswith("(audio tokens, 5 passes)")
    assert facts(record)[ADAPTATION].value == f"not measured: {NEXT}"


@pytest.mark.parametrize(
    ("use", "modality", "tone"),
    [
        ("used", "audio", "plain"),
        ("weak", "text", "warning"),
        ("ignored", "audio", "critical"),
        ("ignored", "text", "warning"),
        ("leaked", "audio", "critical"),
    ],
)
def test_the_tone_is_the_verdicts(use: Any, modality: Modality, tone: str) -> None:
    """A cloner that ignores its reference, and a leak, are critical; what may be a matter of the data is a warning."""
    shown = facts(speech_record(verdict=verdict(use, modality)))[EFFECTIVENESS]
    assert (shown.tone, shown.value.split(" ")[0]) == (tone, use)


def test_a_verdict_without_passes_counts_none() -> None:
    """A leak that is read off codes needs no pass."""
    record = speech_record(verdict=replace(verdict("leaked"), passes=0))
    assert facts(record)[EFFECTIVENESS].value.startswith("leaked (audio tokens): ")


def test_the_verdicts_reason_comes_before_that_of_the_step() -> None:
    """Where passes are made but are too few, that is why there is no verdict."""
    record = speech_record(not_measured={"counterfactual": NEXT, "verdict": "1 pass so far"})
    assert facts(record)[EFFECTIVENESS].value == "not measured: 1 pass so far"
    assert facts(record)[CONSISTENCY].value == f"not measured: {NEXT}"


def test_the_table_of_changes() -> None:
    """One row for each change and modality, with its error, win rate and divergence; what is not known is a dash."""
    record = measured(
        effect("swap"),
        effect("swap", "text", tokens=37, delta_loss=-0.0004, delta_loss_error=None, win_rate=None, divergence=None),
        effect("reverse", delta_loss=None, samples=0, tokens=0, win_rate=None),
        reasons={"counterfactual/text/samples": "the labels are joined", "counterfactual/silence": "no silence code"},
    )
    shown = table(record, TABLE)
    assert shown.rows == (
        ("another sample's", "audio", "8", "640", "+0.321 ± 0.021", "87.5 %", "0.0123"),
        ("another sample's", "text", "8", "37", "-0.000", "-", "-"),
        ("reversed in time", "audio", "0", "0", "-", "-", "0.0123"),
    )
    assert "audio 2.500, text 2.500" in shown.caption
    assert shown.footer == "better with own: not measured: the labels are joined"
    assert facts(record)["with silence"] == Fact("  with silence", "not measured: no silence code", "missing")
    assert "Also missing" not in [block.title for block in verification.section(record).blocks if isinstance(block, Facts)]
    assert "with another sample's" not in facts(record)


def test_win_rate_of_this_step_where_there_is_no_verdict() -> None:
    """Audio tokens come before text; without any the text counts."""
    both = measured(effect("swap", "text", win_rate=0.5), effect("swap"))
    assert facts(both)[CONSISTENCY].value.startswith("87.5 % of 8 samples predicted better with their own audio")
    assert facts(both)[CONSISTENCY].value.endswith("(audio tokens)")
    text = measured(effect("swap", "text", win_rate=0.5), effect("swap", tokens=0))
    assert facts(text)[CONSISTENCY].value.endswith("(text tokens)")
    none = measured(effect("silence"), reasons={"counterfactual/swap": "the batch holds one sample"})
    assert facts(none)[CONSISTENCY] == Fact(CONSISTENCY, "not measured: the batch holds one sample", "missing")
    joined = measured(effect("swap", win_rate=None), reasons={"probe/reference/win_rate": "joined"})
    assert facts(joined)[CONSISTENCY].value == "not measured: joined"


def test_by_language() -> None:
    """With two groups or more: how far apart they are, and a row for each, of the audio tokens."""
    samples = (
        sample(0, "en", 0.5),
        sample(1, "de", 0.1),
        sample(2, "en", 0.3, tokens=30),
        sample(3, "", 9.0),
        sample(0, "en", 7.0, modality="text"),
    )
    record = measured(effect("swap"), samples=samples)
    assert facts(record)[ADAPTATION].value == "another's audio costs from +0.100 (de) to +0.350 nats a token (en), 2 groups"
    shown = table(record, GROUPS)
    assert shown.rows == (
        ("de", "1", "2.000", "+0.100", "+0.500", "-0.100", "100 %"),
        ("en", "2", "2.000", "+0.350", "+0.500", "-0.100", "100 %"),
    )
    assert shown.caption.startswith("audio tokens")
    assert not shown.footer


def test_many_groups_are_cut_and_counted() -> None:
    """Twelve are shown, the others are in the record."""
    shown = table(measured(effect("swap"), samples=tuple(sample(index, f"l{index:02}", 0.1) for index in range(15))), GROUPS)
    assert len(shown.rows) == 12
    assert shown.footer == "and 3 groups more in the record"


@pytest.mark.parametrize(
    ("samples", "reasons", "said"),
    [
        ((sample(0, "en", 0.1), sample(1, "en", 0.2)), {}, "all samples of this step are of the group 'en'"),
        ((sample(0, "", 0.1),), {}, "no sample carries a group (a language token, or the column that Settings.group_by names)"),
        ((sample(0, "", 0.1),), {"counterfactual/groups": "no column 'lang'"}, "no column 'lang'"),
        (
            (replace(sample(0, "en", 0), swap=None), replace(sample(1, "de", 0), swap=None)),
            {"counterfactual/swap": "one clip"},
            "one clip",
        ),
    ],
)
def test_groups_that_say_nothing_say_why(samples: tuple[SampleEffect, ...], reasons: dict[str, str], said: str) -> None:
    """One group, none, a column that is not there, no swap."""
    record = measured(effect("silence"), samples=samples, reasons=reasons)
    assert facts(record)[ADAPTATION] == Fact(ADAPTATION, f"not measured: {said}", "missing")


def test_the_cost_has_its_own_line() -> None:
    """With what was changed; or why it is not known."""
    assert facts(measured(effect("swap")))["Cost of the passes"].value == "41.27 ms on this rank; changed: input_features"
    unknown = measured(effect("swap"), cost_ms=None, reasons={"probe/reference/cost_ms": "this rank made no pass"})
    assert facts(unknown)["Cost of the passes"] == Fact("Cost of the passes", "not measured: this rank made no pass", "missing")


def test_it_opens_the_verification() -> None:
    """The answers stand before the encoder's state."""
    section = verification.section(whisper_record(counterfactual=passes(effect("swap", "text")), verdict=verdict("used", "text")))
    labels = [row.label.strip() for block in section.blocks if isinstance(block, Facts) for row in block.rows]
    assert labels.index(EFFECTIVENESS) == 0
    assert labels.index("Audio encoder") > labels.index("Cost of the passes")
