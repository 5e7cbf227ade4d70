"""Runs the fused kernel in Triton's interpreter, on the CPU, and prints what it gives and what float64 gives."""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Iterator
from pathlib import Path

os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported
sys.path.insert(0, str(Path(__file__).parents[2]))

import torch
from torch import Tensor

from probe.measure import statistics_kernel as kernel
from probe.measure.fused_statistics import FusedStatistics

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
SIZES = (1, 1023, 1025, 4095, 4096, 4097, 20_000)


def float64_columns(x: Tensor) -> list[float]:
    """Return the five columns; of a tensor that is not finite the count alone."""
    wide = x.double()
    bad = float((~wide.isfinite()).sum())
    if bad:
        return [bad]
    return [wide.sum().item(), wide.square().sum().item(), 0.0, wide.max().item(), -wide.min().item()]


def cases() -> Iterator[tuple[str, Tensor]]:
    """Yield sizes around the borders of blocks and tiles, values that are not finite, and values that are hard in float32."""
    generator = torch.Generator().manual_seed(0)
    for dtype_name, dtype in DTYPES.items():
        for size in SIZES:
            yield f"{dtype_name} {size}", (torch.randn(size, generator=generator) * 3 + 1).to(dtype)
        for name, value in (("nan", math.nan), ("inf", math.inf), ("-inf", -math.inf)):
            x = torch.randn(9000, generator=generator).to(dtype)
            x[0] = x[1500] = x[4096] = x[8999] = value
            yield f"{dtype_name} {name}", x
        yield f"{dtype_name} no finite value", torch.full((5000,), math.nan).to(dtype)
        yield f"{dtype_name} transposed", torch.randn(3, 40, 50, generator=generator).to(dtype).transpose(0, 2)
        yield f"{dtype_name} constant", torch.full((5000,), 0.1).to(dtype)
        yield f"{dtype_name} zero", torch.zeros(5000).to(dtype)
    normal = torch.randn(40, 256, generator=generator)
    channel = normal.clone()
    channel[:, 0] *= 1e4
    yield "mean 1e6", normal + 1e6
    yield "mean -100", normal - 100
    yield "one channel", channel
    yield "huge", normal * 1e30
    yield "tiny", normal * 1e-30
    yield "tiny around tiny", normal * 1e-22 + 1e-20
    yield "largest", torch.full((6000,), 3e38)


def main() -> None:
    """Print one JSON object."""
    fused = FusedStatistics(devices=("cpu",))
    found = {}
    for name, x in cases():
        columns = fused(x)
        assert columns is not None, fused.failure
        assert columns.dtype == torch.float64
        found[name] = {"count": x.numel(), "fused": columns.tolist(), "float64": float64_columns(x)}
    x = torch.randn(20_000, generator=torch.Generator().manual_seed(1))
    columns, again = fused(x), fused(x)
    kernel._SLOTS = kernel.tl.constexpr(2)  # the last program adds up in several rounds
    rounds = fused(x)
    into = (torch.zeros(3, dtype=torch.float64), torch.full((2,), -math.inf, dtype=torch.float64))
    each = [fused(part, into=into) for part in (x[:5000], x[5000:5001], x[5001:])]
    assert columns is not None and again is not None and rounds is not None and each[0] is not None
    print(
        json.dumps(
            {
                "cases": found,
                "again": [columns.tolist(), again.tolist()],
                "rounds": [columns.tolist(), rounds.tolist()],
                "into": [columns.tolist(), [*into[0].tolist(), *into[1].tolist()]],
                "first of into": [each[0].tolist(), float64_columns(x[:5000])],
                "counters": [counter.item() for counter in fused._counters.values()],
                "refused": [
                    name
                    for name, other in (
                        ("empty", x[:0]),
                        ("float64", x.double()),
                        ("int", x.long()),
                        ("strided", x[::2]),
                        ("parameter", torch.nn.Parameter(x)),
                    )
                    if fused(other) is None
                ],
                "failure": fused.failure,
            }
        )
    )


main()
