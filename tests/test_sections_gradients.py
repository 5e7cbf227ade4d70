"""What is shown of gradient flow, of hand-made records: the answer in one sentence, the parts, the layers that stand out."""

from __future__ import annotations

import math
import random
from dataclasses import replace
from typing import Any

import pytest

from probe.records import Optimisation, Part, StepRecord
from probe.sections import verification
from probe.sections.blocks import Fact, Facts, Section, Table
from records_factory import whisper_record

pytestmark = pytest.mark.pure  # of torch and probe alone: the same with every transformers

ENCODER = Part("audio_encoder", 1_000, 1.0, 0, 0.5, 10, 0.25, False, 500, 0.0, 2e-3, 0.0, 0.1, "float32")
REST = Part("rest", 4_000, 0.5, 0, 1.5, 20, 0.75, False, 700, 0.25, 1e-3, 0.0, 0.1, "float32")
FROZEN = Part("projector", 400, 0.0)


def record(*parts: Part, reasons: dict[str, str] | None = None, **changes: Any) -> StepRecord:
    made = whisper_record(parts=parts, **changes)
    return replace(made, not_measured={**made.not_measured, **(reasons or {})})


def fact(section: Section, label: str) -> Fact:
    (found,) = [row for block in section.blocks if isinstance(block, Facts) for row in block.rows if row.label == label]
    return found


def table(section: Section, title: str) -> Table:
    (found,) = [block for block in section.blocks if isinstance(block, Table) and title in block.title]
    return found


def flow(*parts: Part, **changes: Any) -> Fact:
    return fact(verification.section(record(*parts, **changes)), "Gradient flow")


def test_it_flows() -> None:
    """Where every part that trains got a gradient, that is said with the numbers behind it."""
    found = flow(ENCODER, REST, FROZEN)
    assert found.value == "reached all 2 parts that train (30 of 30 tensors); the step moved weights by 0.001 … 0.002 of their size"
    assert found.tone == "plain"
    without_update = [replace(part, update_ratio=None) for part in (ENCODER, REST)]
    assert flow(*without_update).value == "reached all 2 parts that train (30 of 30 tensors)"
    assert flow(replace(REST, without_gradient=4), FROZEN).value.startswith("reached 1 part that train (16 of 20 tensors)")


@pytest.mark.parametrize(
    ("parts", "words", "tone"),
    [
        ((FROZEN,), "none: nothing trains, every parameter is frozen", "warning"),
        (
            (replace(ENCODER, without_gradient=10, gradient_norm=None), replace(REST, without_gradient=20, gradient_norm=None)),
            "none: not one of the 30 tensors that train has a gradient after the backward",
            "critical",
        ),
        (
            (replace(ENCODER, without_gradient=10, gradient_norm=None), REST),
            "reached 20 of 30 tensors that train, and nothing of audio_encoder",
            "warning",
        ),
        ((replace(ENCODER, gradient_norm=0.0), REST), "reached 30 of 30 tensors that train, and nothing of audio_encoder", "warning"),
        ((replace(ENCODER, gradient_norm=None, nonfinite=True), REST), "NaN or Inf in the gradient of audio_encoder", "critical"),
    ],
)
def test_it_does_not(parts: tuple[Part, ...], words: str, tone: str) -> None:
    """No backward, a part cut off, NaN, nothing that trains: each is said as what it is."""
    found = flow(*parts)
    assert (found.value, found.tone) == (words, tone)


def test_what_could_not_be_read_is_said() -> None:
    """A part whose gradient could not be read is named beside the others; if none could, the reason is the answer."""
    unread = replace(ENCODER, without_gradient=None, gradient_norm=None)
    assert flow(unread, REST).value.endswith("; not measured of audio_encoder")
    only = flow(unread, reasons={"probe/grad/audio_encoder/norm": "sharded parameters"})
    assert (only.value, only.tone) == ("not measured: sharded parameters", "missing")
    nothing = flow(reasons={"parts": "the gradients were freed"})
    assert nothing.value == "not measured: the gradients were freed"


