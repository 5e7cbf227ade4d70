"""Statistics of one tensor of any shape and dtype as sums and extremes that add up over calls, micro-batches and ranks."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from probe.measure.chunks import accumulator, dense, per_chunk, pieces
from probe.measure.fused_statistics import FusedStatistics

COLUMNS_SUMS = ("sum", "sum_of_squares", "nonfinite")
COLUMNS_MAXIMA = ("maximum", "minimum_negated")

_MIB = 16.0
_SMALL = 1 << 14
"""Elements up to which numpy in float64 is faster than starting torch's threads."""
_ROW = 256
"""Elements added up in float32 before float64 takes over: the CPU's norm keeps 16 running sums, so none adds more than 16 values."""
_AT_ONCE = 1 << 25
"""Elements of which the row norms, and their float64 copies, take 1.5 MiB."""
_SURE = 6.0
"""Ratio of mean square to variance above which a difference of sums of 1e-7 no longer gives the deviation to 1e-6."""
_SAMPLE = 1 << 10
_CENTRED_MIB = 4.0
_TINY = 1e-12
"""Largest absolute value below which squares of values that matter may leave float32."""


@dataclass(frozen=True, slots=True)
class Moments:
    """The finished statistics of a tensor; all but ``nonfinite`` are None if it was empty or held NaN or Inf.

    ``std`` is the population standard deviation. ``rms`` and ``std`` are None as well where the sum of squares left float64.
    """

    mean: float | None = None
    rms: float | None = None
    std: float | None = None
    minimum: float | None = None
    maximum: float | None = None
    nonfinite: int = 0


def summarise(x: Tensor, *, fused: FusedStatistics | None = None) -> tuple[Tensor, Tensor]:
    """Reduce ``x`` to the columns ``COLUMNS_SUMS`` and ``COLUMNS_MAXIMA``: mean and rms within 1e-6, std within 1e-6 of rms.

    * With ``fused``, where it can: one kernel.
    * float32, bfloat16 and float16 on the CPU: at most four operations up to 3.9 Mi elements (float32: three, up to 32 Mi), and as many
      for each further such chunk; up to 16,384 elements, none. A tensor whose mean is larger than twice its deviation is centred, which
      is one more (float32: one more for each MiB of elements).
    * All else is widened to float64 in chunks and summed there, which needs no pivot, neither over- nor underflows for any value of a
      narrower dtype, and is out of reach of autocast and TF32: seven operations a chunk of 0.9 Mi elements of float32, the count
      of non-finite values included. On a device without float64 (MPS) chunks and results are float32: expect 1e-6 in mean and rms, but
      a ``std`` only as good as 1e-7 * (mean / std)**2.

    Extra memory stays below 16 MiB.

    Args:
        x: Any shape, strides and dtype; complex numbers count as pairs of reals, booleans as 0 and 1.
        fused: The kernel to use where it can be used.

    Returns:
        Float64 tensors of shapes (3,) and (2,) on the device of ``x``: zeros and -inf for an empty tensor. Not synced (a tensor on
        the CPU is read by the host, which is no sync). With NaN or Inf in ``x`` only the count means something.
    """
    x = torch.view_as_real(x.detach().resolve_conj()) if x.is_complex() else x.detach().resolve_neg()
    if x.numel() == 0:
        wide = accumulator(x.device)
        return torch.zeros(3, dtype=wide, device=x.device), torch.full((2,), -math.inf, dtype=wide, device=x.device)
    found = None if fused is None else fused(x)
    if found is None and _on_host(x):
        found = _host_columns(x)
    return _wide_columns(x) if found is None else (found[:3], found[3:])


def finish(count: float, sums: Mapping[str, float], maxima: Mapping[str, float]) -> Moments:
    """Divide the combined columns on the host.

    Args:
        count: Number of elements that went into the columns.
        sums: Values of ``COLUMNS_SUMS``.
        maxima: Values of ``COLUMNS_MAXIMA``.
    """
    nonfinite = int(sums["nonfinite"])
    if count == 0 or nonfinite > 0 or not math.isfinite(sums["sum"]):
        return Moments(nonfinite=nonfinite)
    mean, mean_square = sums["sum"] / count, sums["sum_of_squares"] / count
    minimum, maximum = -maxima["minimum_negated"], maxima["maximum"]
    if not math.isfinite(mean_square):
        return Moments(mean=mean, minimum=minimum, maximum=maximum)
    # A constant leaves the rounding of a difference of equals, which must not be shown as a spread.
    variance = 0.0 if minimum == maximum else max(mean_square - mean * mean, 0.0)
    return Moments(mean, math.sqrt(mean_square), math.sqrt(variance), minimum, maximum, nonfinite)


def _on_host(x: Tensor) -> bool:
    """Say whether the host reads the values of ``x`` where they lie, without waiting for a device."""
    return x.device.type == "cpu" and type(x) is Tensor


