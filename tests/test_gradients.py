"""The observer of the parameters' gradients: norms before and after clipping, frozen, sharded, sparse and missing ones named."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from probe.capture.buffer import StepBuffer
from probe.capture.observer import StepEnd
from probe.capture.observers.gradients import BACKWARD_SEEN, LOSS_SCALE, GradientWatcher, clipped_cell, gradient_cell
from probe.foreign.sharding import is_sharded
from probe.records import Site
from probe.sites.parts import divide
from waiting import NoWaiting

pytestmark = pytest.mark.pure  # of torch and probe alone: the same with every transformers

SITES = [Site("encoder", "audio_encoder", ""), Site("encoder.projector", "projector", ""), Site("head", "lm_head", "")]


class Model(nn.Module):
    """An encoder with a projector inside, a head tied to the embedding, and two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.ModuleDict({"body": nn.Linear(3, 3), "projector": nn.Linear(3, 2)})
        self.embedding = nn.Embedding(5, 2)
        self.layers = nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)])
        self.head = nn.Linear(2, 5, bias=False)
        self.head.weight = self.embedding.weight


def watched(model: nn.Module) -> tuple[GradientWatcher, StepBuffer]:
    made = GradientWatcher(divide(model, SITES))
    buffer = StepBuffer(budget_bytes=1 << 20, cells=made.cells())
    buffer.open(1)
    return made, buffer


def fill(model: nn.Module, *, scale: float = 1.0, seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        gradient = torch.randn(parameter.shape, generator=generator) * scale
        parameter.grad = gradient.to(parameter.dtype) if parameter.requires_grad else None


def squares(*tensors: Tensor) -> float:
    return sum(float(tensor.double().square().sum()) for tensor in tensors)


def columns(buffer: StepBuffer, part: str, layer: str = "") -> list[float]:
    return buffer.totals.maxima[gradient_cell(part, layer or part)].tolist()


@pytest.mark.parametrize("seed", range(3))
def test_norms_by_part_and_layer(seed: int) -> None:
    """Squares are summed unit by unit in float64, tied weights once, and clipping changes what is read before the update."""
    model = Model()
    made, buffer = watched(model)
    fill(model, seed=seed)
    made.step_end(StepEnd(), buffer)
    expected = {
        ("audio_encoder", ""): squares(*(p.grad for p in model.encoder["body"].parameters())),
        ("projector", ""): squares(*(p.grad for p in model.encoder["projector"].parameters())),
        ("rest", "layers.0"): squares(*(p.grad for p in model.layers[0].parameters())),
        ("rest", "layers.1"): squares(*(p.grad for p in model.layers[1].parameters())),
        ("lm_head", ""): squares(model.head.weight.grad),
    }
    for (part, layer), value in expected.items():
        assert columns(buffer, part, layer) == pytest.approx([value, 0, 0], rel=1e-6)
    assert set(buffer.totals.maxima) == {gradient_cell(part, layer or part) for part, layer in expected}
    total = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.25)
    made.before_update(buffer)
    factor = float(0.25 / (total + 1e-6)) ** 2
    for (part, layer), value in expected.items():
        assert buffer.totals.maxima[clipped_cell(part, layer or part)].tolist() == pytest.approx([value * factor, 0], rel=1e-5)


def test_the_scale_of_half_precision_training_is_kept() -> None:
    """The factor that gradients carry goes with the numbers; squares themselves are as they are."""
    model = Model()
    made, buffer = watched(model)
    fill(model, scale=1024.0)
    made.step_end(StepEnd(torch.tensor(1024.0)), buffer)
    assert buffer.totals.local[LOSS_SCALE].item() == 1024.0
    assert columns(buffer, "lm_head")[0] == pytest.approx(squares(model.head.weight.grad), rel=1e-6)


def test_a_frozen_part_is_named_and_a_missing_gradient_counted() -> None:
    """A part without anything to train has a reason, not a zero; a parameter that should train and got nothing is counted."""
    model = Model()
    for parameter in model.encoder["body"].parameters():
        parameter.requires_grad_(False)
    made, buffer = watched(model)
    fill(model)
    model.layers[1].bias.grad = None
    made.step_end(StepEnd(), buffer)
    assert "frozen: none of the 2 parameters" in buffer.totals.reasons["probe/grad/audio_encoder/norm"]
    assert gradient_cell("audio_encoder", "audio_encoder") not in buffer.totals.maxima
    assert columns(buffer, "rest", "layers.1") == pytest.approx([squares(model.layers[1].weight.grad), 0, 1])
    assert columns(buffer, "rest", "layers.0")[2] == 0