def test_norm_before_and_after_clipping() -> None:
    """Both norms stand in one line; without the second only the first."""
    made = record(ENCODER, REST, optimisation=Optimisation(1.0, (1e-3,), 2.5))
    assert fact(verification.section(made), "Gradient norm").value == "2.5 before clipping"
    clipped = replace(made, metrics={**made.metrics, "probe/grad/clipped_norm": 1.0})
    assert fact(verification.section(clipped), "Gradient norm").value == "2.5 before clipping, 1 as the optimizer got it"


def test_the_table_of_parts() -> None:
    """Every part is a row; a frozen one has nothing to say, and its reasons are not repeated below."""
    reasons = {f"probe/grad/projector/{what}": "frozen: none of the 2 parameters" for what in ("norm", "clipped_norm", "zero_share")}
    section = verification.section(record(ENCODER, REST, FROZEN, reasons=reasons))
    found = table(section, "What trains")
    assert [column.name for column in found.columns][3:] == ["gradient norm", "clipped", "update", "zero", "tensors without gradient"]
    assert found.rows == (
        ("audio_encoder", "1 k", "100 %", "0.5", "0.25", "0.002", "0 %", "0"),
        ("rest", "4 k", "50.0 %", "1.5", "0.75", "0.001", "25.0 %", "0"),
        ("projector", "400", "0 %", "-", "-", "-", "-", "-"),
    )
    assert "1,200 sampled elements" in found.caption
    assert "frozen" not in str([block for block in section.blocks if isinstance(block, Facts)])


@pytest.mark.parametrize("seed", range(5))
def test_layers_that_stand_out(seed: int) -> None:
    """The broken layers and the weakest come first, two of the strongest beside them, in the order of the forward; the rest is counted."""
    draw = random.Random(seed)
    layers = [Part(f"layers.{index}", 100, 1.0, 0, draw.uniform(1, 2), 4) for index in range(12)]
    broken, empty, weak = draw.sample(range(12), 3)
    layers[broken] = replace(layers[broken], nonfinite=True, gradient_norm=None)
    layers[empty] = replace(layers[empty], without_gradient=4, gradient_norm=None)
    layers[weak] = replace(layers[weak], gradient_norm=1e-6)
    strong = sorted((index for index in range(12) if index not in (broken, empty, weak)), key=lambda index: layers[index].gradient_norm)[
        -2:
    ]
    found = table(verification.section(record(REST, layers=(*layers, REST))), "weakest and the strongest")
    assert [row[0] for row in found.rows] == [f"layers.{index}" for index in sorted({broken, empty, weak, *strong})]
    assert found.footer == "and 7 layers more in the record"
    assert next(row for row in found.rows if row[0] == f"layers.{broken}")[1] == "NaN, Inf"
    assert next(row for row in found.rows if row[0] == f"layers.{empty}")[5] == "4 of 4"


def test_strength_is_an_element() -> None:
    """A large layer with the norm of a small one has the weaker gradient."""
    layers = [Part(f"layers.{index}", 100 * 4**index, 1.0, 0, 1.0, 4) for index in range(9)]
    found = table(verification.section(record(REST, layers=tuple(layers))), "weakest and the strongest")
    assert [row[0] for row in found.rows] == [f"layers.{index}" for index in (0, 1, 6, 7, 8)]
    assert math.isclose(1 / math.sqrt(100 * 4**8), 1 / 2560)


def test_few_layers_or_none() -> None:
    """All of a few layers are shown; one alone, frozen ones and what is in no layer are not."""
    two = tuple(Part(f"layers.{index}", 100, 1.0, 0, 1.0, 4) for index in range(2))
    found = table(verification.section(record(REST, layers=two)), "The gradient by layer")
    assert len(found.rows) == 2
    assert found.footer == ""
    for layers in ((two[0], REST), (replace(two[0], trainable_share=0.0), two[1])):
        shown = verification.section(record(REST, layers=layers)).blocks
        assert not [block for block in shown if isinstance(block, Table) and "by layer" in block.title]
