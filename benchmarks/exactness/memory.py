"""What looking at attention rows takes: extra memory at the peak against the full matrix, and the distance from float64 in bf16."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from costs import peak_mib
from probe.measure.attention import reduce_rows, sum_up
from probe.measure.prepared import prepare
from probe.measure.probabilities import FromScores
from probe.measure.quantities import AttentionSums
from probe.measure.rows import RowChoice, choose_all_valid
from probe.measure.scores import Scores

ROWS, WIDTH = 64, 64
SIZES = ((1, 16, 2048, 2048), (1, 8, 1500, 1500), (8, 8, 448, 1500), (1, 4, 64, 65_536))


@dataclass(frozen=True)
class MemoryRow:
    """One call of random q and k in bf16: ``difference`` is from a softmax in float64 of the same q and k, at every sampled row."""

    shape: tuple[int, int, int, int]
    matrix_mib: float
    peak_mib: float
    difference: float


def _described(source: FromScores, choice: RowChoice) -> AttentionSums:
    prepared = prepare(source, choice, query_modality_BS=None, key_modality_BK=None)
    return sum_up([reduce_rows(source, prepared)], prepared)


def memory_rows() -> Iterator[MemoryRow]:
    """Describe one call of each size."""
    for samples, heads, queries, keys in SIZES:
        generator = torch.Generator().manual_seed(keys)
        q, k = (torch.randn((samples, heads, n, WIDTH), generator=generator).bfloat16() for n in (queries, keys))
        source, choice = FromScores(Scores(q, k)), choose_all_valid(samples, queries, ROWS, q.device)
        peak = peak_mib(lambda: _described(source, choice))  # noqa: B023
        index = choice.index_BR[:, None, :, None].expand(-1, heads, -1, WIDTH)
        exact = torch.softmax(q.double().gather(2, index) @ k.double().mT * WIDTH**-0.5, -1)
        parts = ((part.p.double() - exact[part.samples, part.heads, part.rows]).abs().max() for part in source.blocks(choice.index_BR))
        yield MemoryRow((samples, heads, queries, keys), samples * heads * queries * keys * 4 / 2**20, peak, float(max(parts)))
