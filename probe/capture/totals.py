"""The running sums of one step: every cell's columns, this rank's own small tensors, host facts and reasons."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from probe.capture.cells import Cell


class Totals:
    """What observers add up during one step.

    Device columns stay on the device that computed them; nothing here waits for it. Memory is bounded by the cells (float64 columns)
    plus what :meth:`put` is given, which its callers bound.
    """

    def __init__(self, cells: Sequence[Cell]) -> None:
        """Start with every cell empty."""
        self.cells = {cell.name: cell for cell in cells}
        self.counts: dict[str, list[float]] = {cell.name: [0.0] * len(cell.counts) for cell in cells}
        self.sums: dict[str, Tensor] = {}
        self.maxima: dict[str, Tensor] = {}
        self.local: dict[str, Tensor] = {}
        self.facts: dict[str, Any] = {}
        self.reasons: dict[str, str] = {}

    def add(self, name: str, *, counts: Sequence[float] = (), sums: Tensor | None = None, maxima: Tensor | None = None) -> None:
        """Add one measurement to a cell.

        Args:
            name: The cell.
            counts: One number a count column, or nothing.
            sums: float64, one element a sum column, on any device.
            maxima: float64, one element a maximum column, on any device.
        """
        for i, value in enumerate(counts):
            self.counts[name][i] += value
        if sums is not None:
            known = self.sums.get(name)
            self.sums[name] = sums if known is None else known + sums.to(known.device, non_blocking=True)
        if maxima is not None:
            known = self.maxima.get(name)
            self.maxima[name] = maxima if known is None else torch.maximum(known, maxima.to(known.device, non_blocking=True))

    def put(self, key: str, tensor: Tensor) -> None:
        """Keep a small tensor of this rank for the record (a later one under the same key replaces it)."""
        self.local[key] = tensor.detach()

    def tell(self, key: str, value: Any) -> None:
        """Keep a fact that the host knows (a shape, a dtype), for the record of this rank."""
        self.facts[key] = value

    def omit(self, what: str, why: str) -> None:
        """Name something that could not be measured in this step; the first reason stays."""
        self.reasons.setdefault(what, why)
