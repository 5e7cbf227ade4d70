"""The gradient observer: parts, frozen and sharded ones named, fp16 scale taken out."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from probe.capture.breaker import Breaker
from probe.capture.buffer import StepBuffer
from probe.capture.observer import StepEnd
from probe.capture.observers.gradients import GradientWatcher, part_cell, parts_of
from probe.foreign.sharding import is_sharded
from probe.records import Site


class Model(nn.Module):
    """An encoder with a projector inside, a head tied to the embedding, and a rest."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.ModuleDict({"body": nn.Linear(3, 3), "projector": nn.Linear(3, 2)})
        self.embedding = nn.Embedding(5, 2)
        self.rest = nn.Linear(2, 2)
        self.head = nn.Linear(2, 5, bias=False)
        self.head.weight = self.embedding.weight


def sites() -> list[Site]:
    return [Site("encoder", "audio_encoder", ""), Site("encoder.projector", "projector", ""), Site("head", "lm_head", "")]


def watcher(model: Model) -> tuple[GradientWatcher, StepBuffer]:
    modules = {"encoder": model.encoder, "encoder.projector": model.encoder["projector"], "head": model.head}
    made = GradientWatcher(parts_of(model, sites(), modules), sites(), Breaker(print))
    buffer = StepBuffer(budget_bytes=1 << 20, cells=made.cells())
    buffer.open(1)
    return made, buffer


def fill(model: Model, *, scale: float = 1.0) -> None:
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter) * scale if parameter.requires_grad else None


def test_each_parameter_belongs_to_one_part() -> None:
    """The projector inside the encoder and the head tied to the embedding are counted once; all parts together are the model."""
    model = Model()
    modules = {"encoder": model.encoder, "encoder.projector": model.encoder["projector"], "head": model.head}
    parts = {part.name: part for part in parts_of(model, sites(), modules)}
    assert {name: part.elements for name, part in parts.items()} == {"projector": 8, "audio_encoder": 12, "lm_head": 10, "rest": 6}
    assert sum(part.elements for part in parts.values()) == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("scale", [None, 1024.0])
def test_norms_are_those_of_the_unscaled_gradients(scale: float | None) -> None:
    """Squares are summed part by part; the factor of fp16 training is divided out."""
    model = Model()
    made, buffer = watcher(model)
    fill(model, scale=scale or 1.0)
    made.step_end(StepEnd(None if scale is None else torch.tensor(scale)), buffer)
    expected = sum(p.grad.double().square().sum() for p in model.encoder["body"].parameters()) / (scale or 1.0) ** 2
    squares, missing = buffer.totals.maxima[part_cell("audio_encoder")].tolist()
    assert squares == pytest.approx(expected.item(), rel=1e-6)
    assert missing == 0


def test_a_frozen_part_is_named_and_a_missing_gradient_counted() -> None:
    """A part without anything to train has a reason, not a zero; a parameter that should train and got nothing is counted."""
    model = Model()
    for parameter in model.encoder["body"].parameters():
        parameter.requires_grad_(False)
    made, buffer = watcher(model)
    fill(model)
    model.rest.bias.grad = None
    made.step_end(StepEnd(), buffer)
    assert "frozen: none of the 2 parameters" in buffer.totals.reasons["probe/grad/audio_encoder/norm"]
    assert part_cell("audio_encoder") not in buffer.totals.maxima
    assert buffer.totals.maxima[part_cell("rest")][1] == 1


def test_no_gradient_at_all_is_named() -> None:
    """Where .grad is empty after the backward (DeepSpeed), that is the reason."""
    made, buffer = watcher(Model())
    made.step_end(StepEnd(), buffer)
    assert "none of the 2 parameters that train has a .grad after the backward" in buffer.totals.reasons["probe/grad/rest/norm"]


def test_a_share_of_a_gradient_is_not_taken_for_the_whole() -> None:
    """A parameter of which this rank holds a part makes its part unmeasured, with that reason."""
    model = Model()
    model.rest.weight.ds_id = 3  # as ZeRO-3 marks its own
    assert is_sharded(model.rest.weight)
    assert not is_sharded(model.rest.bias)
    made, buffer = watcher(model)
    fill(model)
    made.step_end(StepEnd(), buffer)
    assert "sharded" in buffer.totals.reasons["probe/grad/rest/norm"]
    assert part_cell("rest") not in buffer.totals.maxima
