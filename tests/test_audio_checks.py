"""Checks of audio clips: against the real Whisper extractor on speech, noise and silence, and against plain loops."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache

import numpy as np
import pytest
import soxr
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import WhisperFeatureExtractor
from transformers.audio_utils import mel_filter_bank

import costs
import data_speech
import synthesiser
from models.samples import clip_features
from probe.measure.audio_checks import (
    BAND_EDGE_HZ,
    COLUMNS_SUMS,
    SILENT_PEAK,
    LogMelScale,
    check_log_mel,
    check_waveform,
    first_bin_above,
)
from probe.measure.chunks import CHUNK_MIB
from probe.sites.audio_inputs import log_mel_scale

RATE = 16_000
BINS = (80, 128)
Wave = NDArray[np.float64]


@cache
def extractor(bins: int) -> WhisperFeatureExtractor:
    return WhisperFeatureExtractor(feature_size=bins, chunk_length=4)


@cache
def speech() -> tuple[Wave, ...]:
    texts = data_speech.sentences(6, seed=3)
    return tuple(synthesiser.speak(text, speaker, seed=3).astype(float)[: 4 * RATE] for text, speaker in zip(texts, synthesiser.SPEAKERS))


def features(bins: int, waves: list[Wave], normalise: bool = False) -> Tensor:
    fed = [wave.astype(np.float32) for wave in waves]
    return extractor(bins)(fed, sampling_rate=RATE, return_tensors="pt", do_normalize=normalise).input_features


def checked(x: Tensor, scale: LogMelScale | None) -> dict[str, int]:
    """Return what is found, by column, without zeros."""
    sums, _ = check_log_mel(x, scale)
    return {name: int(value) for name, value in zip(COLUMNS_SUMS, sums.tolist(), strict=True) if value}


def scale_of(bins: int) -> LogMelScale:
    scale = log_mel_scale(None, [extractor(bins)])
    assert scale is not None
    return scale


def noise(seed: int = 0) -> Wave:
    return np.random.default_rng(seed).uniform(-1, 1, 3 * RATE)


def sine(hertz: float) -> Wave:
    return np.sin(2 * np.pi * hertz * np.arange(3 * RATE) / RATE)


HEALTHY: dict[str, Callable[[], list[Wave]]] = {
    "speech": lambda: list(speech()),
    "at full scale": lambda: [wave / np.abs(wave).max() for wave in speech()],
    "clipped": lambda: [np.clip(20 * wave, -1, 1) for wave in speech()],
    "40 dB quieter": lambda: [wave / 100 for wave in speech()],
    "noise": lambda: [noise(), np.sign(noise()), noise() / 1000],
    "with a noisy microphone": lambda: [wave + 1e-3 * noise()[: len(wave)] for wave in speech() if len(wave) <= 3 * RATE],
}


@pytest.mark.parametrize("bins", BINS)
@pytest.mark.parametrize("what", HEALTHY)
def test_nothing_is_found_in_healthy_audio(what: str, bins: int) -> None:
    """Speech, loud, quiet, clipped or noisy, as Whisper's extractor gives it, is of the right scale, of full band and not silent."""
    assert checked(features(bins, HEALTHY[what]()), scale_of(bins)) == {}


@pytest.mark.parametrize("bins", BINS)
def test_no_audio_within_full_scale_leaves_the_range(bins: int) -> None:
    """Sines, square waves and a constant voltage, the loudest there is, stay below the bound that is derived from the filters."""
    loudest = [sine(hertz) for hertz in (20, 40, 60, 80, 100, 1000, 7000)]
    loudest += [np.sign(wave) for wave in loudest] + [np.ones(RATE)]
    x = features(bins, loudest)
    most = 200 * (np.hanning(401)[:-1] ** 2).sum() * extractor(bins).mel_filters.max()
    assert x.max() < (np.log10(most) + 4) / 4 < 1.775
    assert "off_scale" not in checked(x, scale_of(bins))


@pytest.mark.parametrize("bins", BINS)
def test_zeros_of_padding_and_augmentation_are_not_off_scale(bins: int) -> None:
    """Zeros where SpecAugment masked features, or where a collator padded them, change nothing, nor does padding at the floor."""
    x = features(bins, HEALTHY["40 dB quieter"]() + list(speech()))
    x[:, :, 300:] = 0
    x[:, 5:9] = 0
    x[:, :, 40:60] = 0
    assert checked(x, scale_of(bins)) == {}


