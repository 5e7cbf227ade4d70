"""Faults of the audio that goes in: empty, constant, silent, clipped, not finite, of the wrong scale, upsampled, miscounted."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.faults.areas.setup import HIGGS, ORIGINAL, QWEN, VOXTRAL, WHISPER
from benchmarks.faults.fault import Kind, kind
from benchmarks.faults.training import Fields, Training, Waveform, of, taking
from models.original_training import text_dataset

MOONSHINE = "moonshine"


def no_clip_in_any_batch(training: Training) -> None:
    """The path column is empty, so every batch has features of shape (0, mel, frames) and no audio at all."""
    rows = [text_dataset(training.samples, training.seed)[index] for index in range(training.samples)]
    training.rows.append(lambda sample, index: rows[index % len(rows)])


def features_of_zeros(training: Training) -> None:
    """Reading the audio fails, and the exception handler returns an array of zeros as features."""
    training.features.append(torch.zeros_like)


def muted_recording(training: Training) -> None:
    """The recordings are digital silence."""
    training.waveforms.append(np.zeros_like)


def recorded_at_minus_100_db(training: Training) -> None:
    """The wrong channel was recorded: nothing but dither at -100 dBFS."""

    def dither(wave: Waveform) -> Waveform:
        noise = np.random.default_rng(len(wave)).standard_normal(len(wave))
        return 1e-5 * noise

    training.waveforms.append(dither)


def clipped_recording(training: Training) -> None:
    """The recordings were amplified by 30 dB and clipped at full scale."""
    training.waveforms.append(lambda wave: np.clip(wave * 32.0, -1.0, 1.0))


def nan_in_one_clip(training: Training) -> None:
    """One clip of every batch has NaN in it, from a normalisation by a standard deviation of 0."""
    name = training.features_name

    def spoil(fields: Fields) -> Fields:
        features = fields[name].clone()
        features[:1] = float("nan")
        return {**fields, name: features}

    training.batches.append(spoil)


def int16_samples(training: Training) -> None:
    """The waveforms went into the feature extractor as whole numbers of 16 bits, not divided by 32,768."""
    training.waveforms.append(lambda wave: np.round(wave * 32767))


def normalised_features(training: Training) -> None:
    """The features were normalised to mean 0 and deviation 1, as another model wants them."""
    training.features.append(lambda mel: (mel - mel.mean()) / mel.std().clamp(min=1e-6))


def power_instead_of_log(training: Training) -> None:
    """The features are the mel spectrogram in dB of another library, without the extractor's scaling."""
    training.features.append(lambda mel: (4 * mel - 4) * 10)


def upsampled_from_8_khz(training: Training) -> None:
    """The corpus is telephone speech at 8 kHz (300 to 3,400 Hz), resampled to 16 kHz."""

    def telephone(wave: Waveform) -> Waveform:
        spectrum = np.fft.rfft(wave, 2 * len(wave))  # zeros behind it: the filter must not join its end to its beginning
        frequencies = np.linspace(0, 8000, len(spectrum))
        spectrum[(frequencies < 300) | (frequencies > 3400)] = 0
        return np.fft.irfft(spectrum, 2 * len(wave))[: len(wave)]

    training.waveforms.append(telephone)


def more_mel_bins_than_the_encoder_has(training: Training) -> None:
    """The extractor makes 24 mel bins and the encoder takes 16; a wrapper crops them to fit."""

    def widen(fields: Fields) -> Fields:
        features = fields["audio_features"]
        return {**fields, "audio_features": torch.cat([features, features[:, -8:]], dim=1)}

    def crop(model: nn.Module) -> None:
        inner: Any = model.model
        taking(inner, lambda kwargs: {**kwargs, "audio_features": kwargs["audio_features"][:, :16]})

    training.batches.append(widen)
    training.models.append(crop)


def _tolerant(model: nn.Module) -> None:
    """Fill placeholders without counting them, as transformers before 5 does."""
    core: Any = of(model, "model")

    def mask(input_ids: Tensor, inputs_embeds: Tensor, audio_features: Tensor) -> Tensor:
        return (input_ids == model.config.audio_token_id)[..., None].expand_as(inputs_embeds)

    core.get_placeholder_mask = mask


def _fewer(training: Training, keep: int) -> None:
    token = training.case.tokenizer().convert_tokens_to_ids(training.case.audio_token)

    def drop(sample: Fields, index: int) -> Fields:
        seen, kept = 0, []
        for position, identifier in enumerate(sample["input_ids"]):
            seen += identifier == token
            if identifier != token or seen <= keep:
                kept.append(position)
        return {**sample, **{name: [sample[name][position] for position in kept] for name in ("input_ids", "labels")}}

    training.rows.append(drop)
    training.models.append(_tolerant)


