"""All rows of an attention call put together from their blocks, which the package itself never does."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from probe.measure.blocks import RowSource


@dataclass
class Rows:
    """Probabilities (B, H, R, K, or K + 1 with a sink) and visible keys (B, R, K)."""

    p_BHRK: Tensor
    visible_BRK: Tensor


def together(source: RowSource, index_BR: Tensor) -> Rows:
    """Put the blocks together; each row of each head comes exactly once, in the promised order."""
    samples, heads, _, keys = source.shape
    columns = keys + (1 if source.sinks else 0)
    p_BHRK = torch.full((samples, heads, index_BR.shape[1], columns), torch.inf)
    order = []
    for block in source.blocks(index_BR):
        target = p_BHRK[block.samples, block.heads, block.rows]
        assert target.shape == block.p.shape
        assert block.p.dtype == torch.float32
        assert bool((target == torch.inf).all()), "handed over twice"
        target.copy_(block.p)
        order.append((block.samples.start, block.heads.start, block.rows.start))
    assert order == sorted(order)
    assert not (p_BHRK == torch.inf).any(), "left out"
    return Rows(p_BHRK, source.visible(index_BR))
