"""Exactly once: captures are the calls of each site inside training forwards, as an independent counter counts them."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import Trainer, TrainerCallback

import models
import probe
from models.case import Case
from models.counting import CallCounter
from models.running import VARIANTS, RunResult, run
from probe.measure.statistics import summarise
from probe.records import StepRecord
from watching import assert_nothing_failed, attacher, records_of

CASES = [pytest.param(case, id=case.name) for case in models.available_cases()]
SEED = 5
STEPS = 3


class BufferReader(TrainerCallback):
    """A user's callback: at the real end of each step it notes the captures of every site in the step buffer, by micro-batch."""

    def __init__(self, sites: list[str]) -> None:
        self.probe: probe.Probe | None = None
        self.sites = sites
        self.steps: list[dict[str, list[int]]] = []
        self.numbers: list[int | None] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        assert self.probe is not None
        if state.global_step != len(self.steps) + 1:
            return  # the original's trainer fires this event once more, before the step has ended
        self.numbers.append(self.probe.buffer.step)
        self.steps.append({site: [capture.micro_batch for capture in self.probe.buffer[site]] for site in self.sites})


def counted_run(case: Case, **arguments: Any) -> tuple[RunResult, tuple[StepRecord, ...], CallCounter, BufferReader]:
    """Train a case with a probe that observes every step, a counter and a callback that reads the buffer."""
    held: dict[str, Any] = {}

    def attach(model: nn.Module) -> probe.Probe:
        held["probe"] = attacher(every=1)(model)
        return held["probe"]

    def built(trainer: Trainer) -> None:
        sites = [site.name for site in held["probe"].sites.sites if site.role != "model"]
        held["reader"] = BufferReader(sites)
        held["reader"].probe = held["probe"]
        trainer.add_callback(held["reader"])
        held["counter"] = CallCounter(trainer.model, ["", *sites]).__enter__()

    try:
        result = run(case, seed=SEED, attach=attach, built=built, **arguments)
    finally:
        if "counter" in held:
            held["counter"].__exit__()
    result.attached.detach()
    records = records_of(result)
    assert_nothing_failed(records)
    return result, records, held["counter"], held["reader"]