def test_no_gradient_at_all_is_counted() -> None:
    """Where no backward ran, every tensor that trains counts as without gradient, and the reason is there."""
    made, buffer = watched(Model())
    made.step_end(StepEnd(), buffer)
    made.before_update(buffer)
    assert columns(buffer, "rest", "layers.0") == [0, 0, 2]
    assert columns(buffer, "lm_head") == [0, 0, 1]
    assert "none of the 4 parameters that train has a .grad after the backward" in buffer.totals.reasons["probe/grad/rest/norm"]
    assert clipped_cell("lm_head", "lm_head") not in buffer.totals.maxima


def test_gradients_that_were_taken_away_are_not_counted_as_missing() -> None:
    """Where a backward was seen and no .grad is left (DeepSpeed), nothing can be read, and that is the reason for every part."""
    made, buffer = watched(Model())
    buffer.totals.tell(BACKWARD_SEEN, True)
    made.step_end(StepEnd(), buffer)
    assert buffer.totals.maxima == {}
    assert set(buffer.totals.reasons) == {f"probe/grad/{part}/norm" for part in ("projector", "audio_encoder", "lm_head", "rest")}
    assert all(".grad is empty after it" in why for why in buffer.totals.reasons.values())


def test_a_share_of_a_gradient_is_not_taken_for_the_whole() -> None:
    """A parameter of which this rank holds a part makes its unit unmeasured and its part named; the other layer is still read."""
    model = Model()
    model.layers[0].weight.ds_id = 3  # as ZeRO-3 marks its own
    assert is_sharded(model.layers[0].weight)
    assert not is_sharded(model.layers[0].bias)
    made, buffer = watched(model)
    fill(model)
    made.step_end(StepEnd(), buffer)
    made.before_update(buffer)
    assert "sharded" in buffer.totals.reasons["probe/grad/rest/norm"]
    assert gradient_cell("rest", "layers.0") not in buffer.totals.maxima
    assert clipped_cell("rest", "layers.0") not in buffer.totals.maxima
    assert columns(buffer, "rest", "layers.1")[2] == 0


def test_a_sparse_gradient_is_named() -> None:
    """An embedding with sparse gradients is not added up, and nothing else suffers."""
    model = Model()
    model.embedding = nn.Embedding(5, 2, sparse=True)
    made, buffer = watched(model)
    fill(model)
    model.embedding.weight.grad = None
    model.embedding(torch.tensor([1, 1, 3])).sum().backward()
    made.step_end(StepEnd(), buffer)
    assert "sparse gradient" in buffer.totals.reasons["probe/grad/embedding/norm"]
    assert gradient_cell("embedding", "embedding") not in buffer.totals.maxima
    assert columns(buffer, "lm_head")[0] > 0


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_is_counted_apart(bad: float) -> None:
    """A NaN or Inf marks its unit; the squares stay those of the finite tensors, and other units are untouched."""
    model = Model()
    made, buffer = watched(model)
    fill(model)
    model.layers[0].weight.grad[0, 0] = bad
    made.step_end(StepEnd(), buffer)
    assert columns(buffer, "rest", "layers.0") == pytest.approx([squares(model.layers[0].bias.grad), 1, 0])
    assert columns(buffer, "rest", "layers.1")[1] == 0


def test_a_parameter_put_in_the_place_of_another_is_read() -> None:
    """What trains, and where, is looked up anew in each step."""
    model = Model()
    made, buffer = watched(model)
    model.layers[0].weight = nn.Parameter(torch.ones(2, 2))
    model.layers[1].weight.requires_grad_(False)
    fill(model)
    model.layers[1].weight.grad = torch.ones(2, 2)  # of before it was frozen
    made.step_end(StepEnd(), buffer)
    assert columns(buffer, "rest", "layers.0")[0] == pytest.approx(squares(model.layers[0].weight.grad, model.layers[0].bias.grad))
    assert columns(buffer, "rest", "layers.1")[0] == pytest.approx(squares(model.layers[1].bias.grad))


def test_the_number_of_operations_does_not_grow_with_layers() -> None:
    """On a device, more layers cost no more tensor operations, and nothing waits."""
    counts = []
    for layers in (2, 20):
        model = Model()
        model.layers = nn.ModuleList([nn.Linear(2, 2) for _ in range(layers)])
        model = model.to("meta")
        made, buffer = watched(model)
        for parameter in model.parameters():
            parameter.grad = torch.empty_like(parameter)
        with NoWaiting() as mode:
            made.step_end(StepEnd(), buffer)
            made.before_update(buffer)
        counts.append(mode.operators)
    detached = 2 * (2 * 2 * 18 + 18)  # what detaching a tensor costs is no kernel: each gradient and each norm, twice
    assert counts[1] - counts[0] <= detached
