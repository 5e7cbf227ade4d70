"""How the sums of attention layers become rows, metrics and reasons."""

from __future__ import annotations

import math
from dataclasses import fields
from typing import Any

import numpy as np
import pytest

from probe.assemble.attention import attention
from probe.assemble.draft import Draft, RunContext
from probe.assemble.text import Decoder
from probe.capture.cells import CellValues
from probe.measure.quantities import COLUMNS, QUANTITIES, SHAPE, weight_of
from probe.merge.packing import HostStep
from probe.records import Attention, AttentionKind, HeadwiseAttention, Site
from probe.sites.discovery import SiteMap

pytestmark = pytest.mark.pure  # of torch and probe alone: the same with every transformers


def cell(mismatch: float = -math.inf, **values: tuple[float, float]) -> CellValues:
    """The cell of a layer in which each quantity named has a sum and a weight."""
    sums = dict.fromkeys(COLUMNS, 0.0)
    for what, (total, weight) in values.items():
        sums[what], sums[weight_of(what)] = total, weight
    sums["sampled"] = 7.0 if values else 0.0
    return CellValues({"calls": 2.0}, sums, {"mismatch": mismatch})


def assembled(layers: dict[str, tuple[AttentionKind, CellValues]], **host: Any) -> tuple[tuple[Attention, ...], Draft]:
    sites = tuple(Site(name, "attention", "", kind) for name, (kind, _) in layers.items())
    facts = {f"attention:{name}": (2, 10, "recomputed from q and k") for name in layers}
    cells = {f"attention:{name}": values for name, (_, values) in layers.items()}
    step = HostStep(cells, host.get("local", {}), {**facts, **host.get("facts", {})}, host.get("reasons", {}))
    run = RunContext(SiteMap(sites, {}), None, (), 1, Decoder([], print))  # type: ignore[arg-type]
    draft = Draft(step, run, blind=host.get("blind", {}))
    return attention(draft), draft


def every(weight: float) -> dict[str, tuple[float, float]]:
    return {what: (weight * (index + 1), weight) for index, what in enumerate(QUANTITIES)}


def test_quantities_and_records_have_the_same_names() -> None:
    """What is measured is what the record has room for, of a layer and of each head."""
    assert set(QUANTITIES) == {field.name for field in fields(HeadwiseAttention)}
    assert set(QUANTITIES) < {field.name for field in fields(Attention)}


def test_a_layer_is_its_sums_by_their_weights() -> None:
    """Each value is its own sum by its own weight; without weight it is not there."""
    ((row,), _) = assembled({"a": ("joint", cell(**every(4.0)))})
    assert [getattr(row, what) for what in QUANTITIES] == [float(index + 1) for index in range(len(QUANTITIES))]
    assert (row.calls, row.heads, row.keys, row.rows, row.how) == (2, 2, 10, 7, "recomputed from q and k")
    ((row,), _) = assembled({"a": ("joint", cell(top=(1.0, 2.0)))})
    assert [what for what in QUANTITIES if getattr(row, what) is not None] == ["top"]


def test_heads_are_divided_by_this_ranks_own_weights() -> None:
    """Per head, only what was measured of each head is there, by the weights of this rank, not of all."""
    own = np.zeros(len(COLUMNS))
    for what in QUANTITIES:
        own[COLUMNS.index(weight_of(what))] = 2.0
    own[COLUMNS.index(weight_of("sink"))] = 0.0
    each = np.arange(2.0 * len(QUANTITIES)).reshape(-1, 2)
    local = {"own:attention:a": own, "heads:attention:a": each}
    ((row,), _) = assembled({"a": ("joint", cell(**every(100.0)))}, local=local, facts={"headwise:attention:a": SHAPE})
    assert row.per_head is not None
    for index, what in enumerate(QUANTITIES):
        measured = what in SHAPE and what != "sink"
        assert getattr(row.per_head, what) == ((index, index + 0.5) if measured else ()), what


