"""Faults of the loss and of the activations: scaling, what is left out of the loss, NaN, exploding and vanishing layers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.faults.areas.backward import Weighted, later
from benchmarks.faults.areas.setup import HIGGS, LLAMA, ORIGINAL, QWEN, VOXTRAL, WHISPER
from benchmarks.faults.fault import Kind, kind
from benchmarks.faults.training import Training, of


class MeanOfMicroBatch:
    """A Trainer with the ``compute_loss`` of many scripts: it takes ``num_items_in_batch`` and does not use it."""

    def compute_loss(self, model: nn.Module, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None) -> Any:
        """Return the model's own mean over the micro-batch."""
        outputs = model(**inputs)
        return (outputs.loss, outputs) if return_outputs else outputs.loss


def accumulation_not_divided(training: Training) -> None:
    """``compute_loss`` ignores ``num_items_in_batch``, so with 4 micro-batches a step the loss is 4 times too large."""
    training.mixins.append(MeanOfMicroBatch)
    training.arguments["gradient_accumulation_steps"] = 4


def whisper_with_accumulation(training: Training) -> None:
    """Nothing is changed but ``gradient_accumulation_steps=4``: this version of transformers scales Whisper's loss by it."""
    training.arguments["gradient_accumulation_steps"] = 4


def loss_times_three(training: Training) -> None:
    """A weight of 3 for the only task was left in ``compute_loss``."""
    training.mixins.append(type("WeightedByThree", (Weighted,), {"weight": 3.0}))


class NoShift:
    """A Trainer that computes the loss of a decoder-only model without shifting the labels."""

    def compute_loss(self, model: nn.Module, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None) -> Any:
        """Compare the logits of a position with the label of that position."""
        outputs = model(**inputs)
        logits, labels = outputs.logits, inputs["labels"]
        loss = nn.functional.cross_entropy(logits.float().flatten(0, 1), labels.flatten(), ignore_index=-100)
        return (loss, outputs) if return_outputs else loss


def loss_without_shift(training: Training) -> None:
    """``compute_loss`` calls ``cross_entropy(logits, labels)`` without the shift by one: the model learns to copy its input."""
    training.mixins.append(NoShift)


class TextLossOnly:
    """A Trainer that leaves the audio loss out."""

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        """Backward of the text loss."""
        model.train()
        loss = model(**self._prepare_inputs(inputs)).llm_loss
        self.accelerator.backward(loss)
        return loss.detach()


class WithoutAudioLabels:
    """A Trainer that does not hand the audio labels on."""

    def compute_loss(self, model: nn.Module, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None) -> Any:
        """Take them out of the batch."""
        inputs = {name: value for name, value in inputs.items() if name != "audio_labels"}
        return super().compute_loss(model, inputs, return_outputs=return_outputs, num_items_in_batch=num_items_in_batch)


def audio_loss_left_out(training: Training) -> None:
    """Only the text loss is trained, although the batch has audio labels."""
    training.mixins.append(TextLossOnly if training.case.name == ORIGINAL else WithoutAudioLabels)


def audio_labels_masked(training: Training) -> None:
    """The collator's mask for the reference covers the target, too: every audio label is -100."""
    name = "label_audio_ids" if training.case.name == ORIGINAL else "audio_labels"
    training.batches.append(lambda fields: {**fields, name: torch.full_like(fields[name], -100)})


class LogOfZero:
    """A Trainer with an auxiliary loss."""

    def compute_loss(self, model: nn.Module, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None) -> Any:
        """Add 0 times the log of 0."""
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True, num_items_in_batch=num_items_in_batch)
        share = (inputs["labels"] == -1).float().mean()  # of a token that no batch has
        loss = loss + share * torch.log(share)
        return (loss, outputs) if return_outputs else loss


def auxiliary_loss_of_log_zero(training: Training) -> None:
    """An entropy term takes ``p * log(p)`` at p = 0: the loss is NaN, the model itself is not."""
    training.mixins.append(LogOfZero)


def _weights(model: nn.Module, name: str) -> Tensor:
    return of(model, name).weight


