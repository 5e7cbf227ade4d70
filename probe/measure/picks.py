"""Picks of rows that are looked at for many: a fixed number of those that a mask names, by a hash, without RNG or sync.

Shapes: N rows, R picked rows.
"""

from __future__ import annotations

import torch
from torch import Tensor

from probe.measure.rows import hash_positions


def pick_rows(mask_N: Tensor, *, most: int, salt: int = 0) -> tuple[Tensor, Tensor]:
    """Pick ``most`` of the rows where ``mask_N`` is true, each equally likely over salts; all of them if there are no more.

    Returns:
        int64 (R,) row numbers, R = min(most, N), and bool (R,), False for slots that are left over (their row is any). Costs some
        32 bytes a row for a moment.
    """
    rows = mask_N.numel()
    hash_N = hash_positions(1, rows, salt, mask_N.device).view(-1)
    values_R, index_R = hash_N.masked_fill_(~mask_N, -1).topk(min(most, rows))
    return index_R, values_R >= 0


def estimated(sums: Tensor, *, rows: Tensor, picked: Tensor) -> Tensor:
    """Return what sums over ``picked`` of ``rows`` stand for over all of them; exact when all were picked, 0 when none was."""
    return torch.where(picked > 0, sums * (rows.to(sums.dtype) / picked.clamp(min=1)), 0.0)


def variance_of_estimate(total: Tensor, squares: Tensor, *, rows: Tensor, picked: Tensor) -> Tensor:
    """Return the variance of ``estimated(total)``: N² s² / n · (1 - n / N), with s² from the n picked values; 0 with fewer than two.

    Source: Cochran, Sampling Techniques (3rd ed., 1977), theorem 2.2 (simple random sampling without replacement).
    """
    n = picked.clamp(min=2)
    spread = ((squares - total.square() / n) / (n - 1)).clamp(min=0)
    return torch.where(picked > 1, rows.square() * spread / n * (1 - n / rows.clamp(min=1)).clamp(min=0), 0.0)
