"""Tests of what other tests measure with: the independent counter of calls, and the comparison of two runs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from transformers import TrainerCallback

import models
from models.case import Case
from models.counting import CallCounter
from models.reference import batch_of
from models.running import VARIANTS, RunResult, assert_identical, run

CASES = [pytest.param(case, id=case.name) for case in models.available_cases()]
SEED = 7


def expected_head_calls(name: str) -> int:
    """Return how often one forward calls a head."""
    return 2 if name.endswith("audio_decoder_proj.audio_lm_head") else 1


@pytest.mark.parametrize("case", CASES)
def test_counter_tells_recompute_and_evaluation_apart(case: Case) -> None:
    """With accumulation, checkpointing and evaluation: one count a training forward, the same as without checkpointing."""
    names = ["", *case.heads, *(name for kind in case.attention.values() for name in kind)]
    names += [name for name in (case.encoder, case.projector) if name]
    counters = {}
    for variant in ("plain", "checkpointing"):
        trainer = case.trainer(case.build(SEED), seed=SEED, max_steps=3, gradient_accumulation_steps=2, **VARIANTS[variant])
        with CallCounter(trainer.model, names) as counters[variant]:
            trainer.train()
            assert counters[variant].elsewhere.total() == 0
            trainer.evaluate()
        assert counters[variant].elsewhere[""] == 2  # four samples in batches of two
    plain, recomputing = counters["plain"], counters["checkpointing"]
    assert plain.micro_batches == recomputing.micro_batches == 6
    assert plain.calls == recomputing.calls
    assert plain.calls[""] == [1] * 6
    assert all(plain.calls[name] == [expected_head_calls(name)] * 6 for name in case.heads)
    assert plain.recomputed.total() == 0
    attention = [name for kind in case.attention.values() for name in kind]
    assert {name for name, count in recomputing.recomputed.items() if count} == {name for name in attention if plain.total(name)}


def test_counter_sees_layerdrop() -> None:
    """Layers that training skips are not counted; those that run are counted by what runs inside them, too."""
    case = models.CASES["whisper"]
    attention = case.attention["encoder"]
    model = case.build(SEED)
    with CallCounter(model, [*attention, *(f"{name}.q_proj" for name in attention)]) as counter:
        case.trainer(model, seed=SEED, max_steps=10).train()
    totals = [counter.total(name) for name in attention]
    assert min(totals) > 0
    assert sum(totals) < 20
    assert all(counter.calls[name] == counter.calls[f"{name}.q_proj"] for name in attention)
    assert all(set(counter.calls[name]) <= {0, 1} for name in attention)


def test_counter_does_not_count_generation_inside_a_step() -> None:
    """A root call without gradients, in training mode, is no training forward."""
    case = models.CASES["llama"]
    model = case.build(SEED).train()
    with CallCounter(model, ["", "lm_head"]) as counter:
        model.generate(batch_of(case)["input_ids"][:, :4], max_new_tokens=3, do_sample=False)
        assert counter.micro_batches == 0
        assert counter.elsewhere["lm_head"] >= 3
        model(**batch_of(case)).loss.backward()
    assert counter.calls == {"": [1], "lm_head": [1]}


def test_counter_leaves_no_trace() -> None:
    """PyTorch's functions are back after the block, after an exception too, and a forward that raised is not counted."""
    case = models.CASES["llama"]
    model = case.build(SEED)
    before = (nn.Module.__call__, torch.autograd.backward, torch.autograd.grad, dict(model.__dict__))
    with pytest.raises(IndexError), CallCounter(model, [""]) as counter:
        model(input_ids=torch.full((1, 3), case.vocabulary))
    assert (nn.Module.__call__, torch.autograd.backward, torch.autograd.grad, dict(model.__dict__)) == before
    assert counter.calls == {"": []}
    assert counter.micro_batches == 0


def test_mixed_precision_does_not_leak() -> None:
    """A run in bf16 differs from one in float32, and leaves the next run as it was."""
    case = models.CASES["llama"]
    before, half, after = (run(case, seed=SEED, max_steps=2, bf16=bf16) for bf16 in (False, True, False))
    assert_identical(before, after)
    with pytest.raises(AssertionError, match="weights"):
        assert_identical(before, half)


def _draw_numpy(model: nn.Module) -> None:
    np.random.rand()


def _draw_torch(model: nn.Module) -> None:
    torch.rand(1)


def _nudge(model: nn.Module) -> None:
    weight = next(model.parameters())
    weight.data.view(-1)[:1] = torch.nextafter(weight.data.view(-1)[:1], torch.tensor(10.0))


@pytest.mark.parametrize(
    ("disturb", "part"),
    [(_draw_numpy, "random state after attach: numpy"), (_draw_torch, "random state after attach: torch"), (_nudge, "weights")],
)
def test_comparison_sees_the_smallest_difference(disturb: Callable[[nn.Module], None], part: str) -> None:
    """One draw from a generator, or one weight off by one unit in its last place, makes two runs differ."""
    case = models.CASES["llama"]
    with pytest.raises(AssertionError, match=part):
        assert_identical(run(case, max_steps=1), run(case, max_steps=1, attach=disturb))


class _Logs(TrainerCallback):
    """Adds entries to every log, or draws random numbers in every step."""

    def __init__(self, key: str = "", draw: Callable[[], Any] = lambda: None) -> None:
        self.key, self.draw = key, draw

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if self.key:
            state.log_history[-1][self.key] = 1.0

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.draw()


def test_comparison_of_logs_and_draws_in_training() -> None:
    """Log keys of the probe's own do not count, others do, and so does a draw within a step."""
    case = models.CASES["llama"]  # it draws nothing from NumPy itself, so the draw must show in the generator alone

    def with_callback(callback: _Logs) -> RunResult:
        return run(case, max_steps=2, built=lambda trainer: trainer.add_callback(callback))

    plain = run(case, max_steps=2)
    assert_identical(plain, with_callback(_Logs("probe/text/loss")))
    with pytest.raises(AssertionError, match=r"logs: .*foreign"):
        assert_identical(plain, with_callback(_Logs("foreign")))
    with pytest.raises(AssertionError, match="random state after training: numpy"):
        assert_identical(plain, with_callback(_Logs(draw=np.random.rand)))
