"""The observer of updates: ratios, unchanged weights and zero gradients against plain computations, and all that keeps it from guessing."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from torch import nn

from probe.capture.buffer import StepBuffer
from probe.capture.observer import StepEnd
from probe.capture.observers.updates import MOST, SAMPLED, UPDATE_COLUMNS, UPDATES, ZERO_COLUMNS, UpdateWatcher, update_cell, zero_cell
from probe.sites.parts import Unit, divide
from waiting import NoWaiting

pytestmark = pytest.mark.pure  # of torch and probe alone: the same with every transformers

MIB = 1 << 20


class Model(nn.Module):
    """Two layers of uneven size, and an embedding."""

    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.embedding = nn.Embedding(10, width)
        self.layers = nn.ModuleList([nn.Linear(width, width), nn.Linear(width, 3 * width)])


def watched(model: nn.Module, *, budget: int = 64 * MIB) -> tuple[UpdateWatcher, StepBuffer]:
    made = UpdateWatcher(divide(model, []))
    buffer = StepBuffer(budget_bytes=budget, cells=made.cells())
    buffer.open(1)
    return made, buffer


def fill(model: nn.Module, seed: int = 0) -> None:
    """Give every parameter a gradient of which about a third is 0."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        draw = torch.randn(parameter.shape, generator=generator)
        parameter.grad = draw.where(torch.rand(parameter.shape, generator=generator) > 0.33, torch.zeros(())).to(parameter.dtype)


def zeros(buffer: StepBuffer, unit: Unit) -> dict[str, float]:
    return dict(zip(ZERO_COLUMNS, buffer.totals.maxima[zero_cell(unit.part, unit.layer)].tolist(), strict=True))


def update(buffer: StepBuffer, unit: Unit) -> dict[str, float]:
    return dict(zip(UPDATE_COLUMNS, buffer.totals.maxima[update_cell(unit.part, unit.layer)].tolist(), strict=True))


def flat(parameters: list[torch.Tensor]) -> torch.Tensor:
    return torch.cat([p.detach().double().reshape(-1) for p in parameters])


UNITS = {"embedding": Unit("embedding", "embedding"), "layers.0": Unit("rest", "layers.0"), "layers.1": Unit("rest", "layers.1")}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("seed", range(3))
def test_small_models_are_compared_whole(dtype: torch.dtype, seed: int) -> None:
    """Where all elements fit into the sample, every number is that of the weights before and after, in float64."""
    torch.manual_seed(seed)
    model = Model().to(dtype)
    made, buffer = watched(model)
    fill(model, seed)
    made.step_end(StepEnd(), buffer)
    before = {name: flat(list(model.get_submodule(name).parameters())) for name in UNITS}
    made.before_update(buffer)
    torch.optim.SGD(model.parameters(), lr=1e-3).step()
    made.after_update(buffer)
    for name, unit in UNITS.items():
        parameters = list(model.get_submodule(name).parameters())
        gradient, after = flat([p.grad for p in parameters]), flat(parameters)
        assert zeros(buffer, unit) == {"zero": int((gradient == 0).sum()), "gradients": gradient.numel()}
        compared = gradient != 0
        expected = {
            "moved": float((after - before[name]).square().sum()),
            "weights": float(before[name].square().sum()),
            "unchanged": float((compared & (after == before[name])).sum()),
            "compared": float(compared.sum()),
            "elements": after.numel(),
            "nonfinite": 0,
        }
        assert update(buffer, unit) == pytest.approx(expected, rel=1e-12)
        if dtype == torch.bfloat16:
            assert expected["unchanged"] > 0
        assert buffer.totals.facts[SAMPLED][list(UNITS.values()).index(unit)] == after.numel()


