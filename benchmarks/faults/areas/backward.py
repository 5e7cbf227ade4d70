"""Faults of the backward pass, the gradients and the updates."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from benchmarks.faults.areas.setup import HIGGS, LLAMA, ORIGINAL, QWEN, VOXTRAL, WHISPER
from benchmarks.faults.fault import Kind, kind
from benchmarks.faults.training import Training, of, returning


class WithoutBackward:
    """The trainer that this project grew out of: it computes the loss, logs it, and returns."""

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        """Return the loss."""
        model.train()
        with self.compute_loss_context_manager():
            return model(**self._prepare_inputs(inputs)).loss


def no_backward(training: Training) -> None:
    """``training_step`` is overridden to get at the outputs, and never calls ``backward``."""
    training.mixins.append(WithoutBackward)


class DetachedLoss:
    """A Trainer that silences "does not require grad" the wrong way."""

    def compute_loss(self, model: nn.Module, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None) -> Any:
        """Return a loss that is a leaf."""
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True, num_items_in_batch=num_items_in_batch)
        loss = loss.detach().requires_grad_()
        return (loss, outputs) if return_outputs else loss


def loss_detached(training: Training) -> None:
    """``compute_loss`` returns ``loss.detach().requires_grad_()``: backward runs and reaches nothing."""
    training.mixins.append(DetachedLoss)


class Weighted:
    """A Trainer that weighs the loss."""

    weight = 1.0

    def compute_loss(self, model: nn.Module, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None) -> Any:
        """Return the weighted loss."""
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True, num_items_in_batch=num_items_in_batch)
        loss = loss * self.weight
        return (loss, outputs) if return_outputs else loss


def loss_weight_zero(training: Training) -> None:
    """The only loss is weighted by a coefficient that the config left at 0."""
    training.mixins.append(type("WeightedByZero", (Weighted,), {"weight": 0.0}))


def projector_detached(training: Training) -> None:
    """The projector's output is detached: neither projector nor encoder gets a gradient."""
    training.models.append(lambda model: returning(of(model, training.case.projector), lambda out: out.detach()))


def encoder_without_grad(training: Training) -> None:
    """The encoder's forward was written for inference, under ``torch.no_grad``, but its parameters are to train."""

    def silent(model: nn.Module) -> None:
        encoder = of(model, training.case.encoder)
        encoder.forward = torch.no_grad()(encoder.forward)

    training.models.append(silent)


def decoder_detached_from_head(training: Training) -> None:
    """The hidden states are detached before the LM head: the head alone trains."""

    def cut(model: nn.Module) -> None:
        head = of(model, training.case.heads[0])
        forward = head.forward
        head.forward = lambda hidden: forward(hidden.detach())

    training.models.append(cut)


def audio_branch_detached(training: Training) -> None:
    """The audio branch of the dual feed-forward layers is detached."""

    def cut(model: nn.Module) -> None:
        for layer in training.case.dual_layers:
            returning(of(model, f"{layer}.audio_mlp"), lambda out: out.detach())

    training.models.append(cut)


def reentrant_checkpoint_on_frozen_input(training: Training) -> None:
    """Reentrant checkpointing below a frozen embedding: no input requires a gradient, so the layers get none."""
    training.arguments.update(gradient_checkpointing=True, gradient_checkpointing_kwargs={"use_reentrant": True})

    def freeze(model: nn.Module) -> None:
        model.get_input_embeddings().requires_grad_(False)
        model.enable_input_require_grads = lambda: None  # transformers 5 makes up for the fault; models of one's own do not

    training.models.append(freeze)


def optimizer_knows_one_part(training: Training) -> None:
    """The optimizer was built from the projector's parameters alone, though everything else is meant to train, too."""

    def partly(trainer: Any) -> None:
        trainer.optimizer = torch.optim.AdamW(of(trainer.model, training.case.projector).parameters(), lr=1e-3)

    training.trainers.append(partly)


def learning_rate_zero(training: Training) -> None:
    """The learning rate is 0."""
    training.arguments["learning_rate"] = 0.0


def schedule_ends_early(training: Training) -> None:
    """The scheduler was made for 3 steps (epochs taken for steps): the learning rate is 0 from then on."""

    def short(trainer: Any) -> None:
        trainer.create_optimizer()
        trainer.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(trainer.optimizer, lambda step: max(0.0, 1 - step / 3))

    training.trainers.append(short)


def learning_rate_tiny(training: Training) -> None:
    """The learning rate is 1e-12, below what float32 weights can resolve."""
    training.arguments["learning_rate"] = 1e-12


def _in_bf16(training: Training, rate: float) -> None:
    training.models.append(lambda model: model.to(torch.bfloat16))
    training.arguments["learning_rate"] = rate
    name = training.features_name

    def cast(fields: dict[str, Any]) -> dict[str, Any]:
        return {**fields, name: fields[name].to(torch.bfloat16)} if name in fields else fields

    training.batches.append(cast)


def bf16_weights_with_rate_1e_6(training: Training) -> None:
    """The weights themselves are bfloat16 and the learning rate is 1e-6: the updates are lost to rounding."""
    _in_bf16(training, 1e-6)


