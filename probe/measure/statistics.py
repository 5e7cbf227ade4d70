"""Statistics of one tensor of any shape and dtype as sums and extremes that add up over calls, micro-batches and ranks."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from probe.measure.chunks import accumulator, per_chunk, pieces

COLUMNS_SUMS = ("sum", "sum_of_squares", "nonfinite")
COLUMNS_MAXIMA = ("maximum", "minimum_negated")


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


def summarise(x: Tensor) -> tuple[Tensor, Tensor]:
    """Reduce ``x`` to the columns ``COLUMNS_SUMS`` and ``COLUMNS_MAXIMA``.

    Every chunk is widened to float64 in one buffer of at most 8 MiB and summed there: that needs no pivot (a mean of 1000 standard
    deviations costs 6 of 16 digits), neither over- nor underflows for any value of a narrower dtype, and is out of reach of autocast
    and TF32, which take hold of float32 products only. Four tensor operations a chunk (six off the CPU, for the non-finite count).

    On a device without float64 (MPS) chunks and results are float32: expect 1e-6 in mean and rms, but a ``std`` only as good as
    1e-7 * (mean / std)**2.

    Args:
        x: Any shape, strides and dtype; complex numbers count as pairs of reals, booleans as 0 and 1.

    Returns:
        Float64 tensors of shapes (3,) and (2,) on the device of ``x``: zeros and -inf for an empty tensor. Not synced (a tensor on
        the CPU is read by the host, which is no sync). With NaN or Inf in ``x`` only the count means something.
    """
    x = torch.view_as_real(x.detach().resolve_conj()) if x.is_complex() else x.detach()
    wide = accumulator(x.device)
    if x.numel() == 0:
        return torch.zeros(3, dtype=wide, device=x.device), torch.full((2,), -math.inf, dtype=wide, device=x.device)
    limit = per_chunk(wide.itemsize)
    buffer = torch.empty(min(limit, x.numel()), dtype=wide, device=x.device)
    on_host, floating = _on_host(x), x.is_floating_point()
    sums, squares, lows, highs, bad = [], [], [], [], []
    for piece in pieces(x, limit):
        chunk = buffer[: piece.numel()].copy_(piece)
        sums.append(chunk.sum())
        squares.append(torch.dot(chunk, chunk))
        low, high = (piece if floating and piece.itemsize > 1 else chunk).aminmax()
        lows.append(low)
        highs.append(high)
        if floating and not on_host:
            bad.append(count_nonfinite(chunk))
    total = _combined(sums, torch.sum)
    if floating and on_host and not math.isfinite(total.item()):
        bad = [count_nonfinite(buffer[: piece.numel()].copy_(piece)) for piece in pieces(x, limit)]
    nonfinite = _combined(bad, torch.sum) if bad else torch.zeros_like(total)
    extremes = torch.stack([_combined(highs, torch.amax), -_combined(lows, torch.amin)])
    return torch.stack([total, _combined(squares, torch.sum), nonfinite.to(wide)]), extremes.to(wide)


def count_nonfinite(chunk: Tensor) -> Tensor:
    """Return the number of NaN and Inf values as a 0-dim int64 tensor, without a sync; ``chunk`` is destroyed.

    A finite value less itself is 0, every other one NaN: two operations and one boolean temporary, where ``isfinite`` takes five.
    """
    return torch.count_nonzero(chunk.sub_(chunk))


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
    """Say whether the host reads ``x`` without waiting for a device."""
    return x.device.type == "cpu"


def _combined(parts: list[Tensor], how: Callable[[Tensor], Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else how(torch.stack(parts))
