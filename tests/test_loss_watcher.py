"""What the loss observer sums: returned losses, numbers of labels, the model's own losses, labels that came with each micro-batch."""

from __future__ import annotations

import math
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from probe.capture.buffer import StepBuffer
from probe.capture.microbatch import MicroBatch
from probe.capture.observer import Call, StepEnd
from probe.capture.observers.loss import CELL, OUTPUT_CELL, LossWatcher, output_loss
from probe.records import Site

ROOT = Site("", "model", "")


def buffer() -> StepBuffer:
    made = StepBuffer(budget_bytes=1 << 20, cells=LossWatcher().cells())
    made.open(1)
    return made


def sums(found: StepBuffer, cell: Any) -> dict[str, float]:
    """Return counts and sums of a cell by column."""
    values = found.totals.sums.get(cell.name)
    return {**dict(zip(cell.counts, found.totals.counts[cell.name])), **({} if values is None else dict(zip(cell.sums, values.tolist())))}


def returned(*steps: tuple[Any, Any]) -> StepBuffer:
    """Show an observer what training_step returned and was given, micro-batch by micro-batch."""
    found = buffer()
    for loss, items in steps:
        LossWatcher().training_step(loss, items, found)
    return found


def left(output: Any, batch: Mapping[str, Any] | None = None, kwargs: Mapping[str, Any] | None = None) -> StepBuffer:
    """Show an observer one return of the root."""
    found = buffer()
    micro = MicroBatch(0, batch or {}, kwargs or {}, output)
    LossWatcher().leave(Call(ROOT, nn.Identity(), micro, (), {}, output), found)
    return found


def test_losses_add_up() -> None:
    """Losses are summed in float64, a vector of one loss a device by its mean; the dtype is told."""
    found = returned((torch.tensor(1.5), None), (torch.tensor([2.0, 4.0]), None))
    assert sums(found, CELL) == {"micro_batches": 2, "with_items": 0, "unscored": 0, "loss": 4.5, "items": 0, "nonfinite": 0}
    assert found.totals.facts["loss_dtype"] == "float32"
    assert returned((torch.tensor(1.0, dtype=torch.bfloat16), None)).totals.facts["loss_dtype"] == "bfloat16"


@pytest.mark.parametrize("items", [54, 54.0, torch.tensor(54), torch.tensor(54.0), torch.tensor([54, 54])], ids=repr)
def test_every_kind_of_number(items: Any) -> None:
    """The number of labels may be an int, a float, or a tensor of either, or one a device."""
    found = sums(returned((torch.tensor(1.0), items), (torch.tensor(1.0), items)), CELL)
    assert (found["with_items"], found["items"]) == (2, 108.0)


def test_which_micro_batch_is_not_finite() -> None:
    """NaN and Inf losses are counted, and the first of them is told by its index."""
    found = returned(*((torch.tensor(value), None) for value in (1.0, math.nan, math.inf, 1.0)))
    assert sums(found, CELL)["nonfinite"] == 2
    assert -found.totals.maxima[CELL.name].item() == 1
    assert returned((torch.tensor(math.nan), None)).totals.maxima[CELL.name].item() == 0
    assert returned((torch.tensor(1.0), None)).totals.maxima[CELL.name].item() == -math.inf


def test_no_loss_is_a_reason() -> None:
    """A training_step that returns no tensor is named."""
    assert returned((None, 3)).totals.reasons["probe/loss"] == "training_step returned no tensor"


@pytest.mark.parametrize(
    "output",
    [
        {"loss": torch.tensor(2.5)},
        SimpleNamespace(loss=torch.tensor(2.5)),
        (torch.tensor(2.5), torch.zeros(3)),
        {"loss": torch.tensor([2.5])},
    ],
    ids=["mapping", "object", "tuple", "one element"],
)
def test_the_models_own_loss(output: Any) -> None:
    """It is taken where the Trainer takes it."""
    found = sums(left(output), OUTPUT_CELL)
    assert (found["with_loss"], found["loss"], found["with_auxiliary"]) == (1, 2.5, 0)