def _host_columns(x: Tensor) -> Tensor | None:
    """Return the five columns of a tensor on the CPU, (5,) float64; None if they need float64 throughout."""
    if x.numel() <= _SMALL or (x.dtype == torch.float64 and dense(x) is not None):
        return _numpy_columns(x)
    if x.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return None
    own = x.dtype != torch.float32
    # Of a tensor that is not dense each piece is a copy, and the one before it may still be there.
    limit = per_chunk(8, _MIB - 1) if dense(x) is None else per_chunk(4, _MIB - 1) if own else _AT_ONCE
    columns: list[tuple[float, float, float, float]] = []
    for piece in pieces(x, limit):
        found = _piece_columns(piece.float() if own else piece, own=own)
        if found is None:
            return None
        columns.append(found)
    sums, squares, highs, lows = zip(*columns)
    return torch.tensor([sum(sums), sum(squares), 0.0, max(highs), max(lows)], dtype=torch.float64)


def _numpy_columns(x: Tensor) -> Tensor:
    """Return the five columns of a tensor on the CPU that is small, or dense float64, in float64 throughout; without a torch thread."""
    x = x.float() if x.is_floating_point() and x.itemsize <= 2 else x  # numpy knows neither bfloat16 nor float8
    flat = dense(x)
    values = (x if flat is None else flat).numpy().reshape(-1).astype(np.float64, copy=False)
    with np.errstate(all="ignore"):
        total = values.sum()
        nonfinite = 0 if math.isfinite(total) else values.size - np.count_nonzero(np.isfinite(values))
        return torch.tensor([total, _square_sum(values), nonfinite, values.max(), -values.min()], dtype=torch.float64)


def _piece_columns(piece: Tensor, *, own: bool) -> tuple[float, float, float, float] | None:
    """Return sum, sum of squares, maximum and negated minimum of a 1-D float32 tensor on the CPU; None if float32 cannot hold them.

    The sum of squares is good to 1e-7, see :func:`_squares`. A variance that is small beside it is taken again, of the values less their
    mean, so that the variance is as good. ``own``: ``piece`` may be overwritten for that.
    """
    extremes = piece.aminmax()
    low, high = float(extremes.min.numpy()), float(extremes.max.numpy())
    total = float(piece.sum().numpy())
    if not math.isfinite(total) or 0 < max(high, -low) < _TINY:
        return None
    mean = total / piece.numel()
    squares = _squares(piece) if _looks_centred(piece, mean) else math.nan
    if not squares <= _SURE * (squares - mean * total):
        squares = _centred(piece, mean, own=own) + mean * total
    return (total, squares, high, -low) if math.isfinite(squares) else None


def _looks_centred(piece: Tensor, mean: float) -> bool:
    """Say by a few values whether the mean is small enough beside the deviation to take the sum of squares without it."""
    some = piece[:: piece.numel() // _SAMPLE | 1].numpy().astype(np.float64)
    return bool(_SURE * some.var() >= some.var() + mean * mean)


def _centred(piece: Tensor, mean: float, *, own: bool) -> float:
    """Return the sum of squares of a 1-D float32 tensor on the CPU less ``mean``."""
    limit = piece.numel() if own else min(piece.numel(), per_chunk(4, _CENTRED_MIB))
    buffer = piece if own else torch.empty(limit)
    return sum(_squares(torch.sub(part, mean, out=buffer[: part.numel()])) for part in torch.split(piece, limit))


def _square_sum(values: np.ndarray[Any, np.dtype[np.float64]]) -> float:
    """Return the sum of squares of a vector, on this thread: ``np.dot`` would wake BLAS's own threads, which get in torch's way."""
    return float(np.einsum("i,i->", values, values))


def _squares(values: Tensor) -> float:
    """Return the sum of squares of a 1-D float32 tensor on the CPU."""
    whole = values.numel() // _ROW * _ROW
    norms = torch.linalg.vector_norm(values[:whole].view(-1, _ROW), dim=1).numpy().astype(np.float64)
    rest = values[whole:].numpy().astype(np.float64)
    return _square_sum(norms) + _square_sum(rest)


def _wide_columns(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return the columns of ``x`` on its device, each chunk widened to float64. Nothing is read."""
    wide = accumulator(x.device)
    limit = min(x.numel(), per_chunk(wide.itemsize + 2 * x.itemsize, _MIB - 1))
    rows = []
    buffer = torch.empty(limit, dtype=wide, device=x.device)
    for piece in pieces(x, limit):
        chunk = buffer[: piece.numel()].copy_(piece)
        row = torch.empty(5, dtype=wide, device=x.device)
        torch.sum(chunk, 0, out=row[0])
        torch.dot(chunk, chunk, out=row[1])
        low, _ = torch.aminmax(chunk, out=(row[4], row[3]))
        low.neg_()
        # A finite value less itself is 0, every other one NaN, which is not 0.
        torch.linalg.vector_norm(chunk.sub_(chunk), 0, out=row[2])
        rows.append(row)
    if len(rows) == 1:
        return rows[0][:3], rows[0][3:]
    together = torch.stack(rows)
    return together[:, :3].sum(0), together[:, 3:].amax(0)
