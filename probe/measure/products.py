"""The products of sampled query rows with all keys: what attention scores begin with.

Shapes: B batch, S tokens (queries), K keys, H query heads, h key heads, G = H / h, D width, R sampled rows a sample, N = G * R. In a block
b samples, h heads and r rows.
"""

from __future__ import annotations

import torch
from torch import Tensor

from probe.measure.scores import Scores


def products(given: Scores, index_br: Tensor, b: slice, h: slice, limit: int, *, times: float = 1.0) -> Tensor:
    """Return q @ k^T * scale * times of the rows, (b, h, r, K), in float32 (float64 for float64 input).

    Temporaries are within ``limit`` bytes.
    """
    q_BHSD, k_BhKD = given.q_BHSD.detach(), given.k_BhKD.detach()
    heads, width = q_BHSD.shape[1], q_BHSD.shape[3]
    group = heads // k_BhKD.shape[1]
    compute = torch.float64 if q_BHSD.dtype == torch.float64 else torch.float32
    rounded = given.autocast_dtype if compute == torch.float32 else None
    q_bhSD = q_BHSD[b, h]
    q_bhrD = q_bhSD.gather(2, index_br[:, None, :, None].expand(-1, q_bhSD.shape[1], -1, width))
    q_bhrD = _round(q_bhrD, rounded).to(compute) * ((width**-0.5 if given.scale is None else given.scale) * times)
    shared = slice(h.start // group, (h.stop - 1) // group + 1)
    k_bhKD = k_BhKD[b if k_BhKD.shape[0] > 1 else slice(None), shared].expand(q_bhrD.shape[0], -1, -1, -1)
    q_bhND = q_bhrD.reshape(k_bhKD.shape[0], k_bhKD.shape[1], -1, width)
    return _matmul(q_bhND, k_bhKD, rounded, limit).view(*q_bhrD.shape[:3], -1)


def _matmul(q_bhND: Tensor, k_bhKD: Tensor, rounded: torch.dtype | None, limit: int) -> Tensor:
    """Return q @ k^T as (b * h, N, K) in q's dtype: keys that must be converted, or copied, are so by the piece, within the limit."""
    keys = k_bhKD.shape[2]
    at_once = keys
    as_it_is = k_bhKD.dtype == q_bhND.dtype and rounded is None and (k_bhKD.shape[0] == 1 or k_bhKD.is_contiguous())
    if not as_it_is:
        at_once = max(1, limit // max(1, k_bhKD.numel() // keys * q_bhND.element_size()))
    q_nND = q_bhND.flatten(0, 1)

    def piece(start: int) -> Tensor:
        part = _round(k_bhKD[:, :, start : start + at_once], rounded)
        if not as_it_is:
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
