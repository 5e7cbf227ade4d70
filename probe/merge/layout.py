"""The fixed layout of a step's sums: which column of which cell stands where, the same on every rank."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from probe.capture.cells import Cell, CellValues


@dataclass(frozen=True, slots=True)
class Layout:
    """All cells of a run in order; widths are totals over them."""

    cells: tuple[Cell, ...]

    @property
    def counts(self) -> int:
        """Number of count columns."""
        return sum(len(cell.counts) for cell in self.cells)

    @property
    def sums(self) -> int:
        """Number of sum columns."""
        return sum(len(cell.sums) for cell in self.cells)

    @property
    def maxima(self) -> int:
        """Number of maximum columns."""
        return sum(len(cell.maxima) for cell in self.cells)

    def fingerprint(self) -> str:
        """Return a digest of names and columns: two ranks may add up their sums only if theirs are equal."""
        return hashlib.sha256(repr(self.cells).encode()).hexdigest()

    def values(self, sums: NDArray[np.float64], counts: NDArray[np.float64], maxima: NDArray[np.float64]) -> dict[str, CellValues]:
        """Cut the three packed vectors into values by cell and column name."""
        found: dict[str, CellValues] = {}
        s = c = m = 0
        for cell in self.cells:
            found[cell.name] = CellValues(
                dict(zip(cell.counts, counts[c : c + len(cell.counts)].tolist())),
                dict(zip(cell.sums, sums[s : s + len(cell.sums)].tolist())),
                dict(zip(cell.maxima, maxima[m : m + len(cell.maxima)].tolist())),
            )
            s, c, m = s + len(cell.sums), c + len(cell.counts), m + len(cell.maxima)
        return found


def make_layout(cells: Sequence[Cell]) -> Layout:
    """Return the layout of these cells.

    Raises:
        ValueError: if two cells share a name, which would add up what does not belong together.
    """
    names = [cell.name for cell in cells]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"cells must have different names; twice: {', '.join(twice)}")
    return Layout(tuple(cells))
