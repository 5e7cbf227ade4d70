"""The running sums of one step: every cell's columns, this rank's own small tensors, host facts and reasons."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from probe.capture.cells import Cell, Places
from probe.measure.chunks import accumulator


@dataclass(frozen=True, slots=True)
class Vectors:
    """All sum columns and all maximum columns of one device, float64 (float32 on MPS), in the order of the cells.

    ``rows``: views of each cell's sums, and of each cell's maxima.
    """

    sums: Tensor
    maxima: Tensor
    rows: tuple[tuple[Tensor, ...], tuple[Tensor, ...]]


class Totals:
    """What observers add up during one step.

    Columns stay on the device that computed them: a device has one preallocated vector of all sums (zeros) and one of all maxima (-inf),
    made when its first cell is added to, and adding is one operation in place; nothing here waits for the device. Memory is bounded by
    the cells plus what :meth:`put` is given, which its callers bound. A new object costs next to nothing until it is added to.
    """

    def __init__(self, cells: Places | Sequence[Cell]) -> None:
        """Start with every cell empty."""
        self.places = cells if isinstance(cells, Places) else Places(cells)
        self.counts: dict[str, list[float]] = _Counts(self.places.counts)
        self.local: dict[str, Tensor] = {}
        self.facts: dict[str, Any] = {}
        self.reasons: dict[str, str] = {}
        self.vectors: dict[torch.device, Vectors] = {}
        self._added: tuple[dict[str, None], dict[str, None]] = ({}, {})

    @property
    def sums(self) -> Mapping[str, Tensor]:
        """The sum columns of the cells that sums were added to, by name: views of the running vector while they lie on one device."""
        return {name: self._over_devices(name, 0) for name in self._added[0]}

    @property
    def maxima(self) -> Mapping[str, Tensor]:
        """The maximum columns of the cells that maxima were added to, as :attr:`sums`."""
        return {name: self._over_devices(name, 1) for name in self._added[1]}

    def add(self, name: str, *, counts: Sequence[float] = (), sums: Tensor | None = None, maxima: Tensor | None = None) -> None:
        """Add one measurement to a cell: one operation for ``sums``, one for ``maxima``.

        Args:
            name: The cell.
            counts: One number a count column, or nothing.
            sums: One element a sum column, on any device, of any dtype that float64 holds.
            maxima: One element a maximum column, on any device.

        Raises:
            ValueError: if a vector has another number of elements than the cell has columns.
        """
        if counts:
            known = self.counts[name]
            for i, value in enumerate(counts):
                known[i] += value
        if sums is not None:
            row = self._row(name, sums.device, 0)
            _check(name, sums, row)
            self._added[0][name] = None
            row.add_(sums.detach() if sums.requires_grad else sums)
        if maxima is not None:
            row = self._row(name, maxima.device, 1)
            _check(name, maxima, row)
            self._added[1][name] = None
            torch.maximum(row, maxima.detach() if maxima.requires_grad else maxima, out=row)

    def row(self, name: str, device: torch.device) -> tuple[Tensor, Tensor]:
        """Return a cell's running sums and maxima on a device, for a kernel that adds to them itself; they count as added to.

        Returns:
            Views, float64 (float32 on MPS), of (sum columns,) and (maximum columns,). They stand for this step only.
        """
        for added, places in zip(self._added, (self.places.sums, self.places.maxima)):
            if places[name].stop > places[name].start:
                added[name] = None
        return self._row(name, device, 0), self._row(name, device, 1)

    def add_rows(self, names: Sequence[str | None], *, sums: Tensor | None = None, maxima: Tensor | None = None) -> None:
        """Add one row to each of several cells: one operation for every run of cells that stand side by side in the order of cells.

        Args:
            names: The cell of each row; the row of ``None`` is left out.
            sums: (cells, sum columns).
            maxima: (cells, maximum columns).

        Raises:
            ValueError: if a row has another number of elements than its cell has columns.
        """
        for kind, matrix in enumerate((sums, maxima)):
            if matrix is not None:
                self._add_runs(names, matrix.detach(), kind)

    def put(self, key: str, tensor: Tensor) -> None:
        """Keep a small tensor of this rank for the record (a later one under the same key replaces it)."""
        self.local[key] = tensor.detach()

    def tell(self, key: str, value: Any) -> None:
        """Keep a fact that the host knows (a shape, a dtype), for the record of this rank."""
        self.facts[key] = value

    def omit(self, what: str, why: str) -> None:
        """Name something that could not be measured in this step; the first reason stays."""
        self.reasons.setdefault(what, why)

    def _add_runs(self, names: Sequence[str | None], matrix: Tensor, kind: int) -> None:
        places, vector = (self.places.sums, self.places.maxima)[kind], self._vector(matrix.device, kind)
        for name in names:
            if name is not None and (len(names), places[name].stop - places[name].start) != tuple(matrix.shape):
                raise ValueError(_other_width(name, places[name].stop - places[name].start, tuple(matrix.shape[1:])))
        for first, last in _runs(names, places):
            block, into = matrix[first : last + 1].reshape(-1), vector[places[str(names[first])].start : places[str(names[last])].stop]
            self._added[kind].update(dict.fromkeys(str(name) for name in names[first : last + 1]))
            into.add_(block) if kind == 0 else torch.maximum(into, block, out=into)

    def _row(self, name: str, device: torch.device, kind: int) -> Tensor:
        vectors = self.vectors.get(device) or self._on(device)
        return vectors.rows[kind][self.places.index[name]]

    def _vector(self, device: torch.device, kind: int) -> Tensor:
        vectors = self.vectors.get(device) or self._on(device)
        return vectors.maxima if kind else vectors.sums

    def _on(self, device: torch.device) -> Vectors:
        """Make the vectors of a device, and the views of all cells in one call each."""
        (width, lowest), dtype = self.places.width, accumulator(device)
        sums, maxima = torch.zeros(width, dtype=dtype, device=device), torch.full((lowest,), -torch.inf, dtype=dtype, device=device)
        rows = tuple(torch.split(vector, widths) for vector, widths in zip((sums, maxima), self.places.widths))
        found = self.vectors[device] = Vectors(sums, maxima, (rows[0], rows[1]))
        return found

    def _over_devices(self, name: str, kind: int) -> Tensor:
        first, *others = (self._row(name, device, kind) for device in self.vectors)
        for other in others:
            other = other.to(first.device, non_blocking=True)
            first = first + other if kind == 0 else torch.maximum(first, other)
        return first


class _Counts(dict[str, list[float]]):
    """The counts of cells by name: zeros for those that nothing was added to yet."""

    def __init__(self, widths: Mapping[str, int]) -> None:
        super().__init__()
        self._widths = widths

    def __missing__(self, name: str) -> list[float]:
        found = self[name] = [0.0] * self._widths[name]
        return found


def _runs(names: Sequence[str | None], places: Mapping[str, slice]) -> Iterator[tuple[int, int]]:
    """Yield the first and last row of every run of cells that stand side by side."""
    first = None
    for index, name in enumerate(names):
        if first is not None and (name is None or places[name].start != places[str(names[index - 1])].stop):
            yield first, index - 1
            first = None
        if name is not None and first is None:
            first = index
    if first is not None:
        yield first, len(names) - 1


def _check(name: str, given: Tensor, row: Tensor) -> None:
    if given.shape != row.shape:
        raise ValueError(_other_width(name, row.numel(), tuple(given.shape)))


def _other_width(name: str, columns: int, shape: tuple[int, ...]) -> str:
    return f"cell {name} has {columns} columns and was given a tensor of shape {shape}"
