"""Bounded and without waiting: what the probe adds to a step, counted in tensor operations, synchronisations and bytes."""

from __future__ import annotations

import gc
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback

import costs
import models
import probe
from benchmarks.overhead.counting import SYNCS
from models.case import Case
from models.running import VARIANTS, assert_identical, run
from probe.attachment import REGISTRY
from watching import attacher, observed_run

CASES = [pytest.param(case, id=case.name) for case in models.available_cases()]
SEED = 3
# Methods of tensors by which Python reads their values.
_READS = ("item", "tolist", "numpy", "cpu", "__bool__", "__float__", "__int__", "__index__", "__array__", "nonzero", "is_nonzero", "equal")


class Operators(TorchDispatchMode):
    """Notes the name of each operator that is dispatched, and what of it would be a synchronisation."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        indices = args[1] if name in ("index", "index_put", "index_put_", "_index_put_impl_") else ()
        if any(isinstance(index, Tensor) and index.dtype in (torch.bool, torch.uint8) for index in indices):
            name = "nonzero"  # indexing by a mask looks for the places where it is true
        self.names.append(name)
        return func(*args, **(kwargs or {}))


class Reads(TorchFunctionMode):
    """Notes calls by which Python reads tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if name in _READS:
            self.names.append(name)
        return func(*args, **(kwargs or {}))


class Marks(TrainerCallback):
    """Cuts the list of operators into steps and what lies before each of them (the log of the step before, among others)."""

    def __init__(self, operators: Operators) -> None:
        self.operators = operators
        self.before: list[list[str]] = []
        self.steps: list[list[str]] = []

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.before.append(self.operators.names)
        self.operators.names = []

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step > len(self.steps):
            self.steps.append(self.operators.names)
            self.operators.names = []


def operators_by_step(case: Case, attach: Callable[[nn.Module], Any] | None, **arguments: Any) -> Marks:
    """Train and return the operators of each step, and of what lies before it."""
    operators = Operators()
    marks = Marks(operators)

    def built(trainer: Trainer) -> None:
        trainer.add_callback(marks)
        train = trainer.train

        def counted(*args: Any, **kwargs: Any) -> Any:
            with operators:
                return train(*args, **kwargs)

        trainer.train = counted

    result = run(case, seed=SEED, attach=attach, built=built, **arguments)
    if result.attached is not None:
        result.attached.detach()
    return marks


