"""Data that can be learnt: eight voices, each with its own sound, its own audio codes and its own words, put into the samples of a case.

A fine-tuning of a tiny model is healthy only if there is something in the audio that helps; with random audio the right finding would
be that the audio is ignored.

Shapes: N samples of a waveform, T frames.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import WhisperFeatureExtractor

from benchmarks.faults.training import Fields, Training, Waveform
from models.samples import IGNORED, Samples, integer, words
from models.tokens import encode

VOICES = 8
RATE = 16_000
_HOP, _MELS, _FADE = 160, 16, 400
_CODES_A_VOICE = 4
_CODES = VOICES * _CODES_A_VOICE
WORDS = ("amber", "birch tree", "cloud", "dew drops", "elm", "foxglove", "granite", "heather")


@cache
def extractor() -> WhisperFeatureExtractor:
    """Return Whisper's own feature extractor for clips of a second and 16 mel bins."""
    return WhisperFeatureExtractor(feature_size=_MELS, sampling_rate=RATE, hop_length=_HOP, chunk_length=1, n_fft=400)


def sound(voice: int, frames: int, generator: torch.Generator) -> Waveform:
    """Return a clip of one voice, (frames · 160,) float64 within ±0.5: harmonics of its pitch round its formant, breath up to 8 kHz."""
    count = frames * _HOP
    pitch, formant = 90.0 + 35.0 * voice, 500.0 * 1.3**voice
    frequencies = np.arange(1, int(7500 / pitch)) * pitch
    weights = np.exp(-0.5 * ((frequencies - formant) / 350.0) ** 2) + 0.02
    phases = torch.rand(len(frequencies), generator=generator, dtype=torch.float64).numpy() * 2 * np.pi
    spectrum = np.zeros(count // 2 + 1, dtype=complex)
    spectrum[np.round(frequencies * count / RATE).astype(int)] = weights * np.exp(1j * phases)
    voiced = np.fft.irfft(spectrum, count)
    breath = torch.randn(count, generator=generator, dtype=torch.float64).numpy()
    syllables = 0.6 + 0.4 * np.sin(2 * np.pi * (3.0 + voice / 4) * np.arange(count) / RATE)
    wave = voiced / np.abs(voiced).max() * syllables + 0.02 * breath
    fade = np.minimum(1.0, np.minimum(np.arange(count), np.arange(count)[::-1]) / _FADE)  # a cut would be a click, of all frequencies
    return np.asarray(0.5 * wave / np.abs(wave).max() * fade**2)


def log_mel(wave: Waveform, frames: int) -> Tensor:
    """Return the features of a clip padded to a second, of which the first ``frames`` frames are kept, (16, frames) float32."""
    features = extractor()(wave, sampling_rate=RATE, return_tensors="np").input_features[0]
    return torch.from_numpy(features)[:, :frames].float()


def dataset(training: Training, count: int, seed: int) -> Samples:
    """Return the samples of a training's case, each given a voice, and changed as the training says."""
    plain = training.case.dataset(count, seed)
    generator = torch.Generator().manual_seed(1000 + seed)
    samples = []
    for index in range(count):
        sample = _voiced(training, dict(plain[index]), index, generator)
        for change in training.rows:
            sample = change(sample, index)
        samples.append(sample)
    return Samples(samples)


def _voiced(training: Training, sample: Fields, index: int, generator: torch.Generator) -> Fields:
    voice = integer(generator, 0, VOICES - 1)
    name = training.case.name
    if name == "original":
        return _original(training, sample, voice, generator)
    if name == "higgs_audio_v2":
        codes = {key: voice_codes(sample[key], voice) for key in ("audio_input_ids", "audio_labels")}
        return {**sample, **codes}
    text = f"{WORDS[voice]}{' and so on' * (index % 2)} {integer(generator, 0, 9)}"
    if name == "llama":
        return _prompted(training, encode(training.case.tokenizer(), f"<s>{words(generator, 4, 12)}, {voice}: "), text)
    if name == "moonshine":
        wave = changed(training, sound(voice, integer(generator, 60, 90), generator))
        return {"input_values": torch.from_numpy(wave).float(), "labels": encode(training.case.tokenizer(), text + "</s>")}
    if name == "whisper":
        features = _clip(training, voice, integer(generator, 60, 90), 100, generator)
        begin, end = "<|en|><|transcribe|><|notimestamps|>", "<|endoftext|>"
        return {"input_features": features, "labels": encode(training.case.tokenizer(), begin + text + end)}
    return _prompted_by_audio(training, sample, voice, text, generator)


def _prompted_by_audio(training: Training, sample: Fields, voice: int, text: str, generator: torch.Generator) -> Fields:
    """Give every clip of a Qwen2-Audio or Voxtral sample the voice, and let the answer be the voice's words."""
    clips, _, frames = sample["input_features"].shape
    mask = sample.get("feature_attention_mask")
    valid = [integer(generator, 50, 90) for _ in range(clips)] if mask is None else mask.sum(1).tolist()
    features = torch.stack([_clip(training, voice, length, frames, generator) for length in valid])
    prompt = [token for token, label in zip(sample["input_ids"], sample["labels"], strict=True) if label == IGNORED]
    return {**sample, **_prompted(training, prompt, text), "input_features": features}


def _prompted(training: Training, prompt: list[int], text: str) -> Fields:
    target = [*encode(training.case.tokenizer(), text), training.case.tokenizer().eos_token_id]
    return {"input_ids": [*prompt, *target], "labels": [IGNORED] * len(prompt) + target}


def _original(training: Training, sample: Fields, voice: int, generator: torch.Generator) -> Fields:
    if sample["clip"] is None:
        return sample
    features, mask = sample["clip"]
    clip = _clip(training, voice, int(mask.sum()), features.shape[1], generator)
    codes, labels = sample["codes_out"]
    out = (voice_codes(codes, voice), voice_codes(labels, voice))
    return {**sample, "clip": (clip, mask), "codes_in": voice_codes(sample["codes_in"], voice), "codes_out": out}


def _clip(training: Training, voice: int, valid: int, frames: int, generator: torch.Generator) -> Tensor:
    features = log_mel(changed(training, sound(voice, valid, generator)), frames)
    for change in training.features:
        features = change(features)
    return features


def changed(training: Training, wave: Waveform) -> Any:
    """Return the clip with the training's changes of waveforms."""
    for change in training.waveforms:
        wave = change(wave)
    return wave


def voice_codes(codes: Tensor, voice: int) -> Tensor:
    """Return codes of which each lies among the four of the voice; what is no code (begin, end, -100) stays."""
    is_code = (codes >= 0) & (codes < _CODES)
    return torch.where(is_code, voice * _CODES_A_VOICE + codes % _CODES_A_VOICE, codes)
