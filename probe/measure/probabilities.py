"""Attention probabilities before dropout for chosen query rows: gathered from a softmax, or recomputed from q and k.

Shapes: B batch, S tokens (queries), K keys, H query heads, h key heads, G = H / h, D width, R sampled rows a sample; m is 1 or H.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

CHUNK_BYTES = 8 * 2**20
_MASKED_SCORE = -1e8


class NotObservable(Exception):  # noqa: N818  (a finding about the model, not a fault)
    """An attention call whose probabilities cannot be had; the message says why, in words for a report."""


@dataclass(frozen=True, slots=True)
class RowProbabilities:
    """The probabilities of chosen query rows in one attention call.

    Attributes:
        p_BHRK: float32, before dropout; 0 for keys that the row may not see, and throughout a row that sees none.
        visible_BRK: bool: keys that at least one head of the row may see (masks differ between heads in hardly any model).
        queries: S of the call.
        how: Where they came from, as the record says it.
    """

    p_BHRK: Tensor
    visible_BRK: Tensor
    queries: int
    how: str


def allowed(mask: Tensor) -> Tensor:
    """Return where a mask lets a query attend: a bool mask as it is, an added one where it is above half of the dtype's minimum.

    -1e8 and below hides too: -1e9 is added as often as the minimum is, and no bias of a real model goes near. NaN hides nothing, so that
    it shows in the probabilities.
    """
    if mask.dtype == torch.bool:
        return mask
    return ~(mask <= max(torch.finfo(mask.dtype).min / 2, _MASKED_SCORE))


def rows_from_sdpa(
    q_BHSD: Tensor,
    k_BhKD: Tensor,
    *,
    attn_mask: Tensor | None,
    is_causal: bool,
    scale: float | None,
    enable_gqa: bool,
    index_BR: Tensor,
    autocast_dtype: torch.dtype | None = None,
) -> RowProbabilities:
    """Recompute rows from what ``F.scaled_dot_product_attention`` was given.

    Computed in float32 (float64 for float64 input) by chunks of samples and heads whose temporaries stay within 8 MiB, or those of a
    single head of one sample where these are larger. The result takes B * H * R * K floats. No sync; where TF32 is allowed, float32 q
    and k are multiplied in TF32, as the kernels do (bfloat16 and float16 lose nothing by it).

    Args:
        q_BHSD: Queries.
        k_BhKD: Keys; fewer heads than q with ``enable_gqa``.
        attn_mask: bool (True: attend) or added to the scores; anything that broadcasts to (B, H, S, K).
        is_causal: Row i sees the keys 0 … i (aligned at the top left, also when S is not K).
        scale: ``None`` for D ** -0.5.
        enable_gqa: As in PyTorch.
        index_BR: Rows to compute, int64.
        autocast_dtype: The dtype to which autocast rounds the kernel's arguments, or ``None``.

    Raises:
        NotObservable: q or k is not 4-D, is nested or empty, their shapes do not fit, or the mask is an object of its own kind.
    """
    _check_shapes(q_BHSD, k_BhKD, index_BR, enable_gqa)
    _check_mask(attn_mask)
    with torch.no_grad(), torch.autocast(q_BHSD.device.type, enabled=False):
        (samples, heads, queries, width), (key_heads, keys) = q_BHSD.shape, k_BhKD.shape[1:3]
        rows, groups = index_BR.shape[1], heads // key_heads
        index_BR = index_BR.clamp(max=queries - 1)
        compute = torch.float64 if q_BHSD.dtype == torch.float64 else torch.float32
        rounded = autocast_dtype if autocast_dtype is not None and compute == torch.float32 else None
        q_BHRD = q_BHSD.detach().gather(2, index_BR[:, None, :, None].expand(-1, heads, -1, width))
        q_BHRD = _round(q_BHRD, rounded).to(compute) * (width**-0.5 if scale is None else scale)
        q_BhND = q_BHRD.reshape(samples, key_heads, groups * rows, width)
        k_BhKD = k_BhKD.detach().expand(samples, -1, -1, -1)
        bias_BmRK, allowed_BmRK = _mask_rows(attn_mask, is_causal, q_BHSD.shape, keys, index_BR, rounded)
        p_BhGRK = torch.empty((samples, key_heads, groups, rows, keys), dtype=torch.float32, device=q_BHSD.device)
        head_bytes = keys * (width + 2 * groups * rows) * compute.itemsize
        for b, h in _chunks(samples, key_heads, max(1, CHUNK_BYTES // max(1, head_bytes))):
            part = p_BhGRK[b, h]
            scores = _scores(q_BhND[b, h], _round(k_BhKD[b, h], rounded)).view(part.shape)
            part.copy_(_softmax(scores, _head_slice(bias_BmRK, b, h, groups), _head_slice(allowed_BmRK, b, h, groups)))
    visible_BRK = torch.ones((), dtype=torch.bool, device=q_BHSD.device).expand(samples, rows, keys)
    if allowed_BmRK is not None:
        visible_BRK = allowed_BmRK.any(1).expand(samples, rows, keys)
    return RowProbabilities(p_BHRK=p_BhGRK.flatten(1, 2), visible_BRK=visible_BRK, queries=queries, how="recomputed from q and k")


def rows_from_softmax(scores_BHSK: Tensor, weights_BHSK: Tensor, *, index_BR: Tensor) -> RowProbabilities:
    """Gather rows from the softmax that the model itself computed.

    Args:
        scores_BHSK: What went into the softmax, masks added: tells which keys a row may see.
        weights_BHSK: What came out, in the model's dtype.
        index_BR: Rows to gather, int64.

    Raises:
        NotObservable: the two differ in shape, are not 4-D or are empty, or the batch is not that of the rows.
    """
    if weights_BHSK.dim() != 4 or scores_BHSK.shape != weights_BHSK.shape:
        shapes = f"scores {tuple(scores_BHSK.shape)}, weights {tuple(weights_BHSK.shape)}"
        raise NotObservable(f"{shapes}: expected (batch, heads, queries, keys)")
    samples, heads, queries, keys = weights_BHSK.shape
    if weights_BHSK.numel() == 0:
        raise NotObservable(f"empty attention weights of shape {tuple(weights_BHSK.shape)}")
    if index_BR.shape[0] != samples:
        raise NotObservable(f"rows were chosen for {index_BR.shape[0]} samples, the call has {samples}")
    rows = index_BR.shape[1]
    with torch.no_grad():
        index = index_BR.clamp(max=queries - 1)[:, None, :, None].expand(-1, heads, -1, keys)
        p_BHRK = torch.empty((samples, heads, rows, keys), dtype=torch.float32, device=weights_BHSK.device)
        visible_BRK = torch.zeros((samples, rows, keys), dtype=torch.bool, device=weights_BHSK.device)
        head_bytes = samples * rows * keys * (scores_BHSK.element_size() + weights_BHSK.element_size())
        step = max(1, CHUNK_BYTES // max(1, head_bytes))
        for h in (slice(start, start + step) for start in range(0, heads, step)):
            p_BHRK[:, h] = weights_BHSK.detach()[:, h].gather(2, index[:, h])
            visible_BRK |= allowed(scores_BHSK.detach()[:, h].gather(2, index[:, h])).any(1)
        p_BHRK.masked_fill_(~visible_BRK.any(-1)[:, None, :, None], 0.0)
    return RowProbabilities(p_BHRK=p_BHRK, visible_BRK=visible_BRK, queries=queries, how="materialised softmax")


def _check_shapes(q: Tensor, k: Tensor, index_BR: Tensor, enable_gqa: bool) -> None:
    if q.is_nested or k.is_nested:
        raise NotObservable("q or k is a nested tensor")
    shapes = f"q {tuple(q.shape)}, k {tuple(k.shape)}"
    if q.dim() != 4 or k.dim() != 4:
        raise NotObservable(f"{shapes}: expected (batch, heads, length, width)")
    if q.numel() == 0 or k.numel() == 0:
        raise NotObservable(f"empty attention call: {shapes}")
    if k.shape[0] not in (1, q.shape[0]) or k.shape[3] != q.shape[3] or index_BR.shape[0] != q.shape[0]:
        raise NotObservable(f"{shapes}, rows for {index_BR.shape[0]} samples: batch or width do not fit")
    if q.shape[1] % k.shape[1] or (q.shape[1] != k.shape[1] and k.shape[1] != 1 and not enable_gqa):
        raise NotObservable(f"{shapes}: the heads do not fit (enable_gqa={enable_gqa})")


def _check_mask(mask: Tensor | None) -> None:
    if mask is not None and type(mask) not in (Tensor, nn.Parameter):
        raise NotObservable(f"the mask is a {type(mask).__name__}, not a plain tensor")
    if mask is not None and mask.dtype != torch.bool and not mask.is_floating_point():
        raise NotObservable(f"the mask has dtype {mask.dtype}: expected bool or floating point")


def _mask_rows(
    mask: Tensor | None, is_causal: bool, q_shape: torch.Size, keys: int, index_BR: Tensor, rounded: torch.dtype | None
) -> tuple[Tensor | None, Tensor | None]:
    """Return what is added to the scores of the rows and where they may attend, both (B or 1, m, R, K) or ``None``."""
    samples, _, queries, _ = q_shape
    bias_BmRK: Tensor | None = None
    allowed_BmRK: Tensor | None = None
    if is_causal:
        allowed_BmRK = (torch.arange(keys, device=index_BR.device) <= index_BR[:, :, None])[:, None]
    if mask is None:
        return None, allowed_BmRK
    mask = mask.detach()
    mask = mask.expand((1,) * (4 - mask.dim()) + mask.shape) if mask.dim() < 4 else mask
    if mask.stride(1) == 0:  # the same mask for every head, expanded by the model
        mask = mask[:, :1]
    if mask.shape[2] == queries and queries > 1:
        heads = mask.shape[1]
        mask = mask.expand(samples, heads, queries, keys).gather(2, index_BR[:, None, :, None].expand(-1, heads, -1, keys))
    mask = mask.expand(-1, -1, index_BR.shape[1], keys)
    if mask.dtype != torch.bool:
        bias_BmRK = _round(mask, rounded)
    may_BmRK = allowed(mask)
    return bias_BmRK, may_BmRK if allowed_BmRK is None else may_BmRK & allowed_BmRK


def _scores(q_bhND: Tensor, k_bhKD: Tensor) -> Tensor:
    """Return q @ k^T as (b * h, N, K) in q's dtype. One copy of the keys converts and lays them out; none if that is not needed."""
    if k_bhKD.dtype != q_bhND.dtype or not k_bhKD.is_contiguous():
        k_bhKD = torch.empty(k_bhKD.shape, dtype=q_bhND.dtype, device=k_bhKD.device).copy_(k_bhKD)
    return torch.bmm(q_bhND.flatten(0, 1), k_bhKD.flatten(0, 1).mT)