@pytest.mark.parametrize("bins", BINS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_rounding_to_another_dtype_is_not_off_scale(dtype: torch.dtype, bins: int) -> None:
    """Features in bf16 or fp16, and those that were, still lie within the range."""
    many = [wave * 10 ** (-shift / 97) for wave in speech() for shift in range(12)]
    x = features(bins, many).to(dtype)
    assert checked(x, scale_of(bins)) == checked(x.float(), scale_of(bins)) == {}


WRONG: dict[str, Callable[[Tensor, list[Wave], int], Tensor]] = {
    "16-bit integers as floats": lambda x, waves, bins: features(bins, [wave * 32768 for wave in waves]),
    "quiet 16-bit integers": lambda x, waves, bins: features(bins, [wave * 1024 for wave in waves]),
    "z-normalised": lambda x, waves, bins: (x - x.mean((1, 2), keepdim=True)) / x.std((1, 2), keepdim=True),
    "raw log10": lambda x, waves, bins: 4 * x - 4,
    "natural logarithm": lambda x, waves, bins: (4 * x - 4) * math.log(10),
    "decibels": lambda x, waves, bins: 10 * (4 * x - 4),
    "power": lambda x, waves, bins: 10 ** (4 * x - 4),
    "divided by a maximum": lambda x, waves, bins: x - x.amax((1, 2), keepdim=True),
}


@pytest.mark.parametrize("bins", BINS)
@pytest.mark.parametrize("what", WRONG)
def test_another_scale_is_found_in_every_clip(what: str, bins: int) -> None:
    """Integers taken for floats and features that were normalised, or not scaled, in another way are off scale in every clip."""
    waves = [wave / np.abs(wave).max() for wave in speech()]
    x = WRONG[what](features(bins, waves), waves, bins)
    assert checked(x, scale_of(bins)).get("off_scale") == len(waves)


@pytest.mark.parametrize("bins", BINS)
def test_a_waveform_brought_to_unit_variance_is_on_scale(bins: int) -> None:
    """``do_normalize=True``, of which the extractor keeps no trace, is no other scale."""
    x = features(bins, list(speech()), normalise=True)
    assert x.max() > 1.8
    assert checked(x, scale_of(bins)) == {}


@pytest.mark.parametrize("bins", BINS)
def test_silence_is_silent_and_quiet_speech_is_not(bins: int) -> None:
    """Zeros are silent (and constant), one step of 16 bits of noise is silent, speech 60 dB down is not."""
    step = np.round(noise()) / 32768
    assert checked(features(bins, [np.zeros(RATE)]), scale_of(bins)) == {"silent": 1, "constant": 1}
    assert checked(features(bins, [step, np.zeros(RATE)]), scale_of(bins)) == {"silent": 2, "constant": 1}
    assert checked(features(bins, [wave / 1000 for wave in speech()]), scale_of(bins)).get("silent") is None


@pytest.mark.parametrize("bins", BINS)
@pytest.mark.parametrize("quality", ["HQ", "VHQ", "MQ"])
def test_upsampled_speech_is_band_limited(quality: str, bins: int) -> None:
    """Speech taken through 8 kHz is found in every clip, the same speech at 16 kHz in none; SpecAugment and zero padding hide nothing."""
    narrow = [soxr.resample(soxr.resample(wave, RATE, 8000), 8000, RATE, quality=quality) for wave in speech()]
    x = features(bins, narrow)
    assert checked(x, scale_of(bins)) == {"band_limited": len(narrow)}
    x[:, -20:-10, 30:80] = 0
    x[:, :, 350:] = 0
    assert checked(x, scale_of(bins)) == {"band_limited": len(narrow)}


def test_the_demo_is_not_band_limited() -> None:
    """The speech that the example trains on, whichever voice speaks it, has nothing odd."""
    clips = data_speech.load_speech(None, clips=6, seed=0).clips
    assert checked(features(80, [clip.samples[: 4 * RATE] for clip in clips]), scale_of(80)) == {}


def test_features_that_tests_make_up_are_healthy() -> None:
    """Random features of tests/models look as the extractor's to these checks."""
    generator = torch.Generator().manual_seed(1)
    x = torch.stack([clip_features(generator, 16, 100, 60 + n) for n in range(40)])
    assert checked(x, LogMelScale(2.2, first_bin_above(16))) == {}


@pytest.mark.parametrize("bins", [16, 40, 80, 128])
def test_first_bin_is_where_its_filter_begins(bins: int) -> None:
    """The filters from that bin on weigh no frequency below the edge; the one before it does."""
    filters = mel_filter_bank(8001, bins, 0.0, 8000.0, RATE, norm="slaney", mel_scale="slaney")
    first = first_bin_above(bins)
    below = int(BAND_EDGE_HZ)
    assert first is not None
    assert filters[:below, first:].max() == 0
    assert filters[:below, first - 1].max() > 0
    assert first_bin_above(bins, hertz=8000.0) is None


def test_broken_clips_are_counted_once_and_extremes_are_of_finite_values() -> None:
    """NaN and Inf are counted clip by clip and for nothing else; minimum and maximum leave them out."""
    x = torch.randn(6, 8, 20, generator=torch.Generator().manual_seed(2)).clamp(-0.5, 1.4)
    x[0, 3, 4], x[1, 0, 0], x[2, 1, 1] = math.nan, math.inf, -math.inf
    x[3] = 0.25
    sums, maxima = check_log_mel(x, LogMelScale(1.8, 6))
    finite = x[torch.isfinite(x)]
    assert dict(zip(COLUMNS_SUMS, sums.tolist(), strict=True)) | {"band_limited": 0} == {
        **dict.fromkeys(COLUMNS_SUMS, 0.0),
        "nonfinite": 3.0,
        "constant": 1.0,
    }
    assert maxima.tolist() == [float(finite.max()), -float(finite.min())]
    assert check_log_mel(torch.full((1, 2, 2), math.nan), None)[1].tolist() == [-math.inf, -math.inf]


def test_without_a_scale_only_what_needs_none_is_counted() -> None:
    """For an unknown extractor scale, silence and band are not judged."""
    x = torch.stack([torch.full((8, 20), -1.5), 100 * torch.randn(8, 20, generator=torch.Generator().manual_seed(3))])
    assert checked(x, None) == {"constant": 1}


def test_waveforms() -> None:
    """Each count of waveforms equals a plain loop over quiet, loud, clipped, constant, silent and broken clips."""
    waves = [sine(100) * 0.5 + 0.1 * noise(), np.clip(2 * noise(), -1, 1), np.clip(1.05 * noise(), -1, 1), 0.2 * np.ones(3 * RATE)]
    waves += [np.zeros(3 * RATE), 1e-4 * noise(), 2 * SILENT_PEAK * noise(), noise() * np.nan, 0.3 * noise() + 0.4]
    x = torch.tensor(np.stack(waves), dtype=torch.float32)
    sums, maxima = check_waveform(x)
    expected = dict.fromkeys(COLUMNS_SUMS, 0)
    for clip in x.double().numpy():
        if not np.isfinite(clip).all():
            expected["nonfinite"] += 1
            continue
        constant, silent = clip.min() == clip.max(), np.abs(clip).max() < 10**-3.5
        share = np.mean((clip == clip.max()) | (clip == clip.min()))
        expected["constant"] += constant
        expected["silent"] += silent
        expected["clipped"] += not constant and not silent and share > 0.001
    assert dict(zip(COLUMNS_SUMS, sums.tolist(), strict=True)) == expected
    assert {name: count for name, count in expected.items() if count} == {"nonfinite": 1, "constant": 2, "silent": 2, "clipped": 2}
    finite = x[torch.isfinite(x)]
    assert maxima.tolist() == [float(finite.max()), -float(finite.min())]


@pytest.mark.parametrize("check", [lambda x: check_log_mel(x.view(x.shape[0], 10, -1), LogMelScale(1.8, 5)), check_waveform])
def test_empty_and_chunked(check: Callable[[Tensor], tuple[Tensor, Tensor]], monkeypatch: pytest.MonkeyPatch) -> None:
    """No clip gives zeros; clips worked through one at a time give the same sums; temporaries stay below a few chunks."""
    sums, maxima = check_log_mel(torch.zeros(0, 8, 20), None)
    assert (sums.tolist(), maxima.tolist()) == ([0.0] * len(COLUMNS_SUMS), [-math.inf] * 2)
    x = torch.randn(7, 200, generator=torch.Generator().manual_seed(4)).clamp(-1.5, 1.9)
    whole = check(x)
    with monkeypatch.context() as patch:
        patch.setattr("probe.measure.audio_checks.per_chunk", lambda nbytes: 1)
        assert all(torch.equal(a, b) for a, b in zip(check(x), whole, strict=True))
    large = torch.zeros(30, 1_000_000)
    assert costs.peak_mib(lambda: check(large)) < 3 * CHUNK_MIB
    assert costs.operations(lambda: check(x)) < 55
