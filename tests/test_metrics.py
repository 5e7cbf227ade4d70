"""The catalogue of metrics."""

from __future__ import annotations

from pathlib import Path

import pytest

from probe.errors import ProbeValueError
from probe.metrics import CATALOGUE, HEADLINE_LIMIT, KINDS, describe, headline, markdown_table
from records_factory import speech_record, whisper_record

pytestmark = pytest.mark.pure  # of torch and probe alone: the same with every transformers

PAGE = Path(__file__).parents[1] / "docs" / "metrics.md"


def every_headline() -> list[str]:
    return [metric.name for metric in CATALOGUE if metric.headline and not metric.is_pattern]


def test_names_are_unique_and_every_entry_is_filled() -> None:
    """Each metric is there once, with unit, range, definition and source."""
    names = [metric.name for metric in CATALOGUE]
    assert len(set(names)) == len(names)
    for metric in CATALOGUE:
        assert metric.name.startswith("probe/")
        assert all((metric.unit, metric.range, metric.definition, metric.source)), metric.name


def test_what_the_contract_names_is_there() -> None:
    """Every metric of the contract that is measured so far is documented."""
    for modality in ("text", "audio"):
        for what in ("loss", "token_accuracy", "top5_accuracy", "entropy"):
            assert describe(f"probe/{modality}/{what}").name == f"probe/{modality}/{what}"
        assert describe(f"probe/feed_forward/{modality}_token_share")
    shape = ("entropy", "entropy_nats", "effective_keys", "top", "first_token", "padding", "sink", "distance", "monotonicity", "coverage")
    for what in shape:
        assert describe(f"probe/attention/{what}").name == f"probe/attention/{what}"
        for kind in ("encoder", "decoder", "cross", "joint"):
            assert describe(f"probe/attention/{kind}/{what}").name == f"probe/attention/<kind>/{what}"
    for what in ("text_to_audio", "audio_to_text", "text_to_reference", "text_to_text", "audio_to_audio", "audio_to_reference"):
        assert describe(f"probe/attention/{what}")
        assert describe(f"probe/attention/joint/{what}").name == f"probe/attention/<kind>/{what}"
    assert describe("probe/attention/cross/band")
    for what in ("rms", "time_std", "batch_std", "nonfinite", "calls", "gradient_norm"):
        assert describe(f"probe/audio_encoder/{what}")
    for what in ("padding_share", "labels_masked_share", "ids_outside_vocabulary", "audio_clips", "audio_clips_constant", "samples"):
        assert describe(f"probe/input/{what}")
    for name in ("probe/loss", "probe/projector/rms", "probe/grad/norm", "probe/learning_rate", "probe/step"):
        assert describe(name).name == name


def test_patterns_resolve() -> None:
    """A concrete name finds its pattern, a pattern finds itself, and neither swallows more than it says."""
    assert describe("probe/audio/codebook_11/token_accuracy").name == "probe/audio/codebook_K/token_accuracy"
    assert describe("probe/audio/codebook_K/loss").name == "probe/audio/codebook_K/loss"
    assert describe("probe/grad/audio_encoder/norm").name == "probe/grad/<part>/norm"
    assert describe("probe/grad/norm").name == "probe/grad/norm"
    for wrong in ("probe/audio/codebook_x/loss", "probe/grad/a/b/norm", "probe/attention/other/entropy", "probe/loss ", "xprobe/loss"):
        with pytest.raises(ProbeValueError):
            describe(wrong)


def test_unknown_name_names_the_nearest() -> None:
    """A slip in a name is answered with what was probably meant, also among the names of a pattern."""
    with pytest.raises(ProbeValueError, match="probe/text/token_accuracy"):
        describe("probe/text/token_acuracy")
    with pytest.raises(ProbeValueError, match="probe/attention/cross/entropy"):
        describe("probe/attention/cros/entropy")


def test_every_metric_of_a_record_is_documented() -> None:
    """The hand-made records use public names only."""
    for record in (whisper_record(), speech_record()):
        for name in record.metrics:
            describe(name)


def test_headline_takes_the_most_important() -> None:
    """At most 24 enter the log, in the catalogue's order; a lesser one gives way to a greater one, never the other way."""
    parts = {f"probe/grad/part_{index:02d}/norm": float(index) for index in range(40)}
    metrics = {**parts, **dict.fromkeys(reversed(every_headline()), 0.5)}
    chosen = list(headline(metrics))
    assert len(chosen) == HEADLINE_LIMIT == 24
    assert chosen[: len(every_headline())] == every_headline()[:24]
    few = headline({**parts, "probe/loss": 1.0})
    assert len(few) == 24
    assert list(few)[:2] == ["probe/loss", "probe/grad/part_00/norm"]


def test_every_plain_headline_has_room() -> None:
    """The fixed names alone never push each other out, and the kinds of attention of any model fit beside them."""
    assert len(every_headline()) + 2 <= HEADLINE_LIMIT


def test_headline_takes_nothing_else() -> None:
    """What is not headline, or not in the catalogue, stays in the record; values go through as they are."""
    metrics = {"probe/audio/codebook_0/loss": 1.0, "probe/text/top5_accuracy": 0.3, "mine": 1.0, "probe/step": 3.0, "probe/text/loss": 0.25}
    assert headline(metrics) == {"probe/text/loss": 0.25}
    assert headline({}) == {}
    kinds = {f"probe/attention/{kind}/entropy": 0.1 for kind in reversed(KINDS)}
    assert list(headline(kinds)) == [f"probe/attention/{kind}/entropy" for kind in KINDS]


def test_the_page_is_up_to_date() -> None:
    """``docs/metrics.md`` is what the catalogue says."""
    assert PAGE.read_text(encoding="utf-8") == markdown_table(), "run: python -m probe.metrics > docs/metrics.md"


def test_the_page_is_one_table() -> None:
    """Every row has as many cells as the head, whatever a definition holds."""
    rows = [line.replace(r"\|", "") for line in markdown_table().splitlines() if line.startswith("|")]
    assert {row.count("|") for row in rows} == {7}
    assert len(rows) == len(CATALOGUE) + 2