@pytest.mark.parametrize(
    "output", [{"loss": None}, {"logits": torch.zeros(2)}, (torch.zeros(2, 3),), (), {"loss": torch.zeros(3)}, {"loss": 2.5}]
)
def test_what_is_no_loss(output: Any) -> None:
    """No loss, several numbers, or something that is no tensor are not taken for one."""
    assert sums(left(output, {"labels": torch.tensor([[1]])}), OUTPUT_CELL)["with_loss"] == 0


def test_auxiliary_loss() -> None:
    """A declared auxiliary loss is summed beside it."""
    found = sums(left({"loss": torch.tensor(2.5), "aux_loss": torch.tensor(0.25)}), OUTPUT_CELL)
    assert (found["with_auxiliary"], found["auxiliary"]) == (1, 0.25)


def test_an_empty_tuple_has_no_loss() -> None:
    """A forward that returned an empty tuple is no error."""
    assert output_loss(MicroBatch(0, output=())) is None


@pytest.mark.parametrize(
    ("batch", "text", "named", "audio", "labels", "masked"),
    [
        ({"labels": torch.tensor([[-100, 5, 6], [-100, -100, 7]])}, 1, 1, 0, 3, 0),
        ({"label_ids": torch.tensor([[4, 5]])}, 1, 0, 0, 2, 0),
        ({"labels": torch.full((2, 3), -100)}, 1, 1, 0, 0, 1),
        ({"labels": torch.full((2, 3), -100), "audio_labels": torch.ones(1, 2, 3, dtype=torch.long)}, 1, 1, 1, 0, 0),
        ({"label_audio_ids": torch.full((3, 4), -100)}, 0, 0, 1, 0, 1),
        ({"input_ids": torch.tensor([[1]])}, 0, 0, 0, 0, 0),
    ],
)
def test_labels_are_counted(batch: dict[str, Tensor], text: int, named: int, audio: int, labels: int, masked: int) -> None:
    """Which labels came, under which name, how many are not -100, and whether there is none at all to learn from."""
    found = sums(left({"loss": torch.tensor(1.0)}, batch), OUTPUT_CELL)
    assert [found[name] for name in ("with_text_labels", "with_labels_key", "with_audio_labels", "labels", "masked")] == [
        text, named, audio, labels, masked,
    ]  # fmt: skip


def test_labels_that_smoothing_has_taken_away() -> None:
    """Labels are found in the batch of training_step when the forward did not receive them."""
    found = left({"logits": torch.zeros(1, 2, 3)}, {"labels": torch.tensor([[1, 2]])}, {"input_ids": torch.tensor([[1, 2]])})
    assert sums(found, OUTPUT_CELL)["labels"] == 2


def test_a_forward_that_raised_or_had_nothing() -> None:
    """Nothing is added for a forward that raised, or that had neither loss nor labels."""
    for found in (left(None, {"labels": torch.tensor([[1]])}), left({"logits": torch.zeros(2)})):
        assert OUTPUT_CELL.name not in found.totals.sums


def test_gradients_are_not_kept() -> None:
    """What is summed holds no graph."""
    weight = torch.ones((), requires_grad=True)
    found = returned((weight * 2, None))
    assert not found.totals.sums[CELL.name].requires_grad
    assert not left({"loss": weight * 2}).totals.sums[OUTPUT_CELL.name].requires_grad


@pytest.mark.parametrize(
    ("reasons", "unscored"),
    [
        ({}, 0),
        ({"head:lm_head": "labels of shape (2, 42) does not lie over logits of shape (2, 60, 288)"}, 1),
        ({"head:a": "labels do not lie", "head:b": "labels do not lie"}, 1),
        ({"head:audio_head": "no audio labels among the inputs (looked for audio_labels)"}, 0),
        ({"probe/loss": "training_step returned no tensor"}, 0),
    ],
)
def test_other_ranks_hear_of_heads_that_could_not_be_scored(reasons: dict[str, str], unscored: int) -> None:
    """Reasons stay on their rank; that there is one travels with the sums, once a rank."""
    found = buffer()
    for name, why in reasons.items():
        found.totals.omit(name, why)
    LossWatcher().step_end(StepEnd(), found)
    assert sums(found, CELL)["unscored"] == unscored


def test_learning_rates() -> None:
    """The rates of the step are told."""
    found = buffer()
    LossWatcher().step_end(StepEnd(learning_rates=(1e-3,)), found)
    assert found.totals.facts["learning_rates"] == (1e-3,)
