"""Audio clips: frames with sound, and clips that are constant, with Whisper's real feature extractor."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import WhisperFeatureExtractor

from probe.measure.clips import COLUMNS, describe_clips


def columns(features: torch.Tensor) -> list[dict[str, float]]:
    return [dict(zip(COLUMNS, row)) for row in describe_clips(features).tolist()]


@pytest.mark.parametrize("seconds", [0.5, 1.0, 1.7])
def test_the_padding_of_the_real_extractor_is_found(seconds: float) -> None:
    """The sounding length is the clip's own, to the width of the extractor's window (3 frames)."""
    rng = np.random.default_rng(int(seconds * 10))
    extractor = WhisperFeatureExtractor(chunk_length=2)
    audio = rng.normal(size=int(16_000 * seconds)).astype(np.float32)
    features = torch.from_numpy(extractor(audio, sampling_rate=16_000)["input_features"][0])[None]
    (clip,) = columns(features)
    assert clip["frames"] == 200
    assert abs(clip["sounding"] - 100 * seconds) <= 3
    assert clip["constant"] == 0


def test_a_silent_clip_is_constant() -> None:
    """Silence through the real extractor has no sounding frame and is named constant."""
    extractor = WhisperFeatureExtractor(chunk_length=1)
    features = torch.from_numpy(extractor(np.zeros(16_000, np.float32), sampling_rate=16_000)["input_features"][0])[None]
    assert columns(features) == [{"frames": 100.0, "sounding": 0.0, "constant": 1.0}]


def test_clips_are_told_apart() -> None:
    """One constant clip in a batch does not touch the others; a quiet frame in the middle is no padding."""
    features = torch.randn(3, 8, 20)
    features[1] = 0.25
    features[2, :, 15:] = -1.0
    features[2, :, 3] = -1.0
    assert [(c["sounding"], c["constant"]) for c in columns(features)] == [(20, 0), (0, 1), (15, 0)]


def test_waveforms_and_empty_batches() -> None:
    """A waveform's padding is its last value repeated; no clips give no rows, no frames give zeros."""
    wave = torch.randn(2, 50)
    wave[1, 30:] = 0.0
    assert [c["sounding"] for c in columns(wave)] == [49, 30]
    assert describe_clips(torch.zeros(0, 8, 20)).shape == (0, len(COLUMNS))
    assert columns(torch.zeros(1, 8, 0)) == [{"frames": 0.0, "sounding": 0.0, "constant": 0.0}]
