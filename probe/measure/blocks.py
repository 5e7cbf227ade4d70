"""How attention rows are handed over: block by block, so that nothing of the size of all rows, let alone of the whole matrix, is built.

Shapes: B batch, S tokens (queries), K keys, H heads, R sampled rows a sample; b, h, r: those of one block.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

if TYPE_CHECKING:
    from probe.measure.masks import RowMasks, View

CHUNK_BYTES = 8 * 2**20
#: What a block may take of the full matrix, in float32: there are two blocks' worth of small things beside one.
_SHARE = 26
_SMALLEST_CHUNK = 2**20
#: What one probability takes at the worst moment: scores, probabilities and, off the CPU, a float64 copy beside them.
ELEMENT_BYTES, CPU_ELEMENT_BYTES = 16, 8
#: What one (row, key) pair takes beside that, whatever the number of heads: distances and, unless they are there already, masks.
PAIR_BYTES, MASKED_PAIR_BYTES = 24, 8
#: What one key of one sample takes, whatever the number of rows: which groups of keys it is in.
KEY_BYTES = 80
_FEW_ROWS = 8


class NotObservable(Exception):  # noqa: N818  (a finding about the model, not a fault)
    """An attention call whose probabilities cannot be had; the message says why, in words for a report."""


@dataclass(frozen=True, slots=True)
class RowBlock:
    """The probabilities of some heads of some sampled rows of some samples.

    Attributes:
        samples, heads, rows: Which of B, H and R they are.
        p: float32 (b, h, r, K), or K + 1 where the layer has a learned sink (the last column); before dropout. 0 for keys that the row
            may not see, and throughout a row that sees none. Whoever is handed the block may overwrite it.
        entropy: (b, h, r) in nats, if the source knows it from the scores; 0 for a row that sees no key.
        top: (b, h, r) largest probability of a key, if the source knows it.
        spare: Memory of the form of ``p`` that is free to be overwritten, if the source has any left.
    """

    samples: slice
    heads: slice
    rows: slice
    p: Tensor
    entropy: Tensor | None = None
    top: Tensor | None = None
    spare: Tensor | None = None


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

    @property
    def view(self) -> View | None:
        """What decides which keys a query sees, to tell calls apart; ``None`` if only the call itself tells."""

    def visible(self, index_BR: Tensor) -> Tensor:
        """Return bool (B, R, K): keys that at least one head of the row may see."""

    def masks(self, index_BR: Tensor) -> RowMasks | None:
        """Return what hides keys from the rows, to be handed to ``blocks`` of this call and of others with the same view.

        ``None`` where it is worked out block by block: it differs by head, or is large.
        """

    def blocks(self, index_BR: Tensor, masks: RowMasks | None = None) -> Iterator[RowBlock]:
        """Yield every (sample, head, row) once: samples outermost, then heads, rows innermost.

        The temporaries of a block stay within :func:`chunk_bytes`, or are those of a single row. No sync.

        Args:
            index_BR: The rows.
            masks: What :meth:`masks` returned for these rows.

        Raises:
            NotObservable: the rows are not of this call, or its mask cannot be evaluated.
        """


def chunk_bytes(shape: tuple[int, int, int, int]) -> int:
    """Return what a block of a call of this shape may take: ``CHUNK_BYTES``, less where the full matrix itself is not large.

    For the rows of a layer are to take little beside what the layer takes itself. Where queries are few, the matrix is what it would be
    if they were as many as the keys.
    """
    samples, heads, queries, keys = shape
    return min(CHUNK_BYTES, max(_SMALLEST_CHUNK, 4 * samples * heads * max(queries, keys) * keys // _SHARE))


def element_bytes(device: torch.device, *, wide: bool = False) -> int:
    """Return what one probability takes at the worst moment; ``wide``: scores are float64."""
    return (CPU_ELEMENT_BYTES if device.type == "cpu" else ELEMENT_BYTES) + 12 * wide


@dataclass(frozen=True, slots=True)
class Costs:
    """What the parts of a block take, in bytes, and what it may take altogether.

    Attributes:
        limit: Of a block; ``None`` for ``CHUNK_BYTES``.
        element: Of one probability.
        pair: Of one (row, key) pair beside that.
        group: Heads that share their keys.
        all_rows: Whether all rows of a head are rather in one block than all heads of a row: then keys are converted once.
    """

    limit: int | None = None
    element: int = ELEMENT_BYTES
    pair: int = PAIR_BYTES
    group: int = 1
    all_rows: bool = False


def plan(samples: int, heads: int, rows: int, keys: int, costs: Costs) -> Iterator[tuple[slice, slice, slice]]:
    """Yield slices of samples, heads and rows, rows innermost, such that a block of them stays within the limit.

    Whole samples if they fit. Else some heads of one sample, in whole groups and as many as leave room for a few rows (for all, if the
    costs ask for it), and as many rows as then fit. One row of one group that does not fit is cut into heads.
    """
    limit = CHUNK_BYTES if costs.limit is None else costs.limit
    pairs, group = max(1, keys), costs.group
    sample_bytes = max(1, pairs * (rows * (costs.element * heads + costs.pair) + KEY_BYTES))
    if sample_bytes <= limit or not rows:
        b_step, h_step, r_step = max(1, limit // sample_bytes), heads, max(1, rows)
    else:
        few = rows if costs.all_rows else min(rows, _FEW_ROWS)
        h_step = min((limit // (few * pairs) - costs.pair) // costs.element, limit // 4 // (pairs * 8), heads)
        h_step = max(group, h_step - h_step % group)
        b_step, r_step = 1, limit // (pairs * (costs.element * h_step + costs.pair))
        if r_step == 0:
            h_step, r_step = min(group, max(1, (limit // pairs - costs.pair) // costs.element)), 1
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
