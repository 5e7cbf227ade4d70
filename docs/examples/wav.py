"""Reads a WAV file as mono samples at 16 kHz, the rate that Whisper hears."""

from __future__ import annotations

import wave
from pathlib import Path

import numpy as np
import soxr
from numpy.typing import NDArray

SAMPLE_RATE = 16_000


def read_wav(path: Path) -> NDArray[np.float32]:
    """Return the samples of a PCM file of 8, 16, 24 or 32 bits: (N,) float32 within [-1, 1], channels averaged, resampled to 16 kHz.

    Raises:
        ValueError: if the file is no WAV file, holds something else than PCM (floating point, compressed), or has no samples.
    """
    try:
        with wave.open(str(path), "rb") as file:
            rate, channels, width = file.getframerate(), file.getnchannels(), file.getsampwidth()
            data = file.readframes(file.getnframes())
    except (wave.Error, EOFError) as error:
        raise ValueError(f"{path}: not a PCM WAV file ({error}); convert it, e.g. with: sox {path.name} -e signed -b 16 out.wav") from error
    samples = _decode(data, width).reshape(-1, channels).mean(axis=1)
    if samples.size == 0:
        raise ValueError(f"{path}: holds no samples")
    if rate != SAMPLE_RATE:
        samples = np.clip(soxr.resample(samples, rate, SAMPLE_RATE), -1.0, 1.0)
    return samples.astype(np.float32)


def _decode(data: bytes, width: int) -> NDArray[np.float64]:
    """Return interleaved PCM of ``width`` bytes a sample, little endian (8 bits: without a sign), as float64 within [-1, 1)."""
    if width == 1:
        return (np.frombuffer(data, dtype=np.uint8).astype(np.float64) - 128.0) / 128.0
    if width == 3:
        wide = np.zeros((len(data) // 3, 4), dtype=np.uint8)
        wide[:, 1:] = np.frombuffer(data, dtype=np.uint8).reshape(-1, 3)
        return wide.reshape(-1).view("<i4").astype(np.float64) / 2.0**31
    return np.frombuffer(data, dtype=f"<i{width}").astype(np.float64) / 2.0 ** (8 * width - 1)