def _softmax(scores_bhGRK: Tensor, bias: Tensor | None, may: Tensor | None) -> Tensor:
    """Return the probabilities; overwrites the scores. Rows that may attend to nothing are 0."""
    if bias is not None:
        scores_bhGRK += bias
    if may is None:
        return torch.softmax(scores_bhGRK, dim=-1)
    p_bhGRK = torch.softmax(scores_bhGRK.masked_fill_(~may, float("-inf")), dim=-1)
    return p_bhGRK.masked_fill_(~may.any(-1, keepdim=True), 0.0)


def _head_slice(mask_BmRK: Tensor | None, b: slice, h: slice, groups: int) -> Tensor | None:
    """Return the part of a mask for some samples and key heads, broadcasting to (b, h, G, R, K)."""
    if mask_BmRK is None:
        return None
    part = mask_BmRK[b] if mask_BmRK.shape[0] > 1 else mask_BmRK
    return part[:, :, None] if part.shape[1] == 1 else part.reshape(part.shape[0], -1, groups, *part.shape[2:])[:, h]


def _chunks(samples: int, heads: int, at_once: int) -> Iterator[tuple[slice, slice]]:
    """Yield slices of samples and heads with at most ``at_once`` (sample, head) pairs each."""
    if at_once >= heads:
        step = at_once // heads
        yield from ((slice(b, min(b + step, samples)), slice(0, heads)) for b in range(0, samples, step))
    else:
        for b in range(samples):
            yield from ((slice(b, b + 1), slice(h, min(h + at_once, heads))) for h in range(0, heads, at_once))


def _round(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    return tensor if dtype is None else tensor.to(dtype)