def nan_in_one_weight(training: Training) -> None:
    """One element of one weight is NaN, from a checkpoint that was saved while it diverged."""
    layer = next(iter(training.case.attention.values()))[-1]

    def spoil(model: nn.Module) -> None:
        with torch.no_grad():
            next(p for n, p in of(model, layer).named_parameters() if n.endswith("weight"))[0, 0] = float("nan")

    training.models.append(spoil)


def _scale_layer(model: nn.Module, layer: str, factor: float) -> None:
    with torch.no_grad():
        for name, parameter in of(model, layer).named_parameters():
            if "v_proj" in name or "o_proj" in name or "out_proj" in name:
                parameter.mul_(factor)


def layer_explodes(training: Training) -> None:
    """After 14 steps the values and outputs of one attention layer are 1,000 times too large (an averaging of weights gone wrong)."""
    layer = next(iter(training.case.attention.values()))[-1]
    later(training, 14, lambda kwargs: _scale_layer(kwargs["model"], layer, 1e3))


def learning_rate_jumps(training: Training) -> None:
    """After 14 steps the learning rate is 3: a restart of the schedule in percent."""

    def jump(kwargs: dict[str, Any]) -> None:
        for group in kwargs["optimizer"].param_groups:
            group["lr"] = 3.0
        kwargs["lr_scheduler"].base_lrs = [3.0 for _ in kwargs["lr_scheduler"].base_lrs]

    later(training, 14, jump)


def layer_vanishes(training: Training) -> None:
    """The output projection of one attention layer was multiplied by 1e-8 and frozen: the layer does nothing."""
    layer = next(iter(training.case.attention.values()))[-1]

    def shrink(model: nn.Module) -> None:
        _scale_layer(model, layer, 1e-8)
        of(model, layer).requires_grad_(False)

    training.models.append(shrink)


_NONFINITE = ("gradient-not-finite", "loss-not-finite", "activation-not-finite", "loss-off")
_AFTER_EXPLOSION = (
    "gradient-exploding",
    "activation-exploding",
    "gradient-vanishing",
    "prediction-collapsed",
    "attention-collapsed",
    "attention-on-first-token",
    "encoder-collapsed-over-time",
    "encoder-collapsed-over-batch",
    "activation-vanishing",
    "codebook-dead",
    "reference-ignored",
    "loss-not-finite",
    "activation-not-finite",
    "gradient-not-finite",
)
_NO_AUDIO_LOSS = ("loss-off", "part-without-gradient", "branch-dead", "labels-all-masked", *_NONFINITE)

KINDS: tuple[Kind, ...] = (
    kind("loss", "loss-scaled-by-accumulation", accumulation_not_divided, LLAMA, QWEN, VOXTRAL, also=["loss-off"]),
    kind("loss", "loss-scaled-by-accumulation", whisper_with_accumulation, WHISPER, also=["loss-off"]),
    kind("loss", "loss-off", loss_times_three, QWEN, WHISPER),
    kind("loss", "labels-shifted", loss_without_shift, LLAMA, QWEN, also=["loss-off", "reference-ignored"]),
    kind("loss", "audio-loss-missing", audio_loss_left_out, HIGGS, ORIGINAL, also=_NO_AUDIO_LOSS),
    kind("loss", "audio-loss-missing", audio_labels_masked, HIGGS, ORIGINAL, also=_NO_AUDIO_LOSS),
    kind("loss", "loss-not-finite", auxiliary_loss_of_log_zero, HIGGS, LLAMA, also=_NONFINITE),
    kind("activations", "activation-not-finite", nan_in_one_weight, QWEN, LLAMA, WHISPER, also=[*_AFTER_EXPLOSION, "loss-off"]),
    kind("activations", "activation-exploding", layer_explodes, LLAMA, WHISPER, also=_AFTER_EXPLOSION),
    kind("activations", "activation-exploding", learning_rate_jumps, LLAMA, ORIGINAL, also=_AFTER_EXPLOSION),
    kind("activations", "activation-vanishing", layer_vanishes, LLAMA, QWEN, also=["gradient-vanishing"]),
)