def assert_agrees(
    records: tuple[StepRecord, ...], counter: CallCounter, reader: BufferReader, *, accumulation: int = 1, skip: int = 0
) -> None:
    """Fail unless records and buffer hold, step by step and site by site, the calls that the counter saw.

    Args:
        records: One a step.
        counter: What was counted.
        reader: What the buffer held.
        accumulation: Micro-batches a step.
        skip: Micro-batches at the start that belong to an attempt that was given up.
    """
    assert reader.numbers == [record.step for record in records] == list(range(1, len(records) + 1))
    assert counter.micro_batches == skip + accumulation * len(records)
    for index, record in enumerate(records):
        first = skip + accumulation * index
        window = slice(first, first + accumulation)
        expected = {name: sum(calls[window]) for name, calls in counter.calls.items() if name}
        assert record.inputs is not None
        assert record.inputs.micro_batches == sum(counter.calls[""][window]) == accumulation
        assert {row.site: row.calls for row in record.statistics} == expected
        assert {row.site: row.calls for row in record.attention} == {
            row.site: row.calls for row in record.statistics if row.role == "attention" and row.calls
        }
        assert {head.site: head.calls for head in record.heads} == {head.site: expected[head.site] for head in record.heads}
        where = {name: [i for i, count in enumerate(counter.calls[name][window]) for _ in range(count)] for name in expected}
        assert reader.steps[index] == where


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("case", CASES)
def test_captures_are_calls(case: Case, variant: str) -> None:
    """In every way of training: in the record and in the buffer, one capture a call; recompute is not counted."""
    if variant in case.unsupported:
        pytest.skip(case.unsupported[variant])
    _, records, counter, reader = counted_run(case, max_steps=STEPS, **VARIANTS[variant])
    assert len(records) == STEPS
    assert_agrees(records, counter, reader, accumulation=VARIANTS[variant].get("gradient_accumulation_steps", 1))
    assert bool(counter.recomputed.total()) == variant.startswith("checkpointing")
    if case.name == "original":
        heads = {head.site: head.calls for head in records[0].heads}
        assert heads[case.heads[1]] == 2 * heads[case.heads[0]]
    if case.encoder:
        assert all(r.conditioning is not None and r.conditioning.encoder_calls == counter.total(case.encoder) // STEPS for r in records)


def test_layerdrop() -> None:
    """Layers that training skips are not captured in the steps that skip them, and are named there."""
    case = models.CASES["whisper"]
    _, records, counter, reader = counted_run(case, max_steps=8)
    assert_agrees(records, counter, reader)
    layers = [name for kind in case.attention.values() for name in kind]
    assert 0 < sum(counter.total(name) for name in layers) < 8 * len(layers)
    for record in records:
        skipped = {row.site for row in record.statistics if not row.calls}
        assert {f"site:{site}" for site in skipped} <= set(record.not_measured)


@pytest.mark.parametrize("name", ["whisper", "llama"])
def test_evaluation_and_generation_are_not_mixed_in(name: str) -> None:
    """Evaluation every two steps, with generation where the Trainer can, accumulation on: only training forwards are captured."""
    generation = {"predict_with_generate": True, "generation_max_length": 6} if name == "whisper" else {}
    arguments = {"eval_strategy": "steps", "eval_steps": 2, **VARIANTS["accumulation"], **generation}
    _, records, counter, reader = counted_run(models.CASES[name], max_steps=4, **arguments)
    assert_agrees(records, counter, reader, accumulation=2)
    assert counter.elsewhere[""] >= 2


def test_evaluation_inside_a_step() -> None:
    """A root called without gradients inside ``training_step``, as reinforcement learning generates there, is no micro-batch."""
    case = models.CASES["llama"]

    class Generating(Trainer):
        def compute_loss(self, model: nn.Module, inputs: dict[str, Tensor], *args: Any, **kwargs: Any) -> Any:
            with torch.no_grad():
                model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"])
            model.generate(inputs["input_ids"][:, :3], max_new_tokens=2, do_sample=False, pad_token_id=256)
            return super().compute_loss(model, inputs, *args, **kwargs)

    _, records, counter, reader = counted_run(replace(case, trainer_class=Generating), max_steps=STEPS)
    assert_agrees(records, counter, reader)
    assert counter.elsewhere["lm_head"] >= 2 * STEPS
    assert all(head.shape[1] > 3 for record in records for head in record.heads)


def test_two_forwards_in_one_training_step() -> None:
    """A training step with two training forwards (a contrastive loss) holds two micro-batches."""
    case = models.CASES["llama"]

    class Contrasting(Trainer):
        def compute_loss(self, model: nn.Module, inputs: dict[str, Tensor], *args: Any, **kwargs: Any) -> Any:
            return super().compute_loss(model, dict(inputs), *args, **kwargs) + model(**inputs).loss

    _, records, counter, reader = counted_run(replace(case, trainer_class=Contrasting), max_steps=STEPS)
    assert_agrees(records, counter, reader, accumulation=2)


@pytest.mark.parametrize("fails_at", [1, 2])
def test_retried_step(fails_at: int) -> None:
    """Out of memory in the first or second micro-batch of step 1: what was captured of the attempt is dropped, the retry is counted."""
    case = models.CASES["whisper"]
    calls: list[int] = []

    def build(seed: int) -> nn.Module:
        model = case.build(seed)
        head = model.proj_out.forward

        def failing(hidden: Tensor) -> Tensor:
            calls.append(hidden.shape[0])
            if len(calls) == fails_at:
                raise RuntimeError("CUDA out of memory.")
            return head(hidden)

        model.proj_out.forward = failing
        return model

    _, records, counter, reader = counted_run(
        replace(case, build=build),
        max_steps=2,
        samples=16,
        auto_find_batch_size=True,
        per_device_train_batch_size=4,
        **VARIANTS["accumulation"],
    )
    assert calls[0] == 4 > calls[-1]
    assert_agrees(records, counter, reader, accumulation=2, skip=fails_at - 1)
    assert records[0].inputs is not None
    assert records[0].inputs.samples == sum(calls[fails_at : fails_at + 2])


def test_shared_module() -> None:
    """A module that stands at two places is one site, and each of its calls is captured."""
    layer = nn.Linear(4, 4)
    model = Stack(layer, nn.Linear(4, 4), layer)
    observed = probe.attach(model, every=1, sites={"custom": ["layers.0", "layers.1"]}, settings=probe.Settings(terminal=False))
    with observed.step():
        model(torch.randn(2, 4)).sum().backward()
        captured = [len(observed.buffer[name]) for name in ("layers.0", "layers.1")]
    observed.detach()
    assert captured == [2, 1]


def test_root_that_calls_itself() -> None:
    """A root that calls itself is one micro-batch, and the captures of the inner call belong to it."""
    model = Recursive()
    observed = probe.attach(model, every=1, sites={"custom": ["inner", "last"]}, settings=probe.Settings(terminal=False))
    with observed.step():
        model(torch.randn(2, 4), again=True).sum().backward()
        assert len(observed.buffer.micro_batches) == 1
        assert (len(observed.buffer["inner"]), len(observed.buffer["last"])) == (2, 1)
        model(torch.randn(2, 4)).sum().backward()
        assert [capture.micro_batch for capture in observed.buffer["inner"]] == [0, 0, 1]
    observed.detach()


def test_root_that_calls_itself_without_gradients() -> None:
    """A root that looks at itself without gradients midway is still the same micro-batch when it goes on."""
    model = Recursive()
    observed = probe.attach(model, every=1, sites={"custom": ["inner"]}, settings=probe.Settings(terminal=False))
    with observed.step():
        model(torch.randn(2, 4), glance=True).sum().backward()
        assert len(observed.buffer.micro_batches) == 1
        assert len(observed.buffer["inner"]) == 2
    observed.detach()


def test_checkpointed_root() -> None:
    """A root that runs again as a whole in the backward, because the user checkpoints it, is one micro-batch."""
    model = Stack(nn.Linear(4, 4), nn.Linear(4, 4))
    observed = probe.attach(model, every=1, sites={"custom": ["layers.0"]}, settings=probe.Settings(terminal=False))
    with observed.step():
        checkpoint(model, torch.randn(2, 4), use_reentrant=False).sum().backward()
        assert len(observed.buffer.micro_batches) == 1
        assert len(observed.buffer["layers.0"]) == 1
    observed.detach()


def test_recompute_inside_the_forward() -> None:
    """A model that takes a gradient inside its own forward (a penalty) runs a checkpointed layer again there; that is no capture."""
    model = Penalised()
    observed = probe.attach(model, every=1, sites={"custom": ["inner"]}, settings=probe.Settings(terminal=False))
    with observed.step():
        model(torch.randn(2, 4)).backward()
        assert model.calls == 2
        assert len(observed.buffer["inner"]) == 1
    observed.detach()


def test_two_threads_in_one_step() -> None:
    """Threads that run the same model at once, as nn.DataParallel does: the first to enter is observed, and the record names the rest."""
    waiting = Waiting()
    model = Stack(nn.Linear(4, 4), waiting, nn.Linear(4, 4))
    names = ["layers.0", "layers.1", "layers.2"]
    observed = probe.attach(model, every=1, sites={"custom": names}, settings=probe.Settings(terminal=False))
    failures: list[BaseException] = []

    def forward(rows: int) -> None:
        try:
            model(torch.randn(rows, 4)).sum().backward()
        except BaseException as error:
            failures.append(error)

    with observed.step():
        first = threading.Thread(target=forward, args=(2,))
        first.start()
        assert waiting.inside.wait(20)
        forward(3)  # from its first line to its last while the other one is in the middle of a site
        waiting.go_on.set()
        first.join(20)
        shapes = [[capture.shape for capture in observed.buffer[name]] for name in names]
        micro_batches = len(observed.buffer.micro_batches)
    observed.detach()
    assert failures == []
    assert micro_batches == 1
    assert shapes == [[(2, 4)]] * 3
    assert observed.last is not None
    assert "replica" in observed.last.not_measured["data_parallel"]


def test_compiled_code_is_left_alone() -> None:
    """Code that torch.compile traces inside a step holds no hook of ours: it compiles in one piece, and says nothing to the buffer."""
    model = Stack(nn.Linear(4, 4), nn.Linear(4, 4))
    observed = probe.attach(model, every=1, sites={"custom": ["layers.1"]}, settings=probe.Settings(terminal=False))
    compiled: Callable[[Tensor], Tensor] = torch.compile(model, backend="eager", fullgraph=True)
    with observed.step():
        compiled(torch.randn(2, 4)).sum().backward()
        assert observed.buffer.micro_batches == []
        assert len(observed.buffer) == 0
        model(torch.randn(2, 4)).sum().backward()
        assert len(observed.buffer["layers.1"]) == 1
    observed.detach()


def test_interrupted_step_is_dropped() -> None:
    """A step left by an exception leaves no hook and no capture, and the next one counts from nothing."""
    model = Stack(nn.Linear(4, 4), nn.Linear(4, 4))
    observed = probe.attach(model, every=1, sites={"custom": ["layers.0"]}, settings=probe.Settings(terminal=False))
    with pytest.raises(RuntimeError, match="stop"), observed.step():
        model(torch.randn(2, 4))
        raise RuntimeError("stop")
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert observed.buffer.micro_batches == []
    with observed.step():
        model(torch.randn(2, 4)).sum().backward()
        assert [capture.call for capture in observed.buffer["layers.0"]] == [0]
    observed.detach()
    assert observed.last is not None
    assert observed.last.step == 2


def test_forward_that_raises_midway() -> None:
    """A training forward that raises inside a site and is tried again in the same step leaves no call open; the retry is captured whole."""
    model = Stack(nn.Linear(4, 4), nn.Linear(4, 4))
    observed = probe.attach(model, every=1, sites={"custom": ["layers.0", "layers.1"]}, settings=probe.Settings(terminal=False))
    with observed.step():
        with pytest.raises(RuntimeError):
            model(torch.randn(2, 5))
        model(torch.randn(2, 4)).sum().backward()
        assert [capture.shape for capture in observed.buffer["layers.0"]][-1] == (2, 4)
        assert [capture.micro_batch for capture in observed.buffer["layers.1"]] == [1]
    observed.detach()


def test_hooks_come_before_those_that_stand_already() -> None:
    """A site is seen before post-hooks that were registered earlier run: FSDP's would have taken the weights apart by then."""
    model = Stack(nn.Linear(4, 4))
    observed = probe.attach(model, every=1, sites={"custom": ["layers.0"]}, settings=probe.Settings(terminal=False))
    seen: list[int] = []
    model.layers[0].register_forward_hook(lambda *_: seen.append(len(observed.buffer["layers.0"])))
    with observed.step():
        model(torch.randn(2, 4)).sum().backward()
    observed.detach()
    assert seen == [1]


def test_measuring_runs_without_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    """What hooks compute, before and after a module runs, never becomes a part of the graph."""
    enabled: list[tuple[str, bool]] = []
    for where in ("inputs", "statistics"):  # the root's inputs before it runs, a site's output after

        def noting(x: Tensor, where: str = where, **options: Any) -> Any:
            enabled.append((where, torch.is_grad_enabled()))
            return summarise(x, **options)

        monkeypatch.setattr(f"probe.capture.observers.{where}.summarise", noting)
    model = Stack(nn.Linear(4, 4))
    observed = probe.attach(model, every=1, sites={"custom": ["layers.0"]}, settings=probe.Settings(terminal=False))
    with observed.step():
        model(torch.randn(2, 4)).sum().backward()
    observed.detach()
    assert enabled == [("inputs", False), ("statistics", False)]


class Stack(nn.Module):
    """Runs its layers one after the other."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x: Tensor) -> Tensor:
        """Return what the last layer returns."""
        for layer in self.layers:
            x = layer(x)
        return x


class Recursive(nn.Module):
    """Calls itself once if it is told to."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.last = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor, again: bool = False, glance: bool = False) -> Tensor:
        """Return (N, 4)."""
        if glance:
            with torch.no_grad():
                self(x)
        x = self.inner(x)
        return self.last(self(x)) if again else x


class Penalised(nn.Module):
    """Adds the gradient of a checkpointed layer to its loss."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4)
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        """Return the loss."""
        x = x.requires_grad_()
        y = checkpoint(self._run, x, use_reentrant=False).square().sum()
        (gradient,) = torch.autograd.grad(y, x, retain_graph=False)
        return (self.inner.weight * 2.0).sum() + gradient.sum()

    def _run(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.inner(x)


class Waiting(nn.Module):
    """Lets the first caller go on only when it is told to."""

    def __init__(self) -> None:
        super().__init__()
        self.inside, self.go_on = threading.Event(), threading.Event()

    def forward(self, x: Tensor) -> Tensor:
        """Return what came."""
        if not self.inside.is_set():
            self.inside.set()
            assert self.go_on.wait(20)
        return x * 1.0
