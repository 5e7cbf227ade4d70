"""Chunks: how a tensor of any size is worked through with temporaries of bounded size, without a copy of the whole."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

MIB = 1 << 20
CHUNK_MIB = 8.0
"""Bound of one temporary, in MiB, unless a single row is larger."""


def accumulator(device: torch.device) -> torch.dtype:
    """Return the dtype to accumulate in: float64, or float32 on a device that has no float64 (Apple's MPS)."""
    return torch.float32 if device.type == "mps" else torch.float64


def per_chunk(item_bytes: float, chunk_mib: float = CHUNK_MIB) -> int:
    """Return how many items of ``item_bytes`` fit into a chunk, at least 1."""
    return max(1, int(chunk_mib * MIB // max(item_bytes, 1)))


def pieces(x: Tensor, limit: int) -> Iterator[Tensor]:
    """Yield every element of ``x`` exactly once, as 1-D tensors of at most ``limit`` elements, in no promised order.

    A tensor that is dense in memory in whatever order of dimensions (a transposed one too) is cut into views. Of any other a piece at a
    time is copied. No sync.
    """
    flat = dense(x)
    if flat is None:
        yield from (block.reshape(-1) for _, block in blocks(x.unsqueeze(-1), limit))
    elif flat.numel() > limit:
        yield from torch.split(flat, limit)
    elif flat.numel():
        yield flat


def blocks(x: Tensor, rows: int) -> Iterator[tuple[int, Tensor]]:
    """Yield ``(number of the first row, block)`` for blocks of shape (n, V), 0 < n <= ``rows``, of a tensor of shape (..., V).

    The rows are the leading dimensions in row-major order, as ``x.reshape(-1, V)`` would number them. A block is a view where the
    strides allow it, else a copy of that block alone. No sync.
    """
    total = x.shape[:-1].numel()
    if total == 0:
        return
    if x.dim() == 2:
        yield from ((start, x[start : start + rows]) for start in range(0, total, rows))
        return
    if total <= rows:
        yield 0, x.reshape(-1, x.shape[-1])
        return
    inner = total // x.shape[0]
    together = max(1, rows // inner)
    for start in range(0, x.shape[0], together):
        part = x[start] if together == 1 else x[start : start + together]
        for offset, block in blocks(part, rows):
            yield start * inner + offset, block


def dense(x: Tensor) -> Tensor | None:
    """Return ``x`` as a 1-D view with the dimensions in the order of memory, or None if its elements do not lie side by side."""
    if not x.is_contiguous():
        x = x.permute(sorted(range(x.dim()), key=x.stride, reverse=True))
    return x.view(-1) if x.is_contiguous() else None
