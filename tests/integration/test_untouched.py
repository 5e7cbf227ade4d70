"""Training is untouched: with the probe every number is the same, bit for bit, and the model carries nothing of it."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import Trainer, TrainerCallback

import models
from models.case import Case
from models.running import VARIANTS, RunResult, assert_identical, run
from watching import attacher, observed_run, records_of

CASES = [pytest.param(case, id=case.name) for case in models.available_cases()]
SEED = 11
_HOOKS = (
    "_forward_hooks",
    "_forward_pre_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_pre_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_state_dict_hooks",
    "_state_dict_pre_hooks",
    "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
)


def compare(case: Case, *, every: int, **arguments: Any) -> tuple[RunResult, RunResult]:
    """Train without and with a probe, and fail unless all is identical."""
    plain = run(case, seed=SEED, **arguments)
    watched, _ = observed_run(case, options={"every": every, "keep": {"audio_encoder", "lm_head"}}, seed=SEED, **arguments)
    assert_identical(plain, watched)
    return plain, watched


@pytest.mark.parametrize("case", CASES)
def test_twenty_steps(case: Case) -> None:
    """Dropout, layerdrop and SpecAugment on: losses, gradient norms, weights, optimizer and generators are bit-identical over 20 steps."""
    plain, watched = compare(case, every=3)
    assert [record.step for record in records_of(watched)] == [1, 3, 6, 9, 12, 15, 18]
    assert list(plain.state_dict) == list(watched.state_dict)
    assert attributes(plain.model) == attributes(watched.model)


@pytest.mark.parametrize("variant", [name for name in VARIANTS if name != "plain"])
@pytest.mark.parametrize("case", CASES)
def test_twenty_steps_of_each_way_of_training(case: Case, variant: str) -> None:
    """With accumulation, both kinds of checkpointing and bf16, observing every second of 20 steps changes no bit."""
    if variant in case.unsupported:
        pytest.skip(case.unsupported[variant])
    _, watched = compare(case, every=2, **VARIANTS[variant])
    assert [record.step for record in records_of(watched)] == [1, *range(2, 21, 2)]


def test_accumulation_with_checkpointing() -> None:
    """Both together, on the model with layerdrop."""
    compare(models.CASES["whisper"], every=1, max_steps=3, **VARIANTS["accumulation"], **VARIANTS["checkpointing"])


@pytest.mark.parametrize("name", ["whisper", "llama"])
def test_label_smoothing(name: str) -> None:
    """The Trainer pops the labels before the forward; the run is the same, and the record tells the loss without smoothing."""
    case = models.CASES[name]
    if name == "whisper":  # without labels the model cannot make its decoder's input itself
        case = replace(case, collate=lambda samples: with_decoder_input(models.CASES[name].collate(samples)))
    _, watched = compare(case, every=1, max_steps=4, label_smoothing_factor=0.1)
    unsmoothed = run(case, seed=SEED, max_steps=1)
    measured = records_of(watched)[0].metrics["probe/text/loss"]
    assert measured == pytest.approx(unsmoothed.losses[0], abs=1e-4)  # 4.46 logs four digits
    assert abs(measured - watched.losses[0]) > 1e-4


@pytest.mark.parametrize("name", ["whisper", "llama"])
def test_evaluation_between_steps(name: str) -> None:
    """Evaluation (with generation where the Trainer can) every two steps: training and evaluation losses are the same."""
    case = models.CASES[name]
    generation = {"predict_with_generate": True, "generation_max_length": 6} if name == "whisper" else {}
    plain, watched = compare(case, every=1, max_steps=4, eval_strategy="steps", eval_steps=2, **generation)
    for result in (plain, watched):
        assert sum("eval_loss" in entry for entry in result.log_history) == 2


@pytest.mark.parametrize("kernel", ["eager", "sdpa"])
@pytest.mark.parametrize("name", ["whisper", "llama"])
def test_attention_kernels(name: str, kernel: str) -> None:
    """Under either kernel, and attention is observed under both."""
    case = with_kernel(models.CASES[name], kernel)
    plain, watched = compare(case, every=1, max_steps=4)
    assert plain.model.config._attn_implementation == kernel
    for record in records_of(watched):
        assert record.attention and all(row.entropy is not None and row.how for row in record.attention)
        assert {row.how for row in record.attention} == {"materialised softmax" if kernel == "eager" else "recomputed from q and k"}


def test_retried_step() -> None:
    """A step that runs out of memory once and is tried again with a smaller batch learns the same with the probe."""
    runs = []
    for attach in (None, attacher(every=1)):
        case = replace(models.CASES["whisper"], build=lambda seed: failing_once(models.CASES["whisper"].build(seed)))
        runs.append(run(case, seed=SEED, attach=attach, max_steps=3, auto_find_batch_size=True, per_device_train_batch_size=4))
    runs[1].attached.detach()
    assert_identical(*runs)
    assert len(records_of(runs[1])) == 3


_FIRST_ATTACH = """
import random, sys
import numpy as np, torch, transformers
from models import CASES
from models.running import rng_states
model, before = CASES["llama"].build(0), rng_states()
assert "rich" not in sys.modules, "the test shows nothing if rich is there already"
import probe
probe.attach(model).detach()
assert "rich" in sys.modules
after = rng_states()
assert after["python"] == before["python"], "python"
assert all(np.array_equal(a, b) for a, b in zip(after["numpy"], before["numpy"])), "numpy"
assert torch.equal(after["torch"], before["torch"]), "torch"
"""


def test_first_attach_of_a_process_draws_no_random_number() -> None:
    """What is loaded only then (rich draws from Python's generator as it loads) leaves every generator as it was."""
    tests = Path(__file__).parents[1]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tests), str(tests.parent)])}
    done = subprocess.run([sys.executable, "-c", _FIRST_ATTACH], env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr


class Lookout(TrainerCallback):
    """Notes at both ends of each step which hooks stand anywhere in the model, and what each module's dictionary holds."""

    def __init__(self, root: nn.Module) -> None:
        self.root = root
        self.found: list[str] = []
        self.seen: list[str] = []

    def look(self, when: str) -> None:
        self.seen.append(when)
        self.found += [f"{when}: {name}" for name in hooks_on(self.root)]

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.look(f"begin of {state.global_step + 1}")

    def on_substep_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.look(f"substep of {state.global_step + 1}")

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.look(f"gradients of {state.global_step + 1}")

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.look(f"end of {state.global_step}")


@pytest.mark.parametrize("case", CASES)
def test_no_hook_stands_between_steps(case: Case) -> None:
    """In all callbacks of every step, and after training, no module and no parameter has a hook; the probe did observe the steps."""
    lookouts: list[Lookout] = []

    def built(trainer: Trainer) -> None:
        lookouts.append(Lookout(trainer.model))
        trainer.add_callback(lookouts[0])

    if case.name == "original":  # its trainer fires on_step_end inside training_step, where hooks do stand
        case = replace(case, trainer_class=Trainer)
    result, records = observed_run(case, built=built, max_steps=2, **VARIANTS["accumulation"])
    assert len(records) == 2
    assert len(lookouts[0].seen) >= 8
    assert lookouts[0].found == [] == hooks_on(result.model)


def test_hooks_stand_inside_sampled_steps_only() -> None:
    """Inside the forward of a sampled step there are hooks; inside that of another step there are none."""
    case = models.CASES["llama"]
    standing: list[bool] = []

    def watch(seed: int) -> nn.Module:
        model = case.build(seed)
        norm = model.model.norm
        forward = norm.forward

        def noting(hidden_states: torch.Tensor) -> torch.Tensor:
            standing.append(bool(hooks_on(model)))
            return forward(hidden_states)

        norm.forward = noting
        return model

    observed_run(replace(case, build=watch), options={"every": 3}, max_steps=4)
    assert standing == [True, False, True, False]


def test_hooks_of_others_survive() -> None:
    """Hooks that the user registered before are there afterwards, in their order, and were called as often as without the probe."""
    case = models.CASES["llama"]
    calls: list[str] = []

    def build(seed: int) -> nn.Module:
        model = case.build(seed)
        for name in ("first", "second"):
            model.lm_head.register_forward_hook(lambda *_, name=name: calls.append(name))
        return model

    result, _ = observed_run(replace(case, build=build), max_steps=3)
    assert calls == ["first", "second"] * 3
    assert len(result.model.lm_head._forward_hooks) == 2


def hooks_on(model: nn.Module) -> list[str]:
    """Return every hook that stands in a model, by module or parameter."""
    found = [f"{name or 'root'}.{kind}" for name, module in model.named_modules() for kind in _HOOKS if getattr(module, kind, None)]
    for name, parameter in model.named_parameters():
        if parameter._backward_hooks or getattr(parameter, "_post_accumulate_grad_hooks", None):
            found.append(f"{name} gradient")
    return found


def attributes(model: nn.Module) -> dict[str, list[str]]:
    """Return what each module's dictionary holds, by name."""
    return {name: sorted(vars(module)) for name, module in model.named_modules()}


def with_kernel(case: Case, kernel: str) -> Case:
    """Return the case with another attention implementation."""

    def build(seed: int) -> nn.Module:
        model = case.build(seed)
        model.config._attn_implementation_internal = None  # 4.46 prefers what was chosen before to what is asked for
        torch.manual_seed(seed)
        return type(model)._from_config(model.config, attn_implementation=kernel)

    return replace(case, build=build)


def with_decoder_input(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the batch with the labels shifted right, as transformers' own collator adds them for label smoothing."""
    start = torch.full_like(batch["labels"][:, :1], 257)
    shifted = torch.cat([start, batch["labels"][:, :-1]], dim=1)
    return {**batch, "decoder_input_ids": shifted.masked_fill(shifted == -100, 256)}


def failing_once(model: nn.Module) -> nn.Module:
    """Return the model with a head that runs out of memory at its first call."""
    forward: Callable[..., Any] = model.proj_out.forward
    state = {"failed": False}

    def failing(hidden: torch.Tensor) -> torch.Tensor:
        if not state["failed"]:
            state["failed"] = True
            raise RuntimeError("CUDA out of memory.")
        return forward(hidden)

    model.proj_out.forward = failing
    return model
