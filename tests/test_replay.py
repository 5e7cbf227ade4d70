"""Tests of the second forward: it sees what it is given, and leaves model, generators, hooks and inputs as they were."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from models.running import rng_states
from probe.capture.arguments import by_name
from probe.capture.microbatch import MicroBatch
from probe.capture.observers.root_call import RootCall
from probe.counterfactual.replay import PAST, Replayed, run_again

pytestmark = pytest.mark.pure  # of torch and probe alone: the same with every transformers


class Model(nn.Module):
    """Draws from every generator, counts in batch norm, drops out, and keeps what it was called with."""

    def __init__(self, fails: bool = False) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(4)
        self.drop = nn.Dropout(0.5)
        self.head = nn.Linear(4, 3)
        self.fails = fails
        self.seen: list[dict[str, Any]] = []

    def forward(self, features: Tensor, scale: float = 1.0, use_cache: bool = True) -> Tensor:
        state = {name: module.training for name, module in self.named_modules()}
        noise = torch.rand(1) + random.random() + np.random.rand()
        self.seen.append({"features": features, "scale": scale, "use_cache": use_cache, "training": state, "grad": torch.is_grad_enabled()})
        logits = self.head(self.drop(self.norm(features * scale)))
        if self.fails:
            raise RuntimeError("CUDA out of memory.")
        return logits + 0 * noise


def call_of(model: nn.Module, *args: Any, autocast: torch.dtype | None = None, **kwargs: Any) -> RootCall:
    """Return what the observer keeps of a call."""
    return RootCall(model, args, kwargs, MicroBatch(0, {}, by_name(model.forward, args, kwargs)), autocast)


def features(seed: int = 0) -> Tensor:
    return torch.randn(5, 4, generator=torch.Generator().manual_seed(seed))


def again(call: RootCall, **replaced: Tensor) -> Replayed:
    """Run a call again; fail if it cannot be."""
    found = run_again(call, replaced, heads={"head": call.module.head})
    assert isinstance(found, Replayed), found
    return found


def test_it_is_an_evaluation_without_gradients() -> None:
    """Every module is in eval mode, no graph is built, and the head's logits are those of the model in eval mode."""
    model = Model()
    given = features()
    found = again(call_of(model, given))
    assert not any(model.seen[-1]["training"].values())
    assert not model.seen[-1]["grad"]
    assert not found.logits["head"].requires_grad
    expected = model.eval().head(model.norm(given))
    assert torch.equal(found.logits["head"], expected)
    assert torch.equal(found.micro.output, expected)
    assert found.micro.inputs["features"] is given


def test_training_flags_are_restored_one_by_one() -> None:
    """What was in eval mode inside a training model stays so, though ``eval`` and ``train`` are overridden."""
    model = Model()
    model.norm.eval()
    model.drop.train = model.drop.eval = pytest.fail  # type: ignore[assignment,method-assign]
    before = {name: module.training for name, module in model.named_modules()}
    assert sorted(before.values()) == [False, True, True, True]
    again(call_of(model, features()))
    assert {name: module.training for name, module in model.named_modules()} == before


@pytest.mark.parametrize("fails", [False, True])
def test_everything_is_as_before(fails: bool) -> None:
    """Generators, buffers, gradients, flags and hooks are untouched, also when the forward raises."""
    model = Model(fails)
    model.head.weight.grad = torch.ones_like(model.head.weight)
    given = features()
    before = (rng_states(), {name: value.clone() for name, value in model.state_dict().items()}, given.clone())
    heard = list(model.head._forward_hooks)
    if fails:
        with pytest.raises(RuntimeError, match="out of memory"):
            again(call_of(model, given))
    else:
        again(call_of(model, given))
    assert len(model.seen) == 1
    after = rng_states()
    assert after["python"] == before[0]["python"]
    assert all(np.array_equal(a, b) for a, b in zip(after["numpy"], before[0]["numpy"], strict=True))
    assert torch.equal(after["torch"], before[0]["torch"])
    assert all(torch.equal(value, before[1][name]) for name, value in model.state_dict().items())
    assert torch.equal(given, before[2])
    assert torch.equal(model.head.weight.grad, torch.ones_like(model.head.weight))
    assert all(module.training for module in model.modules())
    assert list(model.head._forward_hooks) == heard == []
    assert torch.is_grad_enabled()


def test_cuda_generators_are_restored(monkeypatch: pytest.MonkeyPatch) -> None:
    """The generator of every accelerator that holds a parameter or an input is noted before and put back after."""
    noted: list[Any] = []
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda device: ("state of", device))
    monkeypatch.setattr(torch.cuda, "set_rng_state", lambda state, device: noted.append((state, device)))
    devices = {torch.device("cuda", 0), torch.device("cuda", 1)}
    monkeypatch.setattr("probe.counterfactual.replay._accelerators", lambda call: devices)
    again(call_of(Model(), features()))
    assert sorted(noted, key=str) == sorted(((("state of", device), device) for device in devices), key=str)