def bf16_weights_with_rate_1e_5(training: Training) -> None:
    """``torch_dtype=bfloat16`` and the usual learning rate of 1e-5: most updates are less than half a unit in the last place."""
    _in_bf16(training, 1e-5)


class PullsToStart:
    """A Trainer that pulls the weights to where they started, by the norm (not its square) of the difference."""

    def compute_loss(self, model: nn.Module, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None) -> Any:
        """Add the norm; its gradient at 0 is 0/0."""
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True, num_items_in_batch=num_items_in_batch)
        drift = sum((p - p.detach()).pow(2).sum() for p in model.parameters() if p.requires_grad)
        loss = loss + 0.01 * torch.sqrt(drift)
        return (loss, outputs) if return_outputs else loss


def gradient_of_root_at_zero(training: Training) -> None:
    """A regulariser takes the square root of 0: the loss is right, its gradient is NaN."""
    training.mixins.append(PullsToStart)


class At(TrainerCallback):
    """Does something to the model at the beginning of one step."""

    def __init__(self, step: int, change: Callable[[dict[str, Any]], None]) -> None:
        self.step, self.change = step, change

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Do it."""
        if state.global_step == self.step:
            self.change(kwargs)


def later(training: Training, step: int, change: Callable[[dict[str, Any]], None]) -> None:
    """Have ``change`` called with what a callback gets after ``step`` steps."""
    training.onset = step
    training.trainers.append(lambda trainer: trainer.add_callback(At(step, change)))


def loss_weight_jumps(training: Training) -> None:
    """After 14 steps a second stage weighs the loss 100,000 times as much."""
    mixin = type("WeightedLater", (Weighted,), {})
    training.mixins.append(mixin)

    def jump(kwargs: dict[str, Any]) -> None:
        mixin.weight = 1e5

    later(training, 14, jump)


def gradient_clipped_away(training: Training) -> None:
    """``max_grad_norm`` is 1e-4, from a recipe whose loss was scaled: every gradient is clipped to a ten-thousandth."""
    training.arguments["max_grad_norm"] = 1e-4


def encoder_gradient_multiplied(training: Training) -> None:
    """The encoder's output passes a gradient multiplier (``feature_grad_mult`` of fairseq) of 1e-8."""
    scale = 1e-8
    training.models.append(lambda model: returning(of(model, training.case.encoder), lambda out: out * scale + out.detach() * (1 - scale)))


_NOTHING_MOVES = ("learning-rate-too-small", "part-without-gradient", "adapters-without-effect")
_NONFINITE = ("gradient-not-finite", "loss-not-finite", "activation-not-finite")

KINDS: tuple[Kind, ...] = (
    kind("backward", "backward-never-ran", no_backward, LLAMA, WHISPER, ORIGINAL, HIGGS, also=["loss-not-connected", *_NOTHING_MOVES]),
    kind("backward", "backward-never-ran", loss_detached, QWEN, LLAMA, also=["loss-not-connected", *_NOTHING_MOVES]),
    kind("backward", "loss-not-connected", loss_weight_zero, VOXTRAL, LLAMA, also=["loss-off", "backward-never-ran", *_NOTHING_MOVES]),
    kind("backward", "part-without-gradient", projector_detached, QWEN, VOXTRAL, ORIGINAL, also=["reference-ignored"]),
    kind("backward", "part-without-gradient", encoder_without_grad, QWEN, WHISPER),
    kind("backward", "part-without-gradient", decoder_detached_from_head, LLAMA),
    kind("backward", "part-without-gradient", audio_branch_detached, HIGGS, ORIGINAL, also=["branch-dead"]),
    kind("backward", "part-without-gradient", reentrant_checkpoint_on_frozen_input, LLAMA),
    kind("updates", "learning-rate-too-small", optimizer_knows_one_part, VOXTRAL, QWEN, also=["update-lost-to-rounding"]),
    kind("updates", "learning-rate-zero", learning_rate_zero, LLAMA, WHISPER, also=["learning-rate-too-small"]),
    kind("updates", "learning-rate-zero", schedule_ends_early, QWEN, HIGGS, also=["learning-rate-too-small"]),
    kind("updates", "learning-rate-too-small", learning_rate_tiny, HIGGS, WHISPER),
    kind("updates", "update-lost-to-rounding", bf16_weights_with_rate_1e_6, LLAMA, HIGGS, also=["learning-rate-too-small"]),
    kind("updates", "update-lost-to-rounding", bf16_weights_with_rate_1e_5, WHISPER, also=["learning-rate-too-small"]),
    kind("backward", "gradient-not-finite", gradient_of_root_at_zero, QWEN, LLAMA, also=["loss-off", *_NONFINITE]),
    kind("backward", "gradient-exploding", loss_weight_jumps, LLAMA, WHISPER, also=["loss-off", "loss-scaled-by-accumulation"]),
    kind("backward", "gradient-exploding", gradient_clipped_away, VOXTRAL, LLAMA, also=["learning-rate-too-small"]),
    kind("backward", "gradient-vanishing", encoder_gradient_multiplied, QWEN, WHISPER, also=["part-without-gradient"]),
)