def test_metrics_are_means_over_layers() -> None:
    """Overall over all layers, per kind over those of the kind; the modality matrix overall is of joint layers."""
    layers: dict[str, tuple[AttentionKind, CellValues]] = {
        "a": ("joint", cell(entropy=(0.2, 1.0), text_to_audio=(0.1, 1.0), band=(0.5, 1.0), distance=(3.0, 1.0), coverage=(0.4, 1.0))),
        "b": ("joint", cell(entropy=(0.4, 1.0), text_to_audio=(0.3, 1.0), band=(0.7, 1.0), text_to_reference=(0.2, 1.0))),
        "c": ("cross", cell(entropy=(0.9, 1.0), text_to_audio=(1.0, 1.0), sink=(0.5, 1.0), coverage=(0.8, 1.0), monotonicity=(-1.0, 1.0))),
    }
    _, draft = assembled(layers)
    expected = {
        "entropy": 0.5, "text_to_audio": 0.2, "text_to_reference": 0.2, "distance": 3.0, "sink": 0.5, "coverage": 0.6, "monotonicity": -1.0,
        "joint/entropy": 0.3, "joint/band": 0.6, "cross/text_to_audio": 1.0, "cross/coverage": 0.8, "cross/sink": 0.5,
    }  # fmt: skip
    for what, value in expected.items():
        assert draft.metrics[f"probe/attention/{what}"] == pytest.approx(value), what
    assert "probe/attention/band" not in draft.metrics, "the band of cross-attention is another than that of self-attention"
    assert "probe/attention/audio_to_reference" in draft.reasons


@pytest.mark.parametrize("mismatch", [0.051, 3.0, math.inf])
def test_a_kernel_that_computes_something_else_gets_no_numbers(mismatch: float) -> None:
    """Where the kernel's output is not that of the recomputed rows, its layer has a reason and nothing else, other layers their numbers."""
    layers: dict[str, tuple[AttentionKind, CellValues]] = {
        "a": ("decoder", cell(mismatch, entropy=(0.2, 1.0))),
        "b": ("decoder", cell(0.004, entropy=(0.4, 1.0))),
    }
    (row, checked), draft = assembled(layers)
    assert row == Attention("a", "decoder", "recomputed from q and k", 2, 2, 10)
    assert "computes something else than softmax(q·kᵀ) v" in draft.reasons["attention:a"]
    assert ("not finite" in draft.reasons["attention:a"]) == math.isinf(mismatch)
    assert checked.how == "recomputed from q and k, checked against the kernel's output (0.4 %)"
    assert draft.metrics["probe/attention/entropy"] == 0.4
    assert "attention:b" not in draft.reasons
    _, alone = assembled({"a": layers["a"]})
    assert alone.reasons["probe/attention/entropy"] == alone.reasons["attention:a"] == draft.reasons["attention:a"]


def test_reasons() -> None:
    """Each number that is not there says why, the nearest reason first."""
    late, mute = "known only after it had run", "over the budget"
    _, draft = assembled({"a": ("joint", cell(entropy=(1.0, 1.0)))}, reasons={"attention:a/per_head": late})
    assert draft.reasons["probe/attention/monotonicity"] == late
    assert draft.reasons["probe/attention/text_to_audio"] == "no sampled row of this kind could see such a key in this step"
    _, draft = assembled({"a": ("joint", cell(entropy=(1.0, 1.0)))}, reasons={"attention:a/modality": mute})
    assert draft.reasons["probe/attention/coverage"] == draft.reasons["probe/attention/text_to_audio"] == mute
    why = "the model predicts no audio"
    _, draft = assembled({"a": ("joint", cell(entropy=(1.0, 1.0)))}, reasons={"probe/attention/text_to_reference": why})
    assert draft.reasons["probe/attention/text_to_reference"] == why
    _, draft = assembled({"a": ("joint", cell(entropy=(1.0, 1.0)))}, reasons={"probe/attention/coverage": why})
    assert draft.reasons["probe/attention/coverage"] == why != draft.reasons["probe/attention/monotonicity"]
    _, draft = assembled({"a": ("decoder", cell(entropy=(1.0, 1.0)))})
    assert draft.reasons["probe/attention/coverage"] == "no attention layer has text rows over audio keys"
    assert "probe/attention/sink" not in draft.reasons, "a layer without a sink lacks nothing"
    _, draft = assembled({"a": ("cross", cell())}, reasons={"attention:a": "its kernel returned no weights"})
    for what in ("entropy", "top", "distance", "coverage"):
        assert draft.reasons[f"probe/attention/{what}"] == "its kernel returned no weights", what
    _, draft = assembled({"a": ("cross", cell())}, blind={"attention": "switched off"})
    assert draft.reasons["probe/attention/monotonicity"] == "switched off"
