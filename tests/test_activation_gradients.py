"""The observer of activation gradients: against autograd itself, over calls and micro-batches, and what cannot be hooked is named."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from probe.capture.breaker import Breaker
from probe.capture.buffer import StepBuffer
from probe.capture.microbatch import MicroBatch
from probe.capture.observer import Call, StepEnd
from probe.capture.observers.activation_gradients import ORDER, ActivationGradientWatcher, activation_cell
from probe.capture.observers.gradients import BACKWARD_SEEN, LOSS_SCALE
from probe.records import Site
from waiting import NoWaiting

pytestmark = pytest.mark.pure  # of torch and probe alone: the same with every transformers

SITES = [Site("", "model", ""), Site("encoder", "audio_encoder", ""), Site("attention", "attention", ""), Site("unused", "custom", "")]


def watched(say: Any = print) -> tuple[ActivationGradientWatcher, StepBuffer]:
    made = ActivationGradientWatcher(SITES, Breaker(say))
    buffer = StepBuffer(budget_bytes=1 << 20, sites=[site.name for site in SITES], cells=made.cells())
    buffer.open(1)
    return made, buffer


def see(made: ActivationGradientWatcher, buffer: StepBuffer, site: Site, output: Any, module: nn.Module | None = None) -> None:
    call = Call(site, module or nn.Identity(), MicroBatch(0), (), {}, output=output)
    with torch.no_grad():
        made.leave(call, buffer)


def totals(buffer: StepBuffer, name: str) -> tuple[list[float], list[float]]:
    return buffer.totals.counts[activation_cell(name)], buffer.totals.sums[activation_cell(name)].tolist()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("seed", range(3))
def test_squares_over_calls(seed: int, dtype: torch.dtype) -> None:
    """Over several calls and micro-batches the squares are those of autograd's own gradients, in float64; sizes are counted."""
    torch.manual_seed(seed)
    made, buffer = watched()
    expected = {"encoder": 0.0, "attention": 0.0}
    sizes = {"encoder": 0, "attention": 0}
    for batch in range(3):
        x = torch.randn(2, 50 + batch, 8, requires_grad=True)
        encoded = (x * 2).to(dtype)
        attended = encoded.tanh() @ torch.randn(8, 8).to(dtype)
        loss = (attended.float() ** 3).sum() + encoded.float().sum()
        for name, output in (("encoder", encoded), ("attention", attended)):
            (gradient,) = torch.autograd.grad(loss, output, retain_graph=True)
            expected[name] += float(gradient.double().square().sum())
            sizes[name] += output.numel()
        see(made, buffer, SITES[2], (attended, None))
        see(made, buffer, SITES[1], {"last_hidden_state": encoded})
        loss.backward()
    made.step_end(StepEnd(), buffer)
    for name in expected:
        counts, sums = totals(buffer, name)
        assert counts == [3, sizes[name]]
        assert sums == pytest.approx([expected[name], 0], rel=1e-6)
    assert buffer.totals.facts[ORDER] == ("attention", "encoder")
    assert buffer.totals.facts[BACKWARD_SEEN] is True
    assert activation_cell("unused") not in buffer.totals.sums


def test_no_backward() -> None:
    """A forward whose loss never went backward leaves no call, and the fact that no backward was seen."""
    made, buffer = watched()
    x = torch.randn(2, 3, requires_grad=True)
    see(made, buffer, SITES[1], x * 2)
    made.step_end(StepEnd(torch.tensor(8.0)), buffer)
    assert buffer.totals.counts[activation_cell("encoder")] == [0, 0]
    assert buffer.totals.facts[BACKWARD_SEEN] is False
    assert buffer.totals.local[LOSS_SCALE].item() == 8.0


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite_is_counted(bad: float) -> None:
    """Its call is counted as such; the squares of the finite calls stay."""
    made, buffer = watched()
    for factor in (1.0, bad):
        x = torch.ones(4, requires_grad=True)
        output = x * 1
        see(made, buffer, SITES[1], output)
        (output * factor).sum().backward()
    made.step_end(StepEnd(), buffer)
    assert totals(buffer, "encoder") == ([2, 8], [4.0, 1.0])


