"""Attention probabilities before dropout for chosen query rows: recomputed from q and k, or gathered from the model's own softmax.

Shapes: B batch, S tokens (queries), K keys, H query heads, h key heads, G = H / h, D width, R sampled rows a sample, N = G * R. In a block
b samples, h heads and r rows.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from probe.measure import blocks
from probe.measure.blocks import NotObservable, RowBlock, RowSource, check_rows, plan
from probe.measure.masks import allowed, check_masks, differs_by_head, mask_rows, visible_rows
from probe.measure.scores import Scores

__all__ = ["FromScores", "FromSoftmax", "NotObservable", "RowBlock", "RowSource", "allowed"]

_MASK_BYTES = 8  # of one head's mask function at one (row, key) pair: an int64 on the way to a bool


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

    def visible(self, index_BR: Tensor) -> Tensor:
        """Return bool (B, R, K), see :class:`~probe.measure.blocks.RowSource`; its memory is that of the result and of one block."""
        index_BR = check_rows(index_BR, self.shape)
        samples, heads, _, keys = self.shape
        by_head = differs_by_head(self.scores)
        chunks = list(plan(samples, heads if by_head else 1, index_BR.shape[1], keys, element_bytes=_MASK_BYTES))
        with torch.no_grad():
            if len(chunks) == 1:
                return visible_rows(self.scores, index_BR, slice(0, samples), slice(0, heads))
            visible_BRK = torch.zeros((*index_BR.shape, keys), dtype=torch.bool, device=index_BR.device)
            for b, h, r in chunks:
                visible_BRK[b, r] |= visible_rows(self.scores, index_BR[b, r], b, h if by_head else slice(0, heads))
        return visible_BRK

    def blocks(self, index_BR: Tensor) -> Iterator[RowBlock]:
        """Yield the rows, see :class:`~probe.measure.blocks.RowSource`; float32 (b, h, r, K or K + 1)."""
        index_BR = check_rows(index_BR, self.shape)
        samples, heads, _, keys = self.shape
        group = heads // self.scores.k_BhKD.shape[1]
        wide = 2 if self.scores.q_BHSD.dtype == torch.float64 else 1
        for b, h, r in plan(samples, heads, index_BR.shape[1], keys, group=group, element_bytes=wide * blocks.ELEMENT_BYTES):
            yield RowBlock(b, h, r, self._probabilities(index_BR[b, r], b, h))

    def _probabilities(self, index_br: Tensor, b: slice, h: slice) -> Tensor:
        """Return p of one block. No generator: what a generator enters stays entered where its consumer runs."""
        given = self.scores
        with torch.no_grad(), torch.autocast(self.device.type, enabled=False):
            scores_bhrK = _products(given, index_br, b, h)
            if given.softcap is not None:
                scores_bhrK = scores_bhrK.div_(given.softcap).tanh_().mul_(given.softcap)
            bias, may = mask_rows(given, index_br, b, h)
            if bias is not None:
                scores_bhrK += bias
            if may is not None:
                scores_bhrK.masked_fill_(~may, float("-inf"))
            if given.sinks_H is not None:
                sink_1h11 = given.sinks_H.detach()[h].to(scores_bhrK.dtype)[None, :, None, None]
                scores_bhrK = torch.cat((scores_bhrK, sink_1h11.expand(*scores_bhrK.shape[:3], 1)), -1)
            p = torch.softmax(scores_bhrK, -1).float()
            return p if may is None else p.masked_fill_(~may.any(-1, keepdim=True), 0.0)


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

    def visible(self, index_BR: Tensor) -> Tensor:
        """Return bool (B, R, K), see :class:`~probe.measure.blocks.RowSource`; its memory is that of the result and of one block."""
        index_BR = check_rows(index_BR, self.shape)
        visible_BRK = torch.zeros((*index_BR.shape, self.shape[3]), dtype=torch.bool, device=self.device)
        with torch.no_grad():
            for b, h, r in self._plan(index_BR):
                visible_BRK[b, r] |= allowed(self._rows(self.scores_BHSK, index_BR[b, r], b, h)[..., : self.shape[3]]).any(1)
        return visible_BRK

    def blocks(self, index_BR: Tensor) -> Iterator[RowBlock]:
        """Yield the rows, see :class:`~probe.measure.blocks.RowSource`; float32 (b, h, r, K or K + 1)."""
        index_BR = check_rows(index_BR, self.shape)
        for b, h, r in self._plan(index_BR):
            yield RowBlock(b, h, r, self._probabilities(index_BR[b, r], b, h))

    def _plan(self, index_BR: Tensor) -> Iterator[tuple[slice, slice, slice]]:
        samples, heads, _, keys = self.shape
        return plan(samples, heads, index_BR.shape[1], keys)

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


def _products(given: Scores, index_br: Tensor, b: slice, h: slice) -> Tensor:
    """Return q @ k^T * scale of the rows, (b, h, r, K), in float32 (float64 for float64 input)."""
    q_BHSD, k_BhKD = given.q_BHSD.detach(), given.k_BhKD.detach()
    heads, width = q_BHSD.shape[1], q_BHSD.shape[3]
    group = heads // k_BhKD.shape[1]
    compute = torch.float64 if q_BHSD.dtype == torch.float64 else torch.float32
    rounded = given.autocast_dtype if compute == torch.float32 else None
    q_bhSD = q_BHSD[b, h]
    q_bhrD = q_bhSD.gather(2, index_br[:, None, :, None].expand(-1, q_bhSD.shape[1], -1, width))
    q_bhrD = _round(q_bhrD, rounded).to(compute) * (width**-0.5 if given.scale is None else given.scale)
    shared = slice(h.start // group, (h.stop - 1) // group + 1)
    k_bhKD = k_BhKD[b if k_BhKD.shape[0] > 1 else slice(None), shared].expand(q_bhrD.shape[0], -1, -1, -1)
    q_bhND = q_bhrD.reshape(k_bhKD.shape[0], k_bhKD.shape[1], -1, width)
    return _matmul(q_bhND, k_bhKD, rounded).view(*q_bhrD.shape[:3], -1)


def _matmul(q_bhND: Tensor, k_bhKD: Tensor, rounded: torch.dtype | None) -> Tensor:
    """Return q @ k^T as (b * h, N, K) in q's dtype: keys that must be converted or laid out are so by the piece, at half of a chunk."""
    keys = k_bhKD.shape[2]
    at_once = keys
    if k_bhKD.dtype != q_bhND.dtype or rounded is not None or not k_bhKD.is_contiguous():
        at_once = max(1, blocks.CHUNK_BYTES // 2 // max(1, k_bhKD.numel() // keys * q_bhND.element_size()))
    q_nND = q_bhND.flatten(0, 1)

    def piece(start: int) -> Tensor:
        part = _round(k_bhKD[:, :, start : start + at_once], rounded)
        if part.dtype != q_bhND.dtype or not part.is_contiguous():
            part = torch.empty(part.shape, dtype=q_bhND.dtype, device=part.device).copy_(part)
        return torch.bmm(q_nND, part.flatten(0, 1).mT)

    if at_once >= keys:
        return piece(0)
    product_nNK = q_nND.new_empty((*q_nND.shape[:2], keys))
    for start in range(0, keys, at_once):
        product_nNK[..., start : start + at_once] = piece(start)
    return product_nNK


def _round(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    return tensor if dtype is None else tensor.to(dtype)
