"""Running sums: added, and maxima kept, over calls and micro-batches."""

from __future__ import annotations

import pytest
import torch

from probe.capture.cells import Cell
from probe.capture.totals import Totals

pytestmark = pytest.mark.pure  # of torch and probe alone: the same with every transformers


def vector(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def test_counts_and_sums_add_up_and_maxima_stay() -> None:
    """Two calls give the sum of their sums and the larger of their maxima."""
    totals = Totals([Cell("a", counts=("calls",), sums=("x", "y"), maxima=("m",))])
    totals.add("a", counts=(1,), sums=vector(1, 2), maxima=vector(-3))
    totals.add("a", counts=(2,), sums=vector(10, 20), maxima=vector(-5))
    assert totals.counts["a"] == [3]
    assert totals.sums["a"].tolist() == [11, 22]
    assert totals.maxima["a"].tolist() == [-3]


def test_adding_does_not_change_what_was_given() -> None:
    """The vectors may be held by captures as well: they stay as they were."""
    totals = Totals([Cell("a", sums=("x",))])
    first = vector(1)
    totals.add("a", sums=first)
    totals.add("a", sums=vector(5))
    assert first.tolist() == [1]


def test_the_first_reason_stays() -> None:
    """A second reason for the same thing does not hide the first."""
    totals = Totals([])
    totals.omit("a", "first")
    totals.omit("a", "second")
    assert totals.reasons == {"a": "first"}