def test_estimates_of_a_large_model() -> None:
    """Of far more elements than are sampled, sums come out within a few per cent, and no more are sampled than the bound."""
    torch.manual_seed(0)
    model = Model(700)
    made, buffer = watched(model)
    fill(model)
    made.step_end(StepEnd(), buffer)
    before = {name: flat(list(model.get_submodule(name).parameters())) for name in UNITS}
    made.before_update(buffer)
    torch.optim.SGD(model.parameters(), lr=1e-2).step()
    made.after_update(buffer)
    assert MOST // 2 < sum(buffer.totals.facts[SAMPLED]) <= MOST
    for name, unit in UNITS.items():
        parameters = list(model.get_submodule(name).parameters())
        gradient, after, found = flat([p.grad for p in parameters]), flat(parameters), update(buffer, unit)
        assert found["elements"] == pytest.approx(after.numel(), rel=1e-9)
        assert found["moved"] == pytest.approx(float((after - before[name]).square().sum()), rel=0.05)
        assert found["weights"] == pytest.approx(float(before[name].square().sum()), rel=0.05)
        assert zeros(buffer, unit)["zero"] / zeros(buffer, unit)["gradients"] == pytest.approx(
            float((gradient == 0).double().mean()), abs=0.02
        )


def test_a_tensor_without_a_gradient_takes_no_part_in_zeros() -> None:
    """It counts among the weights, and neither among the zero gradients nor among what should have moved."""
    model = Model()
    made, buffer = watched(model)
    fill(model)
    model.layers[0].weight.grad = None
    made.step_end(StepEnd(), buffer)
    made.before_update(buffer)
    torch.optim.SGD(model.parameters(), lr=1e-3).step()
    made.after_update(buffer)
    bias = model.layers[0].bias.grad
    assert zeros(buffer, UNITS["layers.0"]) == {"zero": int((bias == 0).sum()), "gradients": 4}
    found = update(buffer, UNITS["layers.0"])
    assert (found["elements"], found["compared"], found["unchanged"]) == (20, int((bias != 0).sum()), 0)


def test_without_gradients_there_is_no_update() -> None:
    """If no parameter has a gradient of its own, the weights may have been moved already (DeepSpeed): nothing is compared, and said."""
    model = Model()
    made, buffer = watched(model)
    made.step_end(StepEnd(), buffer)
    made.before_update(buffer)
    made.after_update(buffer)
    assert buffer.totals.maxima == {}
    assert "no parameter that trains has a .grad" in buffer.totals.reasons[UPDATES]


def test_frozen_and_sharded_weights_are_left_out() -> None:
    """What does not train, and what this rank holds a share of, is not sampled."""
    model = Model()
    model.layers[1].requires_grad_(False)
    model.layers[0].weight.ds_id = 1
    made, buffer = watched(model)
    fill(model)
    made.step_end(StepEnd(), buffer)
    assert buffer.totals.facts[SAMPLED] == (40, 4, 0)
    assert zero_cell("rest", "layers.1") not in buffer.totals.maxima


def test_weights_with_gaps_in_memory_are_left_out() -> None:
    """A parameter that is every second column of another tensor is not sampled: strides would meet what is not its own."""
    model = Model()
    model.layers[0].weight = nn.Parameter(torch.randn(4, 8)[:, ::2])
    made, buffer = watched(model)
    fill(model)
    made.step_end(StepEnd(), buffer)
    assert buffer.totals.facts[SAMPLED] == (40, 4, 60)


@pytest.mark.parametrize("how", ["shape", "strides", "gone"])
def test_parameters_of_another_form_are_not_compared(how: str) -> None:
    """If the optimizer puts other parameters in the place of the old ones, elements do not correspond: not measured, and said."""
    model = Model()
    made, buffer = watched(model)
    fill(model)
    made.step_end(StepEnd(), buffer)
    made.before_update(buffer)
    if how == "gone":
        del model.layers[0].weight
    else:
        model.layers[0].weight = nn.Parameter(torch.ones(4, 5) if how == "shape" else torch.ones(4, 4).t())
        if how == "strides":
            model.layers[1].weight = nn.Parameter(model.layers[1].weight.detach().t().contiguous().t())
    made.after_update(buffer)
    assert update_cell("rest", "layers.0") not in buffer.totals.maxima
    assert "another form" in buffer.totals.reasons[UPDATES]


def test_a_parameter_put_in_the_place_of_another_is_compared() -> None:
    """An optimizer that exchanges the parameter object instead of changing it is followed."""
    model = Model()
    made, buffer = watched(model)
    fill(model)
    made.step_end(StepEnd(), buffer)
    made.before_update(buffer)
    old = model.layers[0].weight.detach().double()
    model.layers[0].weight = nn.Parameter(model.layers[0].weight.detach() + 1)
    made.after_update(buffer)
    moved = float((model.layers[0].weight.detach().double() - old).square().sum())
    assert update(buffer, UNITS["layers.0"])["moved"] == pytest.approx(moved, rel=1e-12)


