"""Cells: the fixed groups of columns into which every measurement is summed, so that steps and ranks combine by addition.

A cell belongs to one site and one concern. Its columns combine in two ways only: ``counts`` and ``sums`` add up, ``maxima`` take the
larger value (a minimum is kept negated). Means are divided on the host, after micro-batches and ranks are combined. The list of cells
is made once, when training begins, from what is the same on every rank; that is why two all-reduces of fixed size are enough.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Cell:
    """One group of columns.

    Attributes:
        name: Unique in a run, ``<concern>:<site>`` as a rule.
        counts: Columns whose values the host knows without asking the device (calls, elements). They add up.
        sums: Columns computed on the device, float64. They add up.
        maxima: Columns computed on the device, float64. The larger value stays; a minimum is stored negated.
    """

    name: str
    counts: tuple[str, ...] = ()
    sums: tuple[str, ...] = ()
    maxima: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class CellValues:
    """The host-side values of one cell, by column name, after micro-batches and ranks are combined."""

    counts: dict[str, float]
    sums: dict[str, float]
    maxima: dict[str, float]

    def minimum(self, column: str) -> float:
        """Return the minimum that the column of ``maxima`` holds negated."""
        return -self.maxima[column]


class Places:
    """Where the columns of each cell stand in the packed vectors: one of all sums, one of all maxima, in the order of the cells."""

    def __init__(self, cells: Sequence[Cell]) -> None:
        """Lay the cells out one after the other. Names must differ (:func:`probe.merge.layout.make_layout` sees to it)."""
        self.cells = tuple(cells)
        self.counts = {cell.name: len(cell.counts) for cell in self.cells}
        self.sums: dict[str, slice] = {}
        self.maxima: dict[str, slice] = {}
        sums = maxima = 0
        for cell in self.cells:
            self.sums[cell.name] = slice(sums, sums + len(cell.sums))
            self.maxima[cell.name] = slice(maxima, maxima + len(cell.maxima))
            sums, maxima = sums + len(cell.sums), maxima + len(cell.maxima)
        self.width = (sums, maxima)
        self.widths = ([len(cell.sums) for cell in self.cells], [len(cell.maxima) for cell in self.cells])
        self.index = {cell.name: index for index, cell in enumerate(self.cells)}
