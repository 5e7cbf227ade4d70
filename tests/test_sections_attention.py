"""What the section "Shared attention" shows of hand-made records."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import get_args

import pytest

from probe.records import Attention, AttentionKind
from probe.sections import attention
from probe.sections.blocks import Fact, Facts, Section, Table
from records_factory import NO_BRANCHES, speech_record, text_record, whisper_record

pytestmark = pytest.mark.pure  # of torch and probe alone: the same with every transformers

MEASURED = {
    "entropy": 0.791,
    "entropy_nats": 3.56,
    "top": 0.99912,
    "effective_keys": 1234.56,
    "first_token": 0.05,
    "padding": 0.00005,
    "sink": 0.99912,
    "band": 0.123,
    "distance": 1234.56,
    "monotonicity": -0.25,
    "coverage": 0.99912,
    "text_to_text": 0.5,
    "text_to_audio": 0.00005,
    "text_to_reference": 0.00005,
    "audio_to_text": 0.99912,
    "audio_to_audio": 0.4,
    "audio_to_reference": 0.2,
}


def fact(section: Section, label: str) -> Fact:
    rows = [row for block in section.blocks if isinstance(block, Facts) for row in block.rows if row.label.strip() == label]
    assert len(rows) == 1, (label, rows)
    return rows[0]


def table(section: Section, title: str) -> Table:
    found = [block for block in section.blocks if isinstance(block, Table) and title in block.title]
    assert len(found) == 1, title
    return found[0]


def column(block: Table, name: str) -> list[str]:
    index = [column.name for column in block.columns].index(name)
    return [row[index] for row in block.rows]


def heads(block: Table) -> list[str]:
    return [column.name for column in block.columns]


def layer(kind: AttentionKind, site: str = "model.decoder.layers.1.encoder_attn", **values: float | None) -> Attention:
    return Attention(site, kind, "recomputed from q and k", 1, 8, 100, 64, **{**MEASURED, **values})


def test_every_layer_of_a_small_model() -> None:
    """Up to twelve layers of a kind each have a row, under the number that tells them apart; columns that say nothing are left out."""
    section = attention.section(whisper_record())
    cross = table(section, "Cross-attention")
    assert column(cross, "layer") == ["mean of 4", "0", "1", "2", "3"]
    assert heads(cross) == ["layer", "entropy", "eff. keys", "top", "band", "monotone", "coverage", "first key"], "no mass is on padding"
    assert cross.rows[0][1] == "0.930"
    assert cross.rows[2] == ("1", "0.791", "16.5", "21.6 %", "30.0 %", "0.88", "70.0 %", "5.0 %")
    assert cross.caption.startswith("model.decoder.layers.*.encoder_attn: 6 heads, 1,500 keys, 128 rows in 2 calls")
    assert cross.caption.endswith("recomputed from q and k")
    assert column(table(section, "Encoder self-attention"), "layer") == ["0", "1", "2", "3"]
    assert fact(section, "text → audio").value == "100 % of the probability"
    assert fact(section, "Entropy").value == "0.812 of uniform, 4.02 nats"
    assert fact(section, "Dual feed-forward").value == f"not measured: {NO_BRANCHES}"


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("joint", ["text→audio", "audio→text", "text→ref", "monotone", "coverage"]),
        ("cross", ["top", "band", "monotone", "coverage"]),
        ("decoder", ["top", "band", "distance"]),
        ("encoder", ["top", "band", "distance"]),
    ],
)
def test_each_kind_has_the_columns_that_tell_of_it(kind: AttentionKind, expected: list[str]) -> None:
    """Shape first, then what the kind is about, then where mass is lost; written as a person reads it."""
    block = table(attention.section(text_record(attention=(layer(kind, sink=None),))), "ttention")
    assert heads(block) == ["layer", "entropy", "eff. keys", *expected, "first key", "padding"]
    written = dict(zip(heads(block), block.rows[0]))
    assert (written["entropy"], written["eff. keys"], written.get("band", "12.3 %")) == ("0.791", "1234.6", "12.3 %")
    assert written.get("monotone", "-0.25") == "-0.25"
    assert written.get("distance", "1234.6") == "1234.6"


@pytest.mark.parametrize("kind", get_args(AttentionKind))
@pytest.mark.parametrize("layers", [1, 12, 40])
def test_tables_fit_120_columns(kind: AttentionKind, layers: int) -> None:
    """Whatever was measured, the widest cells side by side take at most 120 columns, with room to say what a layer is shown as."""
    name = "model.decoder.layers.{}.attn" if layers == 1 else "model.decoder.layers.{}.encoder_attn"
    rows = tuple(layer(kind, name.format(index), sink=None) for index in range(layers))
    metrics = {f"probe/attention/{kind}/{what}": value for what, value in MEASURED.items()}
    block = table(attention.section(text_record(attention=rows, metrics=metrics)), "ttention")
    fixed = [index for index, column in enumerate(block.columns) if not column.flexible]
    widths = [max(len(row[index]) for row in (heads(block), *block.rows)) for index in fixed]
    assert sum(widths) + 2 * len(block.columns) + 8 * (len(fixed) < len(block.columns)) <= 120


def test_means_of_a_kind_are_those_of_the_metrics() -> None:
    """The row of means shows the metrics of the kind, "-" where there is none."""
    rows = (layer("cross", "layers.0.attn"), layer("cross", "layers.1.attn"))
    metrics = {"probe/attention/cross/entropy": 0.25, "probe/attention/cross/coverage": 0.5}
    block = table(attention.section(text_record(attention=rows, metrics=metrics)), "Cross")
    shown = dict(zip(heads(block), block.rows[0]))
    assert (shown["layer"], shown["entropy"], shown["coverage"], shown["band"]) == ("mean of 2", "0.250", "50.0 %", "-")


def test_the_overall_numbers() -> None:
    """What holds for the model as a whole stands above the tables, each number with what it is."""
    metrics = {f"probe/attention/{what}": value for what, value in MEASURED.items()}
    section = attention.section(text_record(attention=(layer("joint"),), metrics=metrics, not_measured={}))
    assert fact(section, "Entropy").value == "0.791 of uniform, 3.56 nats, 1234.6 effective keys"
    assert fact(section, "text → reference").value == "0.005 % of the probability"
    assert fact(section, "audio → reference").value == "20.0 % of the probability"
    assert fact(section, "learned sink").value == "99.912 % of the probability"
    assert fact(section, "monotonicity").value == "-0.25 (text rows over audio, -1 … 1)"
    assert fact(section, "coverage").value == "99.912 % of the audio that text rows can see"


def test_many_layers_are_summarised() -> None:
    """Of 64 layers those stand out that are extreme; an independent look finds the same."""
    rng = random.Random(3)
    fields = ("entropy", "first_token", "text_to_audio", "monotonicity", "coverage")
    empty = dict.fromkeys(MEASURED)
    layers = tuple(layer("joint", f"layers.{index}.attn", **{**empty, **{what: rng.random() for what in fields}}) for index in range(64))
    section = attention.section(text_record(attention=layers, metrics={"probe/attention/joint/entropy": 0.5}))
    joint = table(section, "Joint attention")
    shown = dict(zip(column(joint, "layer"), column(joint, "shown as")))
    assert joint.footer == "64 layers, every one in the record"
    for words, what, best in (
        ("lowest entropy", "entropy", min),
        ("highest entropy", "entropy", max),
        ("most on first token", "first_token", max),
        ("least text → audio", "text_to_audio", min),
        ("most text → audio", "text_to_audio", max),
        ("least monotone", "monotonicity", min),
        ("least coverage", "coverage", min),
    ):
        values = [getattr(row, what) for row in layers]
        assert words in shown[str(values.index(best(values)))]
    assert shown["mean of 64"] == ""
    assert len(shown) <= 8
    assert "padding" not in heads(joint)


def test_layers_without_common_name() -> None:
    """Layers that no number tells apart keep their full names; one with next to nothing measured still has its row."""
    layers = (Attention("a.attn", "decoder", "x", 1), Attention("b.2.attn", "decoder", "y", 0, entropy=0.5))
    rows = table(attention.section(text_record(attention=layers)), "Decoder")
    assert column(rows, "layer") == ["a.attn", "b.2.attn"]
    assert column(rows, "entropy") == ["-", "0.500"]
    assert "0 … 1 calls a layer; x, y" in rows.caption


def test_metrics_missing_for_one_reason_are_said_once() -> None:
    """Of many metrics that lack for the same reason one line is made, and none is forgotten that lacks for another."""
    reason = "the decoder reads the audio through cross-attention"
    names = ("text_to_audio", "audio_to_text", "text_to_text", "audio_to_audio", "monotonicity")
    record = whisper_record(
        metrics={"probe/attention/entropy": 0.5},
        not_measured={
            **{f"probe/attention/{name}": reason for name in names},
            "probe/attention/padding": "no mask",
            "probe/attention/coverage": "no rows",
            "probe/attention/cross/padding": "no mask of the encoder",
        },
    )
    section = attention.section(record)
    values = [row.value for block in section.blocks if isinstance(block, Facts) for row in block.rows]
    assert sum(reason in value for value in values) == 1
    assert fact(section, "text → audio and 4 more").value == f"not measured: {reason}"
    assert fact(section, "padding").value == "not measured: no mask"
    assert fact(section, "coverage").value == "not measured: no rows"
    assert fact(section, "probe/attention/cross/padding").value == "not measured: no mask of the encoder"


def test_a_speech_model_of_many_layers() -> None:
    """The hand-made speech record is summarised, and the layers' own numbers are those of the record."""
    record = speech_record()
    joint = table(attention.section(replace(record, attention=record.attention)), "Joint")
    by_number = {row.site.split(".")[3]: row for row in record.attention}
    for row in joint.rows[1:]:
        assert row[1] == f"{by_number[row[0]].entropy:.3f}"
