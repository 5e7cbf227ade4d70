"""How attention rows are handed over: block by block, so that nothing of the size of all rows, let alone of the whole matrix, is built.

Shapes: B batch, S tokens (queries), K keys, H heads, R sampled rows a sample; b, h, r: those of one block.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

CHUNK_BYTES = 8 * 2**20
#: What one probability takes at the worst moment, in the source (scores, softmax) or in the consumer (a float64 copy beside it).
ELEMENT_BYTES = 16
#: What one (row, key) pair takes beside that, whatever the number of heads: masks, indices, distances.
PAIR_BYTES = 24
#: What one key of one sample takes, whatever the number of rows: which groups of keys it is in.
KEY_BYTES = 64
_FEW_ROWS = 8


class NotObservable(Exception):  # noqa: N818  (a finding about the model, not a fault)
    """An attention call whose probabilities cannot be had; the message says why, in words for a report."""


@dataclass(frozen=True, slots=True)
class RowBlock:
    """The probabilities of some heads of some sampled rows of some samples.

    Attributes:
        samples, heads, rows: Which of B, H and R they are.
        p: float32 (b, h, r, K), or K + 1 where the layer has a learned sink (the last column); before dropout. 0 for keys that the row
            may not see, and throughout a row that sees none.
    """

    samples: slice
    heads: slice
    rows: slice
    p: Tensor


class RowSource(Protocol):
    """One attention call whose probabilities can be had for any query rows, its tensors by reference: use it at once, keep none."""

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(B, H, S, K) of the attention matrix; K without a sink."""

    @property
    def device(self) -> torch.device:
        """Where the probabilities are computed."""

    @property
    def how(self) -> str:
        """Where the probabilities come from, as the record says it."""

    @property
    def sinks(self) -> int:
        """How many learned sinks the layer has a row; if any, the last column of the blocks is their probability, and no key."""

    def visible(self, index_BR: Tensor) -> Tensor:
        """Return bool (B, R, K): keys that at least one head of the row may see."""

    def blocks(self, index_BR: Tensor) -> Iterator[RowBlock]:
        """Yield every (sample, head, row) once: samples outermost, then heads, rows innermost.

        The temporaries of a block stay within ``CHUNK_BYTES``, or are those of a single row. No sync.

        Raises:
            NotObservable: the rows are not of this call, or its mask cannot be evaluated.
        """


def plan(
    samples: int, heads: int, rows: int, keys: int, *, group: int = 1, element_bytes: int = ELEMENT_BYTES
) -> Iterator[tuple[slice, slice, slice]]:
    """Yield slices of samples, heads and rows, rows innermost, such that a block of them stays within ``CHUNK_BYTES``.

    Whole samples if they fit. Else some heads of one sample, in whole groups of ``group`` heads and as many as leave room for a few rows,
    because what costs as much for one head as for all (masks, distances) is done anew for each slice of heads; and as many rows as then
    fit. One row of one group that does not fit is cut into heads.
    """
    pairs = max(1, keys)
    sample_bytes = max(1, pairs * (rows * (element_bytes * heads + PAIR_BYTES) + KEY_BYTES))
    if sample_bytes <= CHUNK_BYTES or not rows:
        b_step, h_step, r_step = max(1, CHUNK_BYTES // sample_bytes), heads, max(1, rows)
    else:
        few = min(rows, _FEW_ROWS)
        h_step = min((CHUNK_BYTES // (few * pairs) - PAIR_BYTES) // element_bytes, CHUNK_BYTES // 4 // (pairs * 8), heads)
        h_step = max(group, h_step - h_step % group)
        b_step, r_step = 1, CHUNK_BYTES // (pairs * (element_bytes * h_step + PAIR_BYTES))
        if r_step == 0:
            h_step, r_step = min(group, max(1, (CHUNK_BYTES // pairs - PAIR_BYTES) // element_bytes)), 1
    within_groups = h_step < group
    for b in _slices(0, samples, b_step):
        for first in range(0, heads, group if within_groups else max(1, heads)):
            last = first + group if within_groups else heads
            for h in _slices(first, last, h_step, 1 if within_groups else group):
                for r in _slices(0, rows, r_step):
                    yield b, h, r


def check_rows(index_BR: Tensor, shape: tuple[int, int, int, int]) -> Tensor:
    """Return the row numbers, none beyond the call (on a GPU an index out of range would end the process).

    Raises:
        NotObservable: the call is empty, or the rows were chosen for another number of samples.
    """
    samples, _, queries, keys = shape
    if not all(shape):
        raise NotObservable(f"an empty call: {samples} samples, {queries} queries, {keys} keys")
    if index_BR.shape[0] != samples:
        raise NotObservable(f"rows were chosen for {index_BR.shape[0]} samples, the call has {samples}")
    return index_BR.clamp(max=queries - 1)


def _slices(first: int, last: int, step: int, unit: int = 1) -> Iterator[slice]:
    """Yield slices of about equal size, at most ``step`` each, in multiples of ``unit``."""
    parts = max(1, -(-(last - first) // step))
    even = -(-(last - first) // (parts * unit)) * unit
    return (slice(start, min(start + even, last)) for start in range(first, last, max(1, even)))
