"""Spread: how much an activation varies over time and over the clips of a batch; 0 where an encoder has collapsed."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from probe.errors import ProbeValueError
from probe.measure.chunks import accumulator, per_chunk

COLUMNS_SUMS = ("time_variance", "batch_variance")
COLUMNS_COUNTS = ("time_rows", "batch_rows")


def spread(x_BTD: Tensor) -> tuple[Tensor, tuple[float, float]]:
    """Sum the population variances over time, and over the batch.

    Differences to the first frame (clip) are taken first, so identical frames give exactly 0 and a large mean costs nothing; then
    their own mean is taken off, and the squares are summed in float32 a chunk, in float64 over chunks (float64 throughout for float64).
    No temporary is larger than 8 MiB unless the values of one (b, d), or of one (t, d), are. No sync.

    Args:
        x_BTD: Shape (B, T, D), or (T, D) for one clip; any real dtype.

    Returns:
        ``COLUMNS_SUMS`` as a float64 tensor of shape (2,): the variance over T summed over (b, d), the variance over B summed over
        (t, d). ``COLUMNS_COUNTS`` as numbers: B*D, or 0 with fewer than two frames; T*D, or 0 with fewer than two clips. On a device
        without float64 (MPS) the sums are float32. NaN or Inf in ``x_BTD`` gives NaN sums.

    Raises:
        ProbeValueError: if ``x_BTD`` has neither two nor three dimensions.
    """
    x_BTD = x_BTD.detach()
    if x_BTD.dim() not in (2, 3):
        raise ProbeValueError(f"spread of a tensor of shape {tuple(x_BTD.shape)}: expected (batch, time, width) or (time, width)")
    if x_BTD.dim() == 2:
        x_BTD = x_BTD.unsqueeze(0)
    batch, frames, width = x_BTD.shape
    time_rows = float(batch * width) if frames > 1 else 0.0
    batch_rows = float(frames * width) if batch > 1 else 0.0
    time_variance = _variances_over_first(x_BTD.transpose(0, 1), time_rows)
    batch_variance = _variances_over_first(x_BTD, batch_rows)
    return torch.stack([time_variance, batch_variance]), (time_rows, batch_rows)


def standard_deviation(variance: float, rows: float) -> float | None:
    """Return the square root of the mean variance (``time_std``, ``batch_std``), on the host; None without rows or if not finite."""
    return math.sqrt(variance / rows) if rows > 0 and math.isfinite(variance) else None


def _variances_over_first(x_NMD: Tensor, rows: float) -> Tensor:
    """Return the population variance over the first dimension, summed over the others: 0-dim, float64."""
    total = torch.zeros((), dtype=accumulator(x_NMD.device), device=x_NMD.device)
    if not rows:
        return total
    work = torch.float64 if x_NMD.dtype == torch.float64 else torch.float32
    for part in _columns(x_NMD, per_chunk(work.itemsize)):
        # The subtraction promotes inside its kernel: one temporary, and no rounding of bf16 differences.
        centred = part - part[:1].to(work)
        centred -= centred.mean(0)
        total += centred.square_().sum()
    return total.div_(x_NMD.shape[0])


def _columns(x_NMD: Tensor, limit: int) -> Iterator[Tensor]:
    """Cut (N, M, D) along M, and where one m is too large along D, so that parts have at most ``limit`` elements (at least N)."""
    size, _, width = x_NMD.shape
    if size * width <= limit:
        yield from torch.split(x_NMD, max(1, limit // (size * width)), dim=1)
        return
    for part in torch.split(x_NMD, 1, dim=1):
        yield from torch.split(part, max(1, limit // size), dim=2)