def two_placeholders_too_few(training: Training) -> None:
    """The processor counts frames in another way than the model: some frames find no placeholder and are dropped."""
    _fewer(training, 10)


def no_placeholder_at_all(training: Training) -> None:
    """The chat template lost the audio tag: the encoder runs, and its frames go nowhere."""
    _fewer(training, 0)


def target_given_as_reference(training: Training) -> None:
    """The clip that is to be predicted is also the reference."""

    def original(sample: Fields, index: int) -> Fields:
        return sample if sample["codes_out"] is None else {**sample, "codes_in": sample["codes_out"][0].clone()}

    def higgs(sample: Fields, index: int) -> Fields:
        return _reference_of_target(training, sample)

    training.rows.append(original if training.case.name == ORIGINAL else higgs)


def _reference_of_target(training: Training, sample: Fields) -> Fields:
    """Put the target's codes, and as many placeholders, in place of the reference's."""
    ids = sample["input_ids"]
    tokenizer = training.case.tokenizer()
    begin, end = (tokenizer.convert_tokens_to_ids(token) for token in ("<|audio_out_bos|>", "<|audio_eos|>"))
    begins = [position for position, token in enumerate(ids) if token == begin]
    ends = [position for position, token in enumerate(ids) if token == end]
    segment = ids[begins[1] : ends[1] + 1]
    reference = ends[0] - begins[0] - 1
    target = sample["audio_input_ids"][reference:]
    return {
        "input_ids": [*ids[: begins[0]], *segment, *ids[ends[0] + 1 :]],
        "labels": [*sample["labels"][: begins[0]], *[-100] * len(segment), *sample["labels"][ends[0] + 1 :]],
        "audio_input_ids": torch.cat([target, target]),
        "audio_labels": torch.cat([torch.full_like(target, -100), sample["audio_labels"][reference:]]),
    }


_FEATURES_SAY_NOTHING = ("reference-ignored", "encoder-collapsed-over-batch", "encoder-collapsed-over-time")
_NONFINITE = (
    "gradient-not-finite",
    "loss-not-finite",
    "activation-not-finite",
    "loss-off",
    "prediction-collapsed",
    "attention-collapsed",
    "projector-dead",
)
_NO_AUDIO = ("encoder-not-called", "part-without-gradient", "reference-ignored", "branch-dead", "audio-loss-missing")

KINDS: tuple[Kind, ...] = (
    kind("audio", "audio-empty", no_clip_in_any_batch, ORIGINAL, also=[*_NO_AUDIO, "audio-tokens-mismatch"]),
    kind(
        "audio",
        "audio-constant",
        features_of_zeros,
        WHISPER,
        VOXTRAL,
        also=["audio-silent", "audio-wrong-scale", *_FEATURES_SAY_NOTHING],
    ),
    kind("audio", "audio-silent", muted_recording, QWEN, WHISPER, MOONSHINE, also=["audio-constant", *_FEATURES_SAY_NOTHING]),
    kind("audio", "audio-silent", recorded_at_minus_100_db, WHISPER, MOONSHINE, also=["audio-constant", *_FEATURES_SAY_NOTHING]),
    kind("audio", "audio-clipped", clipped_recording, MOONSHINE),
    kind("audio", "audio-not-finite", nan_in_one_clip, WHISPER, QWEN, MOONSHINE, also=[*_NONFINITE, "audio-constant"]),
    kind("audio", "audio-wrong-scale", int16_samples, WHISPER, VOXTRAL),
    kind("audio", "audio-wrong-scale", normalised_features, VOXTRAL, QWEN),
    kind("audio", "audio-wrong-scale", power_instead_of_log, QWEN, WHISPER, also=["attention-collapsed"]),
    kind("audio", "audio-band-limited", upsampled_from_8_khz, WHISPER, QWEN),
    kind("audio", "mel-count-wrong", more_mel_bins_than_the_encoder_has, ORIGINAL),
    kind("audio", "audio-tokens-mismatch", two_placeholders_too_few, VOXTRAL),
    kind("audio", "audio-tokens-mismatch", no_placeholder_at_all, VOXTRAL, also=["part-without-gradient", "reference-ignored"]),
    kind("audio", "reference-is-target", target_given_as_reference, HIGGS, ORIGINAL),
)
