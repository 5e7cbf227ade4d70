"""Spread: how much an activation varies over time and over the clips of a batch; 0 where an encoder has collapsed."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from probe.errors import ProbeValueError
from probe.measure.chunks import accumulator, per_chunk

COLUMNS_SUMS = ("time_variance", "batch_variance")
COLUMNS_COUNTS = ("time_rows", "batch_rows")

_ROUNDING = 2e-6
"""How far a mean in float32 may be off, as a share of its size."""


def spread(x_BTD: Tensor) -> tuple[Tensor, tuple[float, float]]:
    """Sum the population variances over time, and over the batch.

    Differences to the first frame (clip) are taken first, so identical frames give exactly 0 and a large mean costs nothing; then
    their own mean is taken off, and the squares are summed in float32 over a row of D, in float64 over rows (float64 throughout for
    float64). Six tensor operations each way a chunk; no temporary is larger than 8 MiB unless the values of one (b, d), or of one
    (t, d), are. No sync. On the CPU a contiguous float32 tensor takes two over time, and one more than clips over the batch (two clips:
    one), and no temporary.

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
    found = _host_sums(x_BTD) if x_BTD.device.type == "cpu" and type(x_BTD) is Tensor else None
    if found is not None:
        return torch.tensor(found, dtype=torch.float64), (time_rows, batch_rows)
    sums = torch.zeros(2, dtype=accumulator(x_BTD.device), device=x_BTD.device)
    if time_rows:
        _add_variances_over_first(x_BTD.transpose(0, 1), sums[0])
    if batch_rows:
        _add_variances_over_first(x_BTD, sums[1])
    return sums, (time_rows, batch_rows)


def standard_deviation(variance: float, rows: float) -> float | None:
    """Return the square root of the mean variance (``time_std``, ``batch_std``), on the host; None without rows or if not finite."""
    return math.sqrt(variance / rows) if rows > 0 and math.isfinite(variance) else None


def _host_sums(x_BTD: Tensor) -> tuple[float, float] | None:
    """Return both sums of a float32 tensor on the CPU (of a narrower one, if widening it takes at most 8 MiB); None if not sure of them.

    Distances to the mean are taken without writing the differences down. Not sure: where frames differ by no more than the mean is
    rounded, so that a spread of exactly 0 would not be seen.
    """
    if x_BTD.dtype != torch.float32 and x_BTD.itemsize == 2 and x_BTD.numel() <= per_chunk(4):
        x_BTD = x_BTD.float()
    if x_BTD.dtype != torch.float32 or not x_BTD.is_contiguous() or x_BTD.numel() == 0:
        return None
    batch, frames, _ = x_BTD.shape
    over_time = over_batch = 0.0
    if frames > 1:
        mean_B1D = x_BTD.mean(1, keepdim=True)
        over_time = _squared_distances(x_BTD, mean_B1D) / frames
        if over_time <= _ROUNDING**2 * _square_sum(mean_B1D):
            return None
    if batch == 2:  # both are as far from their mean
        over_batch = _squared_distances(x_BTD[0].unsqueeze(1), x_BTD[1].unsqueeze(1)) / 4
    elif batch > 2:
        mean_T1D = x_BTD.mean(0).unsqueeze(1)
        over_batch = sum(_squared_distances(x_TD.unsqueeze(1), mean_T1D) for x_TD in x_BTD.unbind()) / batch
        if over_batch <= _ROUNDING**2 * _square_sum(mean_T1D):
            return None
    return over_time, over_batch


def _squared_distances(x_NRD: Tensor, to_N1D: Tensor) -> float:
    """Return the sum of squared distances of all rows from the row of the same N, on the CPU: float32 a row, float64 over rows."""
    return _square_sum(torch.cdist(x_NRD, to_N1D, compute_mode="donot_use_mm_for_euclid_dist"))


def _square_sum(x: Tensor) -> float:
    values = x.numpy().reshape(-1).astype(np.float64)
    return float(np.einsum("i,i->", values, values))


def _add_variances_over_first(x_NMD: Tensor, total: Tensor) -> None:
    """Add the population variances over the first dimension, summed over the others, to a 0-dim tensor."""
    work = torch.float64 if x_NMD.dtype == torch.float64 else torch.float32
    wide = work.itemsize if x_NMD.dtype == work else 2 * work.itemsize  # the CPU widens into a temporary of its own
    for part in _columns(x_NMD, per_chunk(wide)):
        # The subtraction promotes: no rounding of bf16 differences.
        centred = part - part[:1].to(work)
        centred -= centred.mean(0)
        root = torch.linalg.vector_norm(torch.linalg.vector_norm(centred, dim=-1), dtype=total.dtype)
        total.addcmul_(root, root, value=1 / x_NMD.shape[0])


def _columns(x_NMD: Tensor, limit: int) -> Iterator[Tensor]:
    """Cut (N, M, D) along M, and where one m is too large along D, so that parts have at most ``limit`` elements (at least N)."""
    size, _, width = x_NMD.shape
    if size * width <= limit:
        yield from torch.split(x_NMD, max(1, limit // (size * width)), dim=1)
        return
    for part in torch.split(x_NMD, 1, dim=1):
        yield from torch.split(part, max(1, limit // size), dim=2)