@pytest.mark.parametrize("case", CASES)
def test_other_steps_cost_no_operation(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every step that is not sampled runs the very operators of a run without the probe, in their order; no hook is registered for it."""
    registered: Counter[int] = Counter()
    step = {"now": 1}
    register = nn.Module.register_forward_hook

    def noting(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        registered[step["now"]] += 1
        return register(module, *args, **kwargs)

    class Steps(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            step["now"] = state.global_step + 1

    plain = operators_by_step(case, None, max_steps=6)
    monkeypatch.setattr(nn.Module, "register_forward_hook", noting)

    def attach(model: nn.Module) -> probe.Probe:
        return attacher(every=4)(model)

    watched = operators_by_step(replace(case, trainer_class=with_callback(case, Steps)), attach, max_steps=6)
    same = [index + 1 for index in range(6) if watched.steps[index] == plain.steps[index]]
    assert same == [2, 3, 5, 6]
    assert len(watched.steps[0]) > len(plain.steps[0])
    for index in range(1, 6):  # between steps: the record of a sampled one becomes an array, which detaches a tensor
        published = ["detach"] if index in (1, 4) else []
        assert list((Counter(watched.before[index]) - Counter(plain.before[index])).elements()) == published
    assert set(registered) == {1, 4}


@pytest.mark.parametrize("variant", ["plain", "accumulation"])
@pytest.mark.parametrize("case", CASES)
def test_sampled_steps_add_no_synchronisation(case: Case, variant: str) -> None:
    """A sampled step dispatches as many operators that would make the host wait for the device as the same step without the probe."""
    plain = operators_by_step(case, None, max_steps=2, **VARIANTS[variant])
    watched = operators_by_step(case, attacher(every=1, keep={"audio_encoder"}), max_steps=2, **VARIANTS[variant])
    extra = Counter(name for step in watched.steps for name in step if name in SYNCS)
    extra.subtract(name for step in plain.steps for name in step if name in SYNCS)
    assert {name: count for name, count in extra.items() if count} == {}


@pytest.mark.parametrize("name", ["whisper", "llama"])
def test_hooks_on_a_device_read_nothing(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a device that is not the host (here one without any data, where reading raises), hooks read no value of any tensor."""
    case = models.CASES[name]
    pretend_autocast_knows_meta(monkeypatch)
    batch = dict(case.collate([case.dataset(3, SEED)[index] for index in range(3)]))
    batch.pop("attention_mask", None)  # transformers itself reads it to choose a kernel
    model = case.build(SEED).train()
    if hasattr(model.config, "apply_spec_augment"):
        model.config.apply_spec_augment = False  # it counts on the host
    model = model.to("meta")
    batch = {key: value.to("meta") for key, value in batch.items()}
    observed = probe.attach(model, every=1, budget_mib=64, keep={"*"}, settings=probe.Settings(terminal=False))
    with Reads() as plain:
        model(**batch).loss.backward()
    with observed.step():
        with Reads() as reads:
            model(**batch).loss.backward()
        captured = {site.name: len(observed.buffer[site.name]) for site in observed.sites.sites if site.role != "model"}
        failures = dict(observed._loop.observation.breaker.failures)
        observed._loop.observation._hooks.remove()
    REGISTRY.remove(model)
    assert failures == {}
    assert sum(captured.values()) > 2
    assert reads.names == plain.names


@pytest.mark.parametrize("case", CASES)
def test_tiny_budget(case: Case) -> None:
    """With a budget that holds next to nothing, the buffer stays in it, every tensor left out is named, and training is the same."""
    peaks: list[tuple[int, int]] = []
    kept: list[Tensor] = []
    held: dict[str, probe.Probe] = {}

    class Reader(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            buffer = held["probe"].buffer
            peaks.append((buffer.bytes, buffer.budget_bytes))
            kept.extend(c.tensor for site in held["probe"].sites.sites for c in buffer[site.name] if c.tensor is not None)

    def built(trainer: Trainer) -> None:
        if REGISTRY.get(trainer.model) is not None:
            held["probe"] = REGISTRY.get(trainer.model)
            trainer.add_callback(Reader())

    plain = run(case, seed=SEED, max_steps=2)
    watched, records = observed_run(case, options={"budget_mib": 0.02, "keep": {"*"}}, seed=SEED, max_steps=2, built=built)
    assert_identical(plain, watched)
    assert len(peaks) >= 2
    assert all(used <= budget for used, budget in peaks)
    assert sum(tensor.numel() * tensor.element_size() for tensor in kept) <= 2 * 0.02 * 2**20 * 2
    for record in records:
        left_out = {what for what, why in record.not_measured.items() if "would exceed the budget" in why}
        assert left_out
        assert all("budget_mib=" in record.not_measured[what] for what in left_out)
        called = {row.site for row in record.statistics if row.calls}
        assert {f"kept:{site}" for site in called} & left_out


def test_kept_tensors_fit_a_sufficient_budget() -> None:
    """With room enough each kept tensor is there and counted; once the next step begins it is freed."""
    case = models.CASES["llama"]
    seen: list[tuple[int, int]] = []
    held: dict[str, probe.Probe] = {}

    class Reader(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            assert held["probe"].buffer.bytes == 0
            assert len(held["probe"].buffer) == 0

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            (capture,) = held["probe"].buffer["lm_head"]
            seen.append((held["probe"].buffer.bytes, capture.tensor.numel() * 4))

    def built(trainer: Trainer) -> None:
        held["probe"] = REGISTRY.get(trainer.model)
        trainer.add_callback(Reader())

    observed_run(case, options={"keep": {"lm_head"}}, seed=SEED, max_steps=2, built=built)
    assert len(seen) == 2
    assert all(used > size > 0 for used, size in seen)


def test_large_vocabulary() -> None:
    """A head with many rows: beyond the step's own peak only a few chunks are needed, and no logits stay after the forward."""
    torch.manual_seed(SEED)
    config = LlamaConfig(vocab_size=65_536, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2)
    model = LlamaForCausalLM(config)
    ids = torch.randint(0, 65_536, (2, 192))
    logits_mib = 2 * 192 * 65_536 * 4 / 2**20

    def large() -> list[Tensor]:
        gc.collect()
        tensors = [each for each in gc.get_objects() if issubclass(type(each), Tensor)]  # a dead weak proxy has no class
        return [tensor for tensor in tensors if tensor.numel() * tensor.element_size() > logits_mib * 2**19]

    def step() -> None:
        model(input_ids=ids, labels=ids).loss.backward()
        model.zero_grad()

    before = large()  # what tests before this one left in the process

    plain = costs.peak_mib(step)
    observed = probe.attach(model, every=1, settings=probe.Settings(terminal=False))

    def watched() -> None:
        with observed.step():
            step()

    peak = costs.peak_mib(watched)
    with observed.step():
        model(input_ids=ids, labels=ids).loss.backward()
        assert [tensor.shape for tensor in large() if all(tensor is not old for old in before)] == []
    observed.detach()
    assert logits_mib == 96
    assert peak - plain < 4 * 8 + 4


def pretend_autocast_knows_meta(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let questions about autocast on the meta device be answered; torch raises there."""
    enabled, autocast = torch.is_autocast_enabled, torch.autocast
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device="cpu": device != "meta" and enabled(device))

    def known(device_type: str, *args: Any, **kwargs: Any) -> Any:
        return autocast("cpu" if device_type == "meta" else device_type, *args, **kwargs)

    monkeypatch.setattr(torch, "autocast", known)


def with_callback(case: Case, callback: type[TrainerCallback]) -> type[Trainer]:
    """Return the case's Trainer, with one more callback."""

    class WithCallback(case.trainer_class):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self.add_callback(callback)

    return WithCallback
