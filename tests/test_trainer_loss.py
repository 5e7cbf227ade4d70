"""What the Trainer does with a loss: read from its settings, held against what it really backpropagates."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from transformers import Trainer

import models
from models.case import Case
from probe.foreign.trainer_loss import LossSettings, read_loss_settings

LLAMA, WHISPER = models.CASES["llama"], models.CASES["whisper"]
OLD = transformers.__version__.startswith("4.46.")
FIVE = transformers.__version__.startswith("5.")


class Other(Trainer):
    """Overrides what a subclass may."""

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        return super().compute_loss(*args, **kwargs)


def settings(case: Case, **arguments: Any) -> LossSettings:
    return read_loss_settings(case.trainer(case.build(0), samples=4, **arguments))


@pytest.mark.parametrize("accumulation", [1, 4])
@pytest.mark.parametrize("case", [LLAMA, WHISPER], ids=lambda case: case.name)
def test_what_was_backpropagated(case: Case, accumulation: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tensors that backward() is called on add up to what training_step returned, times the share, divided as accelerate does."""
    trainer = case.trainer(case.build(0), samples=4, max_steps=1, per_device_train_batch_size=1, gradient_accumulation_steps=accumulation)
    read = read_loss_settings(trainer)
    backward, step = torch.Tensor.backward, trainer.training_step
    seen: list[float] = []
    returned: list[tuple[float, bool]] = []

    def watched(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        seen.append(self.item())
        return backward(self, *args, **kwargs)

    def watched_step(*args: Any, **kwargs: Any) -> Any:
        loss = step(*args, **kwargs)
        returned.append((float(loss), (args[2] if len(args) > 2 else kwargs.get("num_items_in_batch")) is not None))
        return loss

    monkeypatch.setattr(torch.Tensor, "backward", watched)
    trainer.training_step = watched_step
    trainer.train()
    assert len(seen) == len(returned) == accumulation
    share = 1.0 if returned[0][1] else read.backward_share
    assert sum(seen) == pytest.approx(sum(loss for loss, _ in returned) * share / read.accelerate_divides, rel=1e-6)
    one = sum(seen) / 5.6
    summed = not read.divides(items=returned[0][1]) and case is not LLAMA
    assert one == pytest.approx(accumulation if summed else 1.0, rel=0.05)


def test_only_the_oldest_returns_a_share() -> None:
    """4.46 returns a k-th of what it backpropagates where the labels were not counted; later versions return all of it."""
    assert settings(WHISPER, gradient_accumulation_steps=4).backward_share == (4.0 if OLD else 1.0)
    assert settings(WHISPER).backward_share == 1.0


@pytest.mark.parametrize("case", models.available_cases(), ids=lambda case: case.name)
def test_the_smoother_shifts_causal_language_models_only(case: Case) -> None:
    """Of the models here only Llama's labels are shifted by the Trainer's smoother, whatever the class itself does."""
    read = settings(case, label_smoothing_factor=0.1)
    assert read.smoothing == pytest.approx(0.1)
    assert read.smoother_shifts == (case.name == "llama")
    assert read.smoother_takes_items == FIVE
    assert settings(case).smoothing == 0.0
    assert not settings(case).smoother_shifts


def test_how_labels_are_counted() -> None:
    """Before 5 the first label of each row counts, too; 5.x leaves it out for classes that it takes for shifting ones."""
    llama, whisper = settings(LLAMA), settings(WHISPER)
    assert llama.counts_first == whisper.counts_first == (not FIVE)
    assert (llama.skips_first, whisper.skips_first) == (FIVE, False)
    assert llama.takes_kwargs
    assert whisper.takes_kwargs == FIVE


@pytest.mark.parametrize(
    ("arguments", "alone"),
    [
        ({"logging_steps": 1}, True),
        ({"logging_steps": 2}, False),
        ({"logging_strategy": "epoch"}, False),
        ({"logging_strategy": "no"}, False),
    ],
)
def test_when_a_log_is_of_one_step(arguments: dict[str, Any], alone: bool) -> None:
    """Only with logging_steps=1 a log is of exactly one step."""
    assert settings(LLAMA, **arguments).logs_every_step is alone


def test_filters_and_functions() -> None:
    """The NaN filter and the name of compute_loss_func are read."""

    def my_loss(outputs: Any, labels: Any, num_items_in_batch: Any = None) -> Any:
        return outputs.logits.sum()

    assert settings(LLAMA).hides_nonfinite
    assert not settings(LLAMA, logging_nan_inf_filter=False).hides_nonfinite
    trainer = LLAMA.trainer(LLAMA.build(0), samples=4)
    trainer.compute_loss_func = my_loss
    read = read_loss_settings(trainer)
    assert read.loss_function == "my_loss"
    assert not LossSettings(loss_function="my_loss").divides(items=False)


def test_who_overrides_what() -> None:
    """A method that a subclass or the instance replaces is named; transformers' own subclasses replace none."""
    assert settings(WHISPER).overridden == ()
    original = settings(models.CASES["original"])
    assert original.overridden == (("training_step", "OriginalTrainer"),)
    assert original.backward_share == 1.0
    trainer = Other(model=LLAMA.build(0), args=LLAMA.arguments(gradient_accumulation_steps=2))
    assert read_loss_settings(trainer).overridden == (("compute_loss", "Other"),)
    trainer.get_batch_samples = lambda *args: ([], None)
    assert read_loss_settings(trainer).overridden == (("compute_loss", "Other"), ("get_batch_samples", "the instance"))


def test_peft_is_looked_through() -> None:
    """The class that the smoother asks for is that of the model inside PEFT."""
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(LLAMA.build(0), peft.LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"))
    assert read_loss_settings(LLAMA.trainer(model, samples=4, label_smoothing_factor=0.1)).smoother_shifts


@pytest.mark.parametrize(
    ("change", "word"),
    [
        (lambda trainer: setattr(trainer.args, "_n_gpu", 2), "nn.DataParallel"),
        (lambda trainer: setattr(trainer, "get_tp_size", lambda: 2), "parallelism"),
    ],
)
def test_what_splits_a_batch(change: Callable[[Any], None], word: str) -> None:
    """Replicas and split sequences are named, because only a part of a batch is then seen."""
    trainer = LLAMA.trainer(LLAMA.build(0), samples=4)
    assert read_loss_settings(trainer).split_by == ""
    change(trainer)
    assert word in read_loss_settings(trainer).split_by


@pytest.mark.parametrize(
    ("read", "items", "divides"),
    [
        (LossSettings(takes_kwargs=True), True, False),
        (LossSettings(takes_kwargs=True), False, True),
        (LossSettings(takes_kwargs=False), True, True),
        (LossSettings(takes_kwargs=True, scaled=False), True, True),
        (LossSettings(takes_kwargs=False, scaled=True), False, False),
        (LossSettings(backward_share=4.0), False, False),
    ],
)
def test_who_divides(read: LossSettings, items: bool, divides: bool) -> None:
    """The Trainer divides by the accumulation unless it believes that num_items_in_batch has; 4.46 never does."""
    assert read.divides(items=items) is divides


def test_deepspeed_divides_by_itself() -> None:
    """Under DeepSpeed neither accelerate's divisor nor the share of 4.46 applies: the engine divides once."""
    trainer = WHISPER.trainer(WHISPER.build(0), samples=4, gradient_accumulation_steps=4)
    real = trainer.accelerator
    trainer.accelerator = SimpleNamespace(
        unwrap_model=real.unwrap_model, num_processes=1, gradient_accumulation_steps=4, distributed_type="DistributedType.DEEPSPEED"
    )
    read = read_loss_settings(trainer)
    assert (read.backward_share, read.accelerate_divides) == (1.0, 1)
    trainer.accelerator.distributed_type = "DistributedType.NO"
    assert read_loss_settings(trainer).accelerate_divides == 4
