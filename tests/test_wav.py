"""Reading WAV files of all PCM widths, channels and rates."""

from __future__ import annotations

import struct
import wave
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from wav import read_wav

pytestmark = pytest.mark.pure  # of torch and probe alone: the same with every transformers


def write_wav(path: Path, channels: list[NDArray[np.float64]], rate: int, width: int) -> Path:
    """Write samples within [-1, 1) as PCM, value by value with struct."""
    full = 2 ** (8 * width - 1)
    frames = bytearray()
    for values in zip(*channels, strict=True):
        for value in values:
            number = max(-full, min(full - 1, round(value * full)))
            frames += struct.pack("<B", number + 128) if width == 1 else struct.pack("<i", number)[:width]
    with wave.open(str(path), "wb") as file:
        file.setnchannels(len(channels))
        file.setsampwidth(width)
        file.setframerate(rate)
        file.writeframes(bytes(frames))
    return path


@pytest.mark.parametrize("width", [1, 2, 3, 4])
def test_samples_come_back_whatever_the_width(tmp_path: Path, width: int) -> None:
    """Each width gives the written samples to within its resolution, extremes and sign included."""
    rng = np.random.default_rng(width)
    written = np.concatenate([[-1.0, 0.0, 0.999, -0.5], rng.uniform(-1, 1, 500)])
    read = read_wav(write_wav(tmp_path / "a.wav", [written], 16_000, width))
    assert read.dtype == np.float32
    np.testing.assert_allclose(read, written, atol=max(1.01 / 2 ** (8 * width - 1), 1e-6))


@pytest.mark.parametrize("width", [1, 2, 3, 4])
def test_channels_are_averaged(tmp_path: Path, width: int) -> None:
    """A stereo file gives the mean of its channels."""
    rng = np.random.default_rng(7)
    left, right = rng.uniform(-0.9, 0.9, (2, 300))
    read = read_wav(write_wav(tmp_path / "a.wav", [left, right], 16_000, width))
    np.testing.assert_allclose(read, (left + right) / 2, atol=1.01 / 2 ** (8 * width - 1) + 1e-6)


@pytest.mark.parametrize("rate", [8_000, 22_050, 44_100, 48_000])
def test_other_rates_become_16_khz(tmp_path: Path, rate: int) -> None:
    """A tone keeps its frequency, level and length; what 16 kHz cannot hold is gone instead of folded down."""
    time = np.arange(rate) / rate
    tone = 0.5 * np.sin(2 * np.pi * 1000 * time)
    above = 0.4 * np.sin(2 * np.pi * 10_000 * time) if rate > 20_000 else np.zeros(rate)
    read = read_wav(write_wav(tmp_path / "a.wav", [tone + above], rate, 2))
    assert len(read) == pytest.approx(16_000, abs=2)
    expected = 0.5 * np.sin(2 * np.pi * 1000 * np.arange(len(read)) / 16_000)
    np.testing.assert_allclose(read[500:-500], expected[500:-500], atol=2e-3)


def test_loud_samples_stay_within_one(tmp_path: Path) -> None:
    """The overshoot of resampling a full-scale square wave is cut off at 1."""
    square = np.where(np.arange(22_050) // 50 % 2, 0.9999, -1.0)
    assert np.abs(read_wav(write_wav(tmp_path / "a.wav", [square], 22_050, 2))).max() <= 1.0


def test_what_is_no_pcm_wav_is_named(tmp_path: Path) -> None:
    """A file of another kind, a float WAV and an empty one are refused with their path."""
    text = tmp_path / "text.wav"
    text.write_text("no sound in here", encoding="utf-8")
    nothing = tmp_path / "nothing.wav"
    nothing.touch()
    floating = write_wav(tmp_path / "float.wav", [np.zeros(8)], 16_000, 4)
    data = bytearray(floating.read_bytes())
    data[20:22] = struct.pack("<H", 3)  # the format tag: floating point
    floating.write_bytes(bytes(data))
    for path in (text, nothing, floating):
        with pytest.raises(ValueError, match=f"{path.name}: not a PCM WAV file"):
            read_wav(path)
    with pytest.raises(ValueError, match="holds no samples"):
        read_wav(write_wav(tmp_path / "empty.wav", [np.zeros(0)], 16_000, 2))