@pytest.mark.parametrize("trains", [True, False])
def test_outputs_without_a_graph_are_named(trains: bool) -> None:
    """If parameters of the module train, it ran without a graph (a reentrant checkpoint); else nothing before it trains."""
    made, buffer = watched()
    module = nn.Linear(2, 2).requires_grad_(trains)
    see(made, buffer, SITES[1], torch.ones(2, 2), module)
    why = buffer.totals.reasons[activation_cell("encoder")]
    assert ("reentrant checkpoint" in why) == trains
    assert ("nothing in it or before it trains" in why) != trains


def test_a_module_that_raised_is_no_call() -> None:
    """Without an output there is nothing to hook, and nothing to say."""
    made, buffer = watched()
    see(made, buffer, SITES[1], None)
    made.step_end(StepEnd(), buffer)
    assert buffer.totals.reasons == {}
    assert ORDER not in buffer.totals.facts


def test_no_hook_on_a_leaf() -> None:
    """A module that returns a parameter is not hooked: the hook would stay on it for ever."""
    made, buffer = watched()
    parameter = nn.Parameter(torch.ones(3))
    see(made, buffer, SITES[1], parameter)
    assert not parameter._backward_hooks
    assert "leaf" in buffer.totals.reasons[activation_cell("encoder")]


def test_no_graph_node_is_added_and_nothing_is_kept() -> None:
    """The hooked output has the grad_fn that it had, keeps no tensor alive, and after the step nothing of it is left."""
    made, buffer = watched()
    x = torch.randn(1000, requires_grad=True)
    output = x.tanh()
    node = output.grad_fn
    see(made, buffer, SITES[1], output)
    assert output.grad_fn is node
    kept = weakref.ref(output)
    loss = (output * 2).sum()
    del output, node
    loss.backward()
    del loss
    gc.collect()
    assert kept() is None
    made.step_end(StepEnd(), buffer)
    assert len(made._seen) == 0


def test_a_backward_after_its_step_changes_nothing() -> None:
    """What a retried step left in a graph goes nowhere: neither into the new step nor into an error."""
    made, buffer = watched()
    x = torch.ones(4, requires_grad=True)
    output = x * 1
    see(made, buffer, SITES[1], output)
    buffer.open(1)
    output.sum().backward()
    made.step_end(StepEnd(), buffer)
    assert buffer.totals.counts[activation_cell("encoder")] == [0, 0]


def test_an_error_in_the_hook_stays_out_of_the_backward(monkeypatch: pytest.MonkeyPatch) -> None:
    """It switches this part off, is said once, and the gradient arrives all the same."""
    said: list[str] = []
    made, buffer = watched(said.append)
    asked: list[Tensor] = []

    def fail(gradient: Tensor) -> Tensor:
        asked.append(gradient)
        raise RuntimeError("made to fail")

    monkeypatch.setattr("probe.capture.observers.activation_gradients.norm_of", fail)
    x = torch.ones(4, requires_grad=True)
    for _ in range(2):
        output = x * 1
        see(made, buffer, SITES[1], output)
        output.sum().backward()
    assert torch.equal(x.grad, torch.full((4,), 2.0))
    assert len(said) == len(asked) == 1


def test_a_hook_is_one_operation_on_a_device() -> None:
    """Off the CPU a hook costs one norm; what comes after does not grow with the calls, and nothing waits."""
    costs = []
    for calls in (1, 5):
        made, buffer = watched()
        x = torch.empty(4, device="meta", requires_grad=True)
        loss = torch.zeros((), device="meta")
        for _ in range(calls):
            output = x * 1
            see(made, buffer, SITES[1], output)
            loss = loss + output.sum()
        with NoWaiting() as backward:
            loss.backward()
        with NoWaiting() as end:
            made.step_end(StepEnd(), buffer)
        plain = torch.zeros((), device="meta")
        for _ in range(calls):
            plain = plain + (x * 1).sum()
        with NoWaiting() as alone:
            plain.backward()
        costs.append((backward.operators - alone.operators, end.operators))
    assert [hook for hook, _ in costs] == [1, 5]
    assert costs[0][1] == costs[1][1]
