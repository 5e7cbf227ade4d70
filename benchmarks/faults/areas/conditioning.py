"""Faults of what is made of the audio: encoder, projector, and whether the decoder uses it."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from benchmarks.faults.areas.setup import HIGGS, ORIGINAL, QWEN, VOXTRAL, WHISPER
from benchmarks.faults.fault import Kind, kind
from benchmarks.faults.training import Fields, Training, of, returning


def features_dropped_by_collator(training: Training) -> None:
    """The collator leaves the audio features out; the placeholders stay and are embedded as tokens."""
    dropped = ("input_features", "feature_attention_mask")
    training.batches.append(lambda fields: {name: value for name, value in fields.items() if name not in dropped})


class EncoderOutputsCached:
    """A Trainer that saves time by not running the encoder."""

    def compute_loss(self, model: nn.Module, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None) -> Any:
        """Give the encoder's outputs of one old clip, for every clip."""
        width, frames = model.config.d_model, model.config.max_source_positions
        cached = torch.linspace(-1, 1, frames * width).reshape(1, frames, width)
        inputs = {**inputs, "encoder_outputs": (cached.expand(len(inputs["labels"]), -1, -1),)}
        return super().compute_loss(model, inputs, return_outputs=return_outputs, num_items_in_batch=num_items_in_batch)


def encoder_bypassed(training: Training) -> None:
    """Cached ``encoder_outputs`` are handed to the model, so that the encoder is never called."""
    training.mixins.append(EncoderOutputsCached)


def encoder_frozen(training: Training) -> None:
    """The encoder is frozen; it may be meant so, hence only an information."""
    training.models.append(lambda model: of(model, training.case.encoder).requires_grad_(False) and None)


def encoder_norm_zeroed(training: Training) -> None:
    """The encoder's last norm has weight 0: the output is its bias at every frame of every clip."""

    def zero(model: nn.Module) -> None:
        encoder = of(model, training.case.encoder)
        norm = encoder.layer_norm
        with torch.no_grad():
            norm.weight.zero_()
            norm.bias.normal_(generator=torch.Generator().manual_seed(0))
        norm.requires_grad_(False)

    training.models.append(zero)


def encoder_pooled_over_time(training: Training) -> None:
    """A mean over time was left in: every frame of a clip is that clip's mean."""
    training.models.append(lambda model: returning(of(model, training.case.encoder), lambda out: out.mean(1, keepdim=True).expand_as(out)))


def encoder_output_of_first_clip(training: Training) -> None:
    """An index slip gives every clip the encoder's output of the first."""
    training.models.append(lambda model: returning(of(model, training.case.encoder), lambda out: out[:1].expand_as(out)))


def projector_gate_closed(training: Training) -> None:
    """The projector's output is multiplied by a gate that is 0 and does not train."""
    training.models.append(lambda model: returning(of(model, training.case.projector), lambda out: out * 0.0))


def projector_scaled_down(training: Training) -> None:
    """The projector's output is multiplied by 1e-8, a unit conversion done twice."""
    training.models.append(lambda model: returning(of(model, training.case.projector), lambda out: out * 1e-8))


def projector_answers_its_bias(training: Training) -> None:
    """The projector's weight is 0 and frozen: whatever comes in, its bias goes out."""

    def zero(model: nn.Module) -> None:
        for module in of(model, training.case.projector).modules():
            if isinstance(module, nn.Linear):
                with torch.no_grad():
                    module.weight.zero_()
                module.weight.requires_grad_(False)
                if module.bias is not None:
                    nn.init.normal_(module.bias, generator=torch.Generator().manual_seed(0))
                else:
                    module.bias = nn.Parameter(torch.randn(module.out_features, generator=torch.Generator().manual_seed(0)))

    training.models.append(zero)


