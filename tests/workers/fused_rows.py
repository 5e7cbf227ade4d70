"""Runs the kernels of attention rows in Triton's interpreter, on the CPU, and prints their sums beside those of the other way."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported
sys.path.insert(0, str(Path(__file__).parents[2]))

import torch
from torch import Tensor

from probe.measure.attention import reduce_rows, sum_up
from probe.measure.fused_rows import FusedRows
from probe.measure.prepared import prepare
from probe.measure.probabilities import FromScores
from probe.measure.rows import choose_all_valid, choose_rows
from probe.measure.scores import Scores


def tensors(samples: int, heads: int, key_heads: int, queries: int, keys: int, width: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    q, k = torch.randn(samples, queries, heads, width) * 2, torch.randn(samples, keys, key_heads, width)
    return q.to(dtype).transpose(1, 2), k.to(dtype).transpose(1, 2)  # laid out as models have them


def cases() -> Iterator[tuple[str, Scores, bool, bool]]:
    """Yield calls: name, arguments, whether of self-attention, whether modalities are known."""
    torch.manual_seed(0)
    f32, bf16, f16 = torch.float32, torch.bfloat16, torch.float16
    yield "encoder", Scores(*tensors(2, 4, 4, 100, 100, 16, f32)), True, True
    yield "encoder bfloat16", Scores(*tensors(2, 4, 4, 100, 100, 16, bf16)), True, True
    yield "encoder float16", Scores(*tensors(2, 2, 2, 70, 70, 64, f16)), True, True
    yield "causal, grouped heads", Scores(*tensors(2, 6, 2, 90, 90, 20, f32), causal_offset=0), True, True
    yield "cross", Scores(*tensors(3, 2, 2, 20, 150, 16, f32)), False, True
    yield "one row a sample", Scores(*tensors(70, 2, 2, 9, 33, 16, f32)), False, True
    yield "nothing known", Scores(*tensors(2, 2, 2, 40, 40, 16, f32), causal_offset=0), True, False
    yield (
        "softcap and scale",
        Scores(*tensors(1, 2, 2, 70, 70, 16, f32), scale=0.7, softcap=5.0, window=(9, 0), causal_offset=0),
        True,
        True,
    )
    mask = torch.rand(2, 1, 50, 80) > 0.4
    mask[0, 0, :7] = False  # rows that see nothing
    yield "mask with blind rows", Scores(*tensors(2, 2, 2, 50, 80, 16, f32), mask=mask), False, True
    added = torch.zeros(2, 1, 50, 80).masked_fill(~mask, torch.finfo(f32).min) + torch.randn(2, 1, 50, 80)
    yield "added mask", Scores(*tensors(2, 2, 2, 50, 80, 16, f32), mask=added), False, True
    q, k = tensors(1, 2, 2, 30, 30, 16, f32)
    q[0, 1, 4], k[0, 0, 9, 2] = torch.nan, torch.inf
    yield "not finite", Scores(q, k), True, True
    yield "under autocast", Scores(*tensors(1, 2, 2, 30, 30, 16, bf16), autocast_dtype=bf16), True, True


def compared(scores: Scores, self_attention: bool, known: bool) -> dict[str, Any]:
    samples, _, queries, keys = scores.shape
    query = torch.randint(0, 4, (samples, queries), dtype=torch.int8) if known else None
    key = query if self_attention else torch.randint(0, 4, (samples, keys), dtype=torch.int8)
    choice = choose_all_valid(samples, queries, 40, torch.device("cpu")) if query is None else choose_rows(query, rows=40)
    source, fused = FromScores(scores), FusedRows(devices=("cpu",))
    given = {"query_modality_BS": query, "key_modality_BK": key, "self_attention": self_attention, "walks": True}
    prepared = prepare(source, choice, **given)
    taken = fused.takes(source, prepared)
    with_kernel, without = (sum_up([reduce_rows(source, prepared, fused=each)], prepared) for each in (fused, None))
    assert fused.failure is None, fused.failure
    return {
        "taken": taken,
        "finite": bool(without.sums_LC.isfinite().all()),
        "sums": [with_kernel.sums_LC[0].tolist(), without.sums_LC[0].tolist()],
        "heads": [with_kernel.per_head_LQH.flatten().tolist(), without.per_head_LQH.flatten().tolist()],
    }


def refused() -> dict[str, bool]:
    """Tell of calls that are not for the kernels whether they take them."""
    q, k = tensors(1, 2, 2, 20, 20, 16, torch.float32)
    calls = {
        "bias": Scores(q, k, bias=torch.randn(20, 20)),
        "sinks": Scores(q, k, sinks_H=torch.randn(2)),
        "a mask of each head": Scores(q, k, mask=torch.rand(1, 2, 20, 20) > 0.2),
        "float64": Scores(q.double(), k.double()),
        "rounded by autocast": Scores(q, k, autocast_dtype=torch.bfloat16),
        "wide heads": Scores(*tensors(1, 2, 2, 20, 20, 300, torch.float32)),
    }
    found = {}
    for name, scores in calls.items():
        source, fused = FromScores(scores), FusedRows(devices=("cpu",))
        prepared = prepare(source, choose_all_valid(1, 20, 8, q.device), query_modality_BS=None, key_modality_BK=None)
        found[name] = fused.takes(source, prepared)
        reduce_rows(source, prepared, fused=fused)
    return found


with torch.no_grad():
    print(json.dumps({"cases": {name: compared(*case) for name, *case in cases()}, "refused": refused()}))