def test_inputs_are_replaced_by_name_however_they_were_passed() -> None:
    """A positional and a keyword argument are replaced; what is not replaced is passed on as it was, and the call itself is unchanged."""
    new, given = features(1), features()
    for call in (call_of(Model(), given, 2.0), call_of(Model(), features=given, scale=2.0)):
        found = again(call, features=new)
        seen = call.module.seen[-1]
        assert seen["features"] is new and seen["scale"] == 2.0
        assert found.micro.inputs["features"] is new
        assert (call.args[0] if call.args else call.kwargs["features"]) is given


def test_an_input_that_is_no_argument_is_named() -> None:
    """What only ``training_step`` was given cannot be put in, and the model does not run."""
    model = Model()
    found = run_again(call_of(model, features()), {"waves": features()}, heads={})
    assert found == "waves is not among the arguments that the forward was given"
    assert model.seen == []


def test_no_cache_is_built() -> None:
    """``use_cache`` is off where the forward takes it, passed by position or by keyword or not at all; a given cache forbids the pass."""
    for call in (call_of(Model(), features()), call_of(Model(), features(), use_cache=True)):
        again(call)
        assert call.module.seen[-1]["use_cache"] is False
    by_position = call_of(Model(), features(), 1.0, True)
    again(by_position)
    assert by_position.module.seen[-1]["use_cache"] is True  # the caller's own choice

    class Cached(Model):
        def forward(self, features: Tensor, past_key_values: Any = None) -> Tensor:  # type: ignore[override]
            return super().forward(features)

    model = Cached()
    assert isinstance(run_again(call_of(model, features(), past_key_values=None), {}, heads={}), Replayed)
    assert run_again(call_of(model, features(), past_key_values=[1]), {}, heads={}) == PAST
    assert len(model.seen) == 1


def test_a_forward_without_use_cache_is_not_given_it() -> None:
    """A wrapper that hands everything on must not receive what the model inside does not take; PEFT's is looked through."""

    class Inner(nn.Module):
        def __init__(self, forward: Callable[..., Tensor]) -> None:
            super().__init__()
            self.forward = forward  # type: ignore[method-assign]

    class Wrapper(nn.Module):
        def __init__(self, inner: nn.Module, peft: bool) -> None:
            super().__init__()
            self.inner, self.head = inner, nn.Identity()
            if peft:
                self.peft_config = {}
            self.seen: list[dict[str, Any]] = []

        def get_base_model(self) -> nn.Module:
            return self.inner

        def forward(self, **kwargs: Any) -> Tensor:
            self.seen.append(kwargs)
            return self.inner(**kwargs)

    plain = Wrapper(Inner(lambda features, use_cache=True: features), peft=False)
    again(call_of(plain, features=features()))
    assert "use_cache" not in plain.seen[-1]
    peft = Wrapper(Inner(lambda features, use_cache=True: features), peft=True)
    again(call_of(peft, features=features()))
    assert peft.seen[-1]["use_cache"] is False


def test_the_last_call_of_a_head_counts() -> None:
    """A head that is called twice is heard with its last output; one that is not called is absent."""

    class Twice(Model):
        def forward(self, features: Tensor) -> Tensor:  # type: ignore[override]
            self.head(features * 3)
            return self.head(features)

    model = Twice()
    other = nn.Linear(1, 1)
    found = run_again(call_of(model, features()), {}, heads={"head": model.head, "other": other})
    assert isinstance(found, Replayed)
    assert set(found.logits) == {"head"}
    assert torch.equal(found.logits["head"], model.head(features()))


def test_the_autocast_of_the_call_is_that_of_the_pass() -> None:
    """A call under autocast runs under it again, one without runs without even if one is on now; no cast weight stays in its cache."""
    model, given = Model().eval(), features()
    assert again(call_of(model, given, autocast=torch.bfloat16)).logits["head"].dtype == torch.bfloat16
    assert again(call_of(model, given)).logits["head"].dtype == torch.float32
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert again(call_of(model, given)).logits["head"].dtype == torch.float32
        again(call_of(model, given, autocast=torch.bfloat16))
        model.head(given).sum().backward()
    assert model.head.weight.grad is not None


def test_the_autocast_cache_is_cleared(monkeypatch: pytest.MonkeyPatch) -> None:
    """Older torch would hand a weight that was cast without a graph to the next forward with one: after autocast nothing stays cast."""
    cleared: list[bool] = []
    monkeypatch.setattr(torch, "clear_autocast_cache", lambda: cleared.append(True))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        again(call_of(Model(), features(), autocast=torch.bfloat16))
        assert cleared == [True]


def test_compiled_parts_run_eagerly(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where something is compiled, the pass runs under the stance that runs it eagerly, and only then."""
    opened: list[str] = []

    class Stance:
        def __enter__(self) -> None:
            opened.append("in")

        def __exit__(self, *exception: object) -> None:
            opened.append("out")

    monkeypatch.setattr("probe.counterfactual.replay.force_eager", Stance)
    model = Model()
    run_again(call_of(model, features()), {}, heads={})
    assert opened == []
    run_again(call_of(model, features()), {}, heads={}, compiled=True)
    assert opened == ["in", "out"]
