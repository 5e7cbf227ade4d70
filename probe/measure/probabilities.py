"""Attention probabilities before dropout for chosen query rows: recomputed from q and k, or gathered from the model's own softmax.

Shapes: B batch, S tokens (queries), K keys, H query heads, h key heads, G = H / h, D width, R sampled rows a sample, N = G * R. In a block
b samples, h heads and r rows.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from probe.measure.blocks import (
    MASKED_PAIR_BYTES,
    PAIR_BYTES,
    Costs,
    NotObservable,
    RowBlock,
    RowSource,
    check_rows,
    chunk_bytes,
    element_bytes,
    plan,
)
from probe.measure.masks import (
    RowMasks,
    View,
    allowed,
    bias_rows,
    check_masks,
    differs_by_head,
    row_masks,
    shared_masks,
    view_of,
    visible_rows,
)
from probe.measure.products import products
from probe.measure.scores import Scores

__all__ = ["FromScores", "FromSoftmax", "NotObservable", "RowBlock", "RowSource", "allowed"]

_MASK_BYTES = 8  # of one head's mask function at one (row, key) pair: an int64 on the way to a bool
_GATHERED_BYTES = 12  # of one probability that is gathered: itself, its score, where that allows it
# 2 to the power of these is 0 in float32 (float64): a score so far below the largest adds to no sum, and -inf would make 0 * -inf.
_FLOOR = {torch.float32: -300.0, torch.float64: -2200.0}
_LOG2_E = 1 / math.log(2)


@dataclass(frozen=True, slots=True)
class FromScores:
    """Rows recomputed from what the kernel was given, whatever kernel it is.

    Computed in float32 (float64 for float64 input); where TF32 is allowed, float32 q and k are multiplied in TF32, as the kernels do
    (bfloat16 and float16 lose nothing by it). A side of ``window`` that is negative hides nothing. With sinks, a row that sees no key
    is 0 in the sink, too.

    Raises:
        NotObservable: q or k is not 4-D or is nested, their shapes do not fit, or a mask is of an unknown kind or shape.
    """

    scores: Scores

    def __post_init__(self) -> None:
        """Check everything that the host can check."""
        _check_shapes(self.scores.q_BHSD, self.scores.k_BhKD)
        check_masks(self.scores)

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(B, H, S, K)."""
        return self.scores.shape

    @property
    def device(self) -> torch.device:
        """The queries' device."""
        return self.scores.q_BHSD.device

    @property
    def how(self) -> str:
        """As the scores say."""
        return self.scores.how

    @property
    def sinks(self) -> int:
        """1 where the layer has learned sinks."""
        return int(self.scores.sinks_H is not None)

    @property
    def view(self) -> View:
        """What decides which keys a query sees."""
        return view_of(self.scores)

    def visible(self, index_BR: Tensor) -> Tensor:
        """Return bool (B, R, K), see :class:`~probe.measure.blocks.RowSource`; its memory is that of the result and of one block."""
        index_BR = check_rows(index_BR, self.shape)
        samples, heads, _, keys = self.shape
        by_head = differs_by_head(self.scores)
        costs = Costs(chunk_bytes(self.shape), _MASK_BYTES)
        chunks = list(plan(samples, heads if by_head else 1, index_BR.shape[1], keys, costs))
        with torch.no_grad():
            if len(chunks) == 1:
                return visible_rows(self.scores, index_BR, slice(0, samples), slice(0, heads))
            visible_BRK = torch.zeros((*index_BR.shape, keys), dtype=torch.bool, device=index_BR.device)
            for b, h, r in chunks:
                visible_BRK[b, r] |= visible_rows(self.scores, index_BR[b, r], b, h if by_head else slice(0, heads))
        return visible_BRK

    def masks(self, index_BR: Tensor) -> RowMasks | None:
        """Return what hides keys from the rows, see :class:`~probe.measure.blocks.RowSource`."""
        with torch.no_grad():
            return shared_masks(self.scores, check_rows(index_BR, self.shape))

    def blocks(self, index_BR: Tensor, masks: RowMasks | None = None) -> Iterator[RowBlock]:
        """Yield the rows, see :class:`~probe.measure.blocks.RowSource`; float32 (b, h, r, K or K + 1)."""
        index_BR = check_rows(index_BR, self.shape)
        samples, heads, _, keys = self.shape
        given, pair = self.scores, PAIR_BYTES if masks is None else MASKED_PAIR_BYTES
        each = element_bytes(self.device, wide=given.q_BHSD.dtype == torch.float64)
        converted = given.k_BhKD.dtype not in (torch.float32, torch.float64) or given.autocast_dtype is not None
        costs = Costs(chunk_bytes(self.shape), each, pair, heads // given.k_BhKD.shape[1], converted)
        for b, h, r in _fewest(samples, heads, index_BR.shape[1], keys, costs):
            yield self._block(index_BR[b, r], b, h, r, masks)

    def _block(self, index_br: Tensor, b: slice, h: slice, r: slice, masks: RowMasks | None) -> RowBlock:
        """Return one block. No generator: what a generator enters stays entered where its consumer runs."""
        given, keys = self.scores, self.shape[3]
        with torch.no_grad(), torch.autocast(self.device.type, enabled=False):
            here = row_masks(given, index_br, b, h) if masks is None else masks.of(b, r)
            # Powers of two are taken of what is made of products alone: no further pass over them is needed then.
            binary = given.softcap is None and given.sinks_H is None and given.bias is None and not _is_added(given.mask)
            scores_bhrK = products(given, index_br, b, h, chunk_bytes(self.shape) // 2, times=_LOG2_E if binary else 1.0)
            if given.softcap is not None:
                scores_bhrK = scores_bhrK.div_(given.softcap).tanh_().mul_(given.softcap)
            bias = bias_rows(given, index_br, b, h)
            for added in (bias, here.added):
                if added is not None:
                    scores_bhrK += added
            if given.sinks_H is not None:
                sink_1h11 = given.sinks_H.detach()[h].to(scores_bhrK.dtype)[None, :, None, None]
                scores_bhrK = torch.cat((scores_bhrK, sink_1h11.expand(*scores_bhrK.shape[:3], 1)), -1)
            if not binary:
                scores_bhrK *= _LOG2_E
            return _softmax(RowBlock(b, h, r, scores_bhrK), here.blind, keys, floor=bias is not None)


@dataclass(frozen=True, slots=True)
class FromSoftmax:
    """Rows of the softmax that the model itself computed.

    Attributes:
        scores_BHSK: What went into the softmax, masks added: tells which keys a row may see.
        weights_BHSK: What came out, in the model's dtype.
        sinks: How many columns at the end are learned sinks and no keys; they are handed over as one.

    Raises:
        NotObservable: the two differ in shape, are not 4-D, or hold nothing but sinks.
    """

    scores_BHSK: Tensor
    weights_BHSK: Tensor
    sinks: int = 0

    def __post_init__(self) -> None:
        """Check the shapes."""
        if self.weights_BHSK.dim() != 4 or self.scores_BHSK.shape != self.weights_BHSK.shape:
            shapes = f"scores {tuple(self.scores_BHSK.shape)}, weights {tuple(self.weights_BHSK.shape)}"
            raise NotObservable(f"{shapes}: expected (batch, heads, queries, keys)")
        if not 0 <= self.sinks <= self.weights_BHSK.shape[3]:
            raise NotObservable(f"{self.sinks} sinks in weights of shape {tuple(self.weights_BHSK.shape)}")

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(B, H, S, K), K without the sinks."""
        samples, heads, queries, columns = self.weights_BHSK.shape
        return samples, heads, queries, columns - self.sinks

    @property
    def device(self) -> torch.device:
        """The weights' device."""
        return self.weights_BHSK.device

    @property
    def how(self) -> str:
        """Always the same words."""
        return "materialised softmax"

    @property
    def view(self) -> View | None:
        """Nothing: which keys a query sees is read from the scores."""
        return None

    def masks(self, index_BR: Tensor) -> RowMasks | None:
        """Return nothing, see :class:`~probe.measure.blocks.RowSource`."""
        return None

    def visible(self, index_BR: Tensor) -> Tensor:
        """Return bool (B, R, K), see :class:`~probe.measure.blocks.RowSource`; its memory is that of the result and of one block."""
        index_BR = check_rows(index_BR, self.shape)
        visible_BRK = torch.zeros((*index_BR.shape, self.shape[3]), dtype=torch.bool, device=self.device)
        with torch.no_grad():
            for b, h, r in self._plan(index_BR):
                visible_BRK[b, r] |= allowed(self._rows(self.scores_BHSK, index_BR[b, r], b, h)[..., : self.shape[3]]).any(1)
        return visible_BRK

    def blocks(self, index_BR: Tensor, masks: RowMasks | None = None) -> Iterator[RowBlock]:
        """Yield the rows, see :class:`~probe.measure.blocks.RowSource`; float32 (b, h, r, K or K + 1)."""
        index_BR = check_rows(index_BR, self.shape)
        for b, h, r in self._plan(index_BR):
            yield RowBlock(b, h, r, self._probabilities(index_BR[b, r], b, h))

    def _plan(self, index_BR: Tensor) -> Iterator[tuple[slice, slice, slice]]:
        samples, heads, _, keys = self.shape
        each = max(_GATHERED_BYTES, element_bytes(self.device, wide=self.weights_BHSK.dtype == torch.float64))
        return plan(samples, heads, index_BR.shape[1], keys, Costs(chunk_bytes(self.shape), each))

    def _probabilities(self, index_br: Tensor, b: slice, h: slice) -> Tensor:
        """Return p of one block; a row whose scores hide every key (a uniform softmax) becomes 0."""
        keys = self.shape[3]
        with torch.no_grad():
            p = self._rows(self.weights_BHSK, index_br, b, h).float()
            if self.sinks > 1:
                p = torch.cat((p[..., :keys], p[..., keys:].sum(-1, keepdim=True)), -1)
            may = allowed(self._rows(self.scores_BHSK, index_br, b, h)[..., :keys])
            return p.masked_fill_(~may.any(-1, keepdim=True), 0.0)

    def _rows(self, matrix_BHSK: Tensor, index_br: Tensor, b: slice, h: slice) -> Tensor:
        part = matrix_BHSK.detach()[b, h]
        return part.gather(2, index_br[:, None, :, None].expand(-1, part.shape[1], -1, part.shape[3]))


def _is_added(mask: Tensor | None) -> bool:
    return mask is not None and mask.dtype != torch.bool


def _fewest(samples: int, heads: int, rows: int, keys: int, costs: Costs) -> list[tuple[slice, slice, slice]]:
    """Return the plan with all rows of a head in one block, where that takes no more blocks: its keys are read once then."""
    by_rows, by_heads = (list(plan(samples, heads, rows, keys, replace(costs, all_rows=whole))) for whole in (costs.all_rows, True))
    return by_heads if len(by_heads) <= len(by_rows) else by_rows


def _check_shapes(q: Tensor, k: Tensor) -> None:
    if q.is_nested or k.is_nested:
        raise NotObservable("q or k is a nested tensor")
    shapes = f"q {tuple(q.shape)}, k {tuple(k.shape)}"
    if q.dim() != 4 or k.dim() != 4:
        raise NotObservable(f"{shapes}: expected (batch, heads, length, width)")
    if k.shape[0] not in (1, q.shape[0]) or k.shape[3] != q.shape[3]:
        raise NotObservable(f"{shapes}: batch or width do not fit")
    if k.shape[1] == 0 or q.shape[1] % k.shape[1]:
        raise NotObservable(f"{shapes}: the heads do not fit")


def _softmax(block: RowBlock, blind: Tensor | None, keys: int, *, floor: bool) -> RowBlock:
    """Return the block with probabilities in the place of its scores, which are overwritten.

    Source: with z = (s - max(s)) / log 2: p = 2^z / Z, Z the sum of 2^z; entropy = log Z - log 2 times the sum of p z. Powers of two,
    because on the CPU exp of what underflows, such as every hidden key, takes some 25 times as long (MKL's ``vsExp``).

    Args:
        block: Scores ÷ log 2 as ``p``.
        blind: Rows that see no key, if any may be.
        keys: Columns that are keys.
        floor: Whether scores may be -inf (of masks they are not).
    """
    z_bhrC = block.p
    z_bhrC -= z_bhrC.amax(-1, keepdim=True)
    if floor:
        z_bhrC.clamp_(min=_FLOOR[z_bhrC.dtype])
    p_bhrC = z_bhrC.exp2()
    sum_bhr = p_bhrC.sum(-1)
    if blind is not None:
        sum_bhr = sum_bhr.masked_fill(blind, torch.inf)
    p_bhrC /= sum_bhr.unsqueeze(-1)
    entropy_bhr = torch.sub(sum_bhr.log(), z_bhrC.mul_(p_bhrC).sum(-1), alpha=math.log(2))
    if blind is not None:
        entropy_bhr = entropy_bhr.masked_fill(blind, 0.0)
    # Where every column is a key, the largest probability is exp(0) / Z.
    top_bhr = sum_bhr.reciprocal() if p_bhrC.shape[-1] == keys else None
    if p_bhrC.dtype == torch.float64:
        return RowBlock(block.samples, block.heads, block.rows, p_bhrC.float(), entropy_bhr, top_bhr)
    return RowBlock(block.samples, block.heads, block.rows, p_bhrC, entropy_bhr, top_bhr, z_bhrC)
