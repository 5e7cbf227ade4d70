"""Statistics of one large tensor against the device's copy bandwidth and against one sum of it."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from benchmarks.units.targets import Target
from benchmarks.units.timing import Estimate, interleaved, ratio
from probe.measure.fused_statistics import FusedStatistics
from probe.measure.statistics import summarise

MIB = 1 << 20
SIZES_MIB = (1, 4, 16, 64, 256)
DTYPES = (torch.float32, torch.bfloat16)
SHARE = 0.80
ROUNDS = 15


@dataclass(frozen=True)
class Bandwidth:
    """One tensor's statistics.

    Attributes:
        mib: Size of the tensor.
        dtype: Of its elements.
        milliseconds: Of the statistics.
        copy_gb_s: Of ``y.copy_(x)``: bytes read and written a second.
        share: Bytes read a second by the statistics, over that.
        over_sum: Time of the statistics over that of ``x.sum()``.
        path: "fused", "eager", or why the fused kernel failed.
    """

    mib: int
    dtype: str
    milliseconds: float
    copy_gb_s: float
    share: Estimate
    over_sum: Estimate
    path: str = "eager"


def bandwidths(device: torch.device, *, sizes_mib: tuple[int, ...] = SIZES_MIB, rounds: int = ROUNDS) -> list[Bandwidth]:
    """Measure every size and dtype."""
    return [_one(device, mib, dtype, rounds) for dtype in DTYPES for mib in sizes_mib]


def _one(device: torch.device, mib: int, dtype: torch.dtype, rounds: int) -> Bandwidth:
    generator = torch.Generator(device).manual_seed(mib)
    x = torch.randn(mib * MIB // dtype.itemsize, generator=generator, device=device).to(dtype).view(-1, 256)
    y, fused = torch.empty_like(x), FusedStatistics()
    path = "fused" if fused.takes(x) else "eager"
    calls = {"statistics": lambda: summarise(x, fused=fused), "copy": lambda: y.copy_(x), "sum": lambda: x.sum()}
    times = interleaved(calls, rounds=rounds, device=device, warm_up=3, repeat=max(1, 16 // mib))
    nbytes = x.numel() * x.itemsize
    copy, own = times["copy"], times["statistics"]
    share = ratio([seconds / 2 for seconds in copy], own)  # the copy moves every byte twice
    middle = sorted(copy)[len(copy) // 2]
    return Bandwidth(
        mib,
        str(dtype).removeprefix("torch."),
        sorted(own)[len(own) // 2] * 1e3,
        2 * nbytes / middle / 1e9,
        share,
        ratio(own, times["sum"]),
        fused.failure or path,
    )


def target(rows: list[Bandwidth], device: torch.device) -> Target:
    """Judge the tensors of 16 MiB and more, which no cache holds."""
    large = [row for row in rows if row.mib >= 16]
    worst = min(large, key=lambda row: row.share.median)
    on_gpu = device.type == "cuda"
    met = worst.share.median >= SHARE if on_gpu else None
    why = "" if met else f"on the {worst.path} path"
    return Target(
        "statistics of a large tensor on a GPU",
        f">= {SHARE:.0%} of the measured copy bandwidth, one pass",
        f"{worst.share.text(scale=100, unit='%')} of {worst.copy_gb_s:.3g} GB/s ({worst.mib} MiB {worst.dtype}, the worst of {len(large)})",
        met,
        why if on_gpu else "no CUDA device: the figure is the eager path's on this CPU, where the target is not set",
    )
