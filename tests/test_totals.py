"""Running sums: added, and maxima kept, over calls and micro-batches."""

from __future__ import annotations

import pytest
import torch

from costs import kernels
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


@pytest.mark.parametrize(
    ("names", "runs"), [(["0", "1", "2", "3", "4"], 1), (["0", None, "2", "3", None], 2), (["3", "1", "2", "0", "4"], 4)]
)
def test_rows_side_by_side_are_added_together(names: list[str | None], runs: int) -> None:
    """A block of rows gives what adding them one by one gives, in one operation a run; a row without a name is left out."""
    cells = [Cell(str(i), sums=("x", "y"), maxima=("m", "n")) for i in range(5)]
    matrix = torch.randn(5, 2, generator=torch.Generator().manual_seed(0)).double()
    block, single = Totals(cells), Totals(cells)
    for _ in range(2):
        block.add_rows(names, sums=matrix, maxima=-matrix)
        for name, row in zip(names, matrix):
            if name is not None:
                single.add(name, sums=row, maxima=-row)
    for mine, theirs in ((block.sums, single.sums), (block.maxima, single.maxima)):
        assert {name: row.tolist() for name, row in mine.items()} == {name: row.tolist() for name, row in theirs.items()}
    assert kernels(lambda: block.add_rows(names, sums=matrix, maxima=-matrix)) == 2 * runs + 1  # and the minus


def test_adding_is_one_operation_a_vector() -> None:
    """Sums are added in place, maxima compared in place: nothing is made anew, whatever was added before."""
    totals = Totals([Cell("a", counts=("n",), sums=("x",), maxima=("m",))])
    totals.add("a", sums=vector(1), maxima=vector(1))
    sums, maxima = vector(2), vector(2)
    assert kernels(lambda: totals.add("a", counts=(1,), sums=sums, maxima=maxima)) == 2


def test_a_row_is_where_a_kernel_adds_itself() -> None:
    """What is written into the views of a cell is what the step holds, and no other cell changes."""
    totals = Totals([Cell("a", sums=("x",)), Cell("b", sums=("y", "z"), maxima=("m",)), Cell("c", sums=("w",), maxima=("k",))])
    sums, maxima = totals.row("b", torch.device("cpu"))
    assert (sums.tolist(), maxima.tolist()) == ([0, 0], [-float("inf")])
    sums.add_(vector(1, 2))
    maxima.fill_(3)
    totals.add("b", sums=vector(1, 1))
    assert {name: row.tolist() for name, row in totals.sums.items()} == {"b": [2, 3]}
    assert {name: row.tolist() for name, row in totals.maxima.items()} == {"b": [3]}
    (vectors,) = totals.vectors.values()
    assert vectors.sums.tolist() == [0, 2, 3, 0]
    assert vectors.maxima.tolist() == [3, -float("inf")]


@pytest.mark.parametrize("shape", [(1,), (3,), (1, 2), ()])
def test_a_vector_of_another_width_is_refused(shape: tuple[int, ...]) -> None:
    """It would spill over into another cell, or be spread over all columns: the error names the cell."""
    totals = Totals([Cell("full", sums=("a", "b"), maxima=("c", "d")), Cell("next", sums=("e",))])
    given = torch.zeros(shape, dtype=torch.float64)
    for kind in ("sums", "maxima"):
        with pytest.raises(ValueError, match="cell full has 2 columns"):
            totals.add("full", **{kind: given})
        with pytest.raises(ValueError, match="cell full has 2 columns"):
            totals.add_rows(["full"], **{kind: given.reshape(1, *shape)})
    assert not totals.sums
    assert not totals.maxima


def test_an_empty_step_makes_no_tensor() -> None:
    """A step that is not sampled has no vectors: they are made when something is added."""
    cells = [Cell("a", sums=("x",))]
    assert kernels(lambda: Totals(cells)) == 0
    assert not Totals(cells).vectors