def test_gradients_in_another_order_of_memory_take_no_part() -> None:
    """A gradient whose strides are not those of its weight would be matched with the wrong elements."""
    model = Model()
    made, buffer = watched(model)
    fill(model)
    model.layers[1].weight.grad = model.layers[1].weight.grad.t().contiguous().t()
    made.step_end(StepEnd(), buffer)
    assert zeros(buffer, UNITS["layers.1"])["gradients"] == model.layers[1].bias.numel()


def test_sparse_gradients_take_no_part() -> None:
    """A sparse gradient has no places in memory that correspond to those of its weight; the weight is still compared."""
    model = Model()
    made, buffer = watched(model)
    fill(model)
    model.embedding.weight.grad = model.embedding.weight.grad.to_sparse()
    made.step_end(StepEnd(), buffer)
    made.before_update(buffer)
    made.after_update(buffer)
    assert zeros(buffer, UNITS["embedding"])["gradients"] == 0
    assert update(buffer, UNITS["embedding"])["elements"] == 40


def test_what_is_not_finite_is_marked() -> None:
    """Weights that became NaN mark their unit; its sums are 0, and other units are untouched."""
    model = Model()
    made, buffer = watched(model)
    fill(model)
    made.step_end(StepEnd(), buffer)
    made.before_update(buffer)
    with torch.no_grad():
        model.layers[0].weight.fill_(float("nan"))
    made.after_update(buffer)
    assert update(buffer, UNITS["layers.0"])["nonfinite"] == 1
    assert update(buffer, UNITS["layers.0"])["moved"] == 0
    assert update(buffer, UNITS["layers.1"])["nonfinite"] == 0


def test_the_budget_is_kept() -> None:
    """A small budget gets a small sample; one that is full gets none, and says so; what was reserved is given back."""
    model = Model(200)
    made, buffer = watched(model, budget=MIB)
    fill(model)
    held = buffer.bytes
    made.step_end(StepEnd(), buffer)
    assert held < buffer.bytes <= held + MIB // 16
    assert sum(buffer.totals.facts[SAMPLED]) == (buffer.bytes - held) // 40
    made.before_update(buffer)
    made.after_update(buffer)
    assert buffer.bytes == held
    buffer.open(2)
    buffer.bytes = MIB
    made.step_end(StepEnd(), buffer)
    made.before_update(buffer)
    made.after_update(buffer)
    assert "would exceed the budget" in buffer.totals.reasons[UPDATES]
    assert buffer.totals.maxima == {}


def test_samples_go_with_the_buffer() -> None:
    """A step without an optimizer's step leaves nothing behind once its buffer is cleared, and an update nobody announced is none."""
    model = Model()
    made, buffer = watched(model)
    fill(model)
    made.step_end(StepEnd(), buffer)
    made.before_update(buffer)
    (sample,) = made._taken[buffer.totals]
    kept = weakref.ref(sample.old_R)
    del sample
    buffer.clear()
    gc.collect()
    assert kept() is None
    made.after_update(buffer)
    assert buffer.totals.maxima == {}


def test_an_update_without_its_beginning_is_not_measured() -> None:
    """If only the end of the optimizer's step was seen, nothing is compared."""
    model = Model()
    made, buffer = watched(model)
    fill(model)
    made.step_end(StepEnd(), buffer)
    made.after_update(buffer)
    assert update_cell("rest", "layers.0") not in buffer.totals.maxima
    assert UPDATES in buffer.totals.reasons


def test_operations_do_not_grow_with_layers() -> None:
    """On a device, each further layer costs views only (5 a tensor), and nothing waits."""
    counts = []
    for layers in (2, 12):
        model = Model()
        model.layers = nn.ModuleList([nn.Linear(4, 4, bias=False) for _ in range(layers)])
        model = model.to("meta")
        made, buffer = watched(model)
        for parameter in model.parameters():
            parameter.grad = torch.empty_like(parameter)
        with NoWaiting() as mode:
            made.step_end(StepEnd(), buffer)
            made.before_update(buffer)
            made.after_update(buffer)
        counts.append(mode.operators)
    assert counts[1] - counts[0] == 10 * 5  # as_strided of the gradient, detach and as_strided of the weight before and after
