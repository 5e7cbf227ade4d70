"""What can be wrong with the audio clips of a batch, clip by clip: not finite, constant, silent, clipped, of the wrong scale, band-limited.

Nothing waits for the device. Temporaries of at most 8 MiB, unless one clip is larger.

Shapes: C clips, M mel bins, T frames, N samples of a waveform.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from probe.measure.chunks import per_chunk

COLUMNS_SUMS = ("nonfinite", "constant", "silent", "clipped", "off_scale", "band_limited")
COLUMNS_MAXIMA = ("maximum", "minimum_negated")

RANGE = 2.0
"""Whisper's extractor raises everything to 8 below the clip's maximum in log10 of power, and divides by 4."""
FLOOR = -1.5
"""What it gives where there is no power: (log10(1e-10) + 4) / 4."""
SILENT_LOG_MEL = -0.75
"""10**-7 in power. Noise of one step of 16 bits (samples of 0 and ±1/32768), as of a muted microphone, reaches -0.89 in 128 bins."""
SILENT_PEAK = 10 ** (-70 / 20)
CLIPPED_SHARE = 1e-3
BAND_EDGE_HZ = 4500.0
BAND_MARGIN = 0.3
ROUNDING = 0.01
"""Two values that are 2 apart may be 2.006 apart once they have been rounded to bf16."""


@dataclass(frozen=True, slots=True)
class LogMelScale:
    """What the extractor of a model can give.

    Attributes:
        highest: Largest value.
        upper_bin: First mel bin that lies wholly above ``BAND_EDGE_HZ``; ``None`` if there is none.
    """

    highest: float
    upper_bin: int | None


def check_log_mel(x_CMT: Tensor, scale: LogMelScale | None) -> tuple[Tensor, Tensor]:
    """Check log-mel features.

    * nonfinite: a NaN or Inf; such a clip is counted for nothing else.
    * constant: one value everywhere.
    * silent: no value above ``SILENT_LOG_MEL``.
    * off_scale: outside [-1.5, ``highest``], or values further apart than 2. Zeros, as SpecAugment and collators that pad features leave
      them, lie inside both.
    * band_limited: neither silent nor constant, and no bin from ``upper_bin`` on is more than 0.3 (12 dB) above the clip's lowest value;
      values of exactly 0 (padding, SpecAugment) are left out there.

    Args:
        x_CMT: (C, M, T) floats.
        scale: What the extractor can give; ``None`` if it is not known (then only the first two are counted).

    Returns:
        float64, ``COLUMNS_SUMS`` and ``COLUMNS_MAXIMA``; the latter over all finite values, -inf if there is none.
    """
    sums, extremes = _nothing(x_CMT)
    for chunk_cMT in _clips(x_CMT):
        low_c, high_c = chunk_cMT.amin((1, 2)), chunk_cMT.amax((1, 2))  # five times as fast as aminmax along a dimension
        finite_c = _finite(low_c, high_c)
        constant_c = finite_c & (low_c == high_c)
        counted = {"nonfinite": ~finite_c, "constant": constant_c}
        if scale is not None:
            apart_c = high_c.float() - low_c.float() > RANGE + ROUNDING
            outside_c = (high_c > scale.highest + ROUNDING) | (low_c < FLOOR - ROUNDING) | apart_c
            counted["off_scale"] = finite_c & outside_c
            counted["silent"] = finite_c & (high_c <= SILENT_LOG_MEL)
        if scale is not None and scale.upper_bin is not None:
            upper_cMT = chunk_cMT[:, scale.upper_bin :]
            highest_c = upper_cMT.masked_fill(upper_cMT == 0, -math.inf).flatten(1).amax(1)
            heard_c = finite_c & ~constant_c & ~counted["silent"]
            counted["band_limited"] = heard_c & (highest_c <= low_c + BAND_MARGIN)
        sums = sums + _columns(counted)
        extremes = torch.maximum(extremes, _extremes(chunk_cMT))
    return sums, extremes


def check_waveform(x_CN: Tensor) -> tuple[Tensor, Tensor]:
    """Check waveforms.

    * nonfinite, constant: as in :func:`check_log_mel`.
    * silent: no sample further than -70 dB of full scale (1.0) from 0.
    * clipped: neither silent nor constant, and more than a thousandth of the samples are exactly the largest or the smallest one.

    Args:
        x_CN: (C, N) floats; a clip of several channels with all of them in one row.

    Returns:
        As :func:`check_log_mel`.
    """
    sums, extremes = _nothing(x_CN)
    for chunk_cN in _clips(x_CN):
        low_c, high_c = chunk_cN.amin(1), chunk_cN.amax(1)
        finite_c = _finite(low_c, high_c)
        constant_c = finite_c & (low_c == high_c)
        silent_c = finite_c & (torch.maximum(high_c, -low_c) < SILENT_PEAK)
        at_extreme_c = ((chunk_cN == low_c[:, None]) | (chunk_cN == high_c[:, None])).sum(1)
        clipped_c = finite_c & ~constant_c & ~silent_c & (at_extreme_c > CLIPPED_SHARE * chunk_cN.shape[1])
        sums = sums + _columns({"nonfinite": ~finite_c, "constant": constant_c, "silent": silent_c, "clipped": clipped_c})
        extremes = torch.maximum(extremes, _extremes(chunk_cN))
    return sums, extremes


def first_bin_above(bins: int, *, hertz: float = BAND_EDGE_HZ, nyquist: float = 8000.0) -> int | None:
    """Return the first of ``bins`` triangular filters on Slaney's mel scale that begins at ``hertz`` or above; ``None`` without one.

    Source: librosa.filters.mel, and transformers.audio_utils.mel_filter_bank with mel_scale="slaney" (as WhisperFeatureExtractor uses
    it): below 1 kHz 200/3 Hz a mel, above it a factor of 6.4 in 27 mels; filter i begins at edge i of ``bins + 2`` at equal distances.
    """
    top = _slaney_mels(nyquist)
    return next((i for i in range(bins) if top * i / (bins + 1) >= _slaney_mels(hertz)), None)


def _slaney_mels(hertz: float) -> float:
    return 3 * hertz / 200 if hertz < 1000 else 15 + 27 * math.log(hertz / 1000) / math.log(6.4)


def _nothing(x: Tensor) -> tuple[Tensor, Tensor]:
    sums = torch.zeros(len(COLUMNS_SUMS), dtype=torch.float64, device=x.device)
    return sums, torch.full((len(COLUMNS_MAXIMA),), -math.inf, dtype=torch.float64, device=x.device)


def _clips(x: Tensor) -> Iterator[Tensor]:
    """Yield a few clips at a time; none of a tensor without elements."""
    x = x.detach()
    if x.numel():
        yield from torch.split(x, per_chunk(x.element_size() * x[0].numel()))


def _finite(low_c: Tensor, high_c: Tensor) -> Tensor:
    """Tell which clips hold finite values only: ``aminmax`` hands NaN on, and 0 times NaN or Inf is NaN."""
    return (low_c * 0 == 0) & (high_c * 0 == 0)


def _columns(counted: dict[str, Tensor]) -> Tensor:
    none = torch.zeros_like(next(iter(counted.values())))
    return torch.stack([counted.get(name, none) for name in COLUMNS_SUMS]).sum(1).double()


def _extremes(chunk: Tensor) -> Tensor:
    high = chunk.nan_to_num(nan=-math.inf, posinf=-math.inf, neginf=-math.inf).amax()
    low = chunk.nan_to_num(nan=math.inf, posinf=math.inf, neginf=math.inf).amin()
    return torch.stack([high, -low]).double()