def cross_attention_closed(training: Training) -> None:
    """The output projections of the cross-attention are 0 and frozen: the decoder is a language model."""

    def zero(model: nn.Module) -> None:
        for name in training.case.attention["cross"]:
            projection = of(model, name).out_proj
            with torch.no_grad():
                projection.weight.zero_()
                projection.bias.zero_()
            projection.requires_grad_(False)

    training.models.append(zero)
    training.steps = 40


def audio_of_another_sample(training: Training) -> None:
    """Audio and text were joined by a wrong key: every text has the recording of another sample. From random weights."""
    generator = torch.Generator().manual_seed(11)
    training.fresh = True
    training.steps, training.every = 360, 12  # "ignored" cannot be said of a model that may not yet have learnt to listen
    audio = "audio_input_ids" if training.case.name == HIGGS else training.features_name

    def mismatch(fields: Fields) -> Fields:
        order = torch.randperm(len(fields[audio]), generator=generator)
        return {**fields, audio: fields[audio][order]}

    training.batches.append(mismatch if training.case.name != HIGGS else _other_reference)


def _other_reference(fields: Fields) -> Fields:
    """Give every reference codes of a random voice; the target's codes stay."""
    codes, reference = fields["audio_input_ids"], (fields["audio_labels"] == -100).all(-1, keepdim=True)
    voices = torch.randint(0, 8, (len(codes), 1, 1))
    other = torch.where(codes < 32, voices * 4 + codes % 4, codes)
    return {**fields, "audio_input_ids": torch.where(reference, other, codes)}


def reference_codes_dropped(training: Training) -> None:
    """A flag of the collator sets all codes of the reference to 0; the placeholders stay."""

    def zero(fields: Fields) -> Fields:
        codes, reference = fields["audio_input_ids"], (fields["audio_labels"] == -100).all(-1, keepdim=True)
        return {**fields, "audio_input_ids": torch.where(reference, torch.zeros_like(codes), codes)}

    training.batches.append(zero)
    training.steps, training.every = 360, 12


_ENCODER_USELESS = ("reference-ignored", "part-without-gradient", "gradient-vanishing", "projector-dead")

KINDS: tuple[Kind, ...] = (
    kind(
        "conditioning",
        "encoder-not-called",
        features_dropped_by_collator,
        QWEN,
        VOXTRAL,
        also=["audio-tokens-mismatch", "audio-empty", "part-without-gradient", "reference-ignored", "backward-never-ran"],
    ),
    kind("conditioning", "encoder-not-called", encoder_bypassed, WHISPER, also=["part-without-gradient", "reference-ignored"]),
    kind("conditioning", "encoder-frozen", encoder_frozen, WHISPER, QWEN, ORIGINAL),
    kind(
        "conditioning",
        "encoder-collapsed-over-time",
        encoder_norm_zeroed,
        WHISPER,
        QWEN,
        ORIGINAL,
        also=["encoder-collapsed-over-batch", *_ENCODER_USELESS],
    ),
    kind("conditioning", "encoder-collapsed-over-time", encoder_pooled_over_time, QWEN, WHISPER, also=["attention-uniform"]),
    kind("conditioning", "encoder-collapsed-over-batch", encoder_output_of_first_clip, VOXTRAL, WHISPER, also=["reference-ignored"]),
    kind(
        "conditioning", "projector-dead", projector_gate_closed, QWEN, VOXTRAL, ORIGINAL, also=["activation-vanishing", *_ENCODER_USELESS]
    ),
    kind("conditioning", "projector-dead", projector_scaled_down, VOXTRAL, QWEN, also=["activation-vanishing", *_ENCODER_USELESS]),
    kind("conditioning", "projector-dead", projector_answers_its_bias, QWEN, ORIGINAL, also=_ENCODER_USELESS),
    kind(
        "conditioning",
        "reference-ignored",
        cross_attention_closed,
        WHISPER,
        also=["part-without-gradient", "activation-vanishing", "branch-dead"],
    ),
    kind("conditioning", "reference-ignored", audio_of_another_sample, WHISPER, HIGGS),
    kind("conditioning", "reference-ignored", reference_codes_dropped, HIGGS),
)
