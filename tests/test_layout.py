"""The layout: the order of columns is that of the cells, and vectors are cut where the cells say."""

from __future__ import annotations

import random

import numpy as np
import pytest

from probe.capture.cells import Cell
from probe.merge.layout import make_layout

pytestmark = pytest.mark.pure  # of torch and probe alone: the same with every transformers


def _random_cells(generator: random.Random, count: int) -> list[Cell]:
    def columns(prefix: str) -> tuple[str, ...]:
        return tuple(f"{prefix}{i}" for i in range(generator.randrange(4)))

    return [Cell(f"cell:{i}", counts=columns("c"), sums=columns("s"), maxima=columns("m")) for i in range(count)]


@pytest.mark.parametrize("seed", range(5))
def test_values_are_cut_where_each_cell_stands(seed: int) -> None:
    """Every column gets the number that stands at its place, also beside cells that lack a kind of column."""
    cells = _random_cells(random.Random(seed), 12)
    layout = make_layout(cells)
    generator = np.random.default_rng(seed)
    sums, counts, maxima = (generator.normal(size=n) for n in (layout.sums, layout.counts, layout.maxima))
    assert (layout.counts, layout.sums, layout.maxima) == tuple(
        sum(len(getattr(c, k)) for c in cells) for k in ("counts", "sums", "maxima")
    )
    values = layout.values(sums, counts, maxima)
    assert list(values) == [cell.name for cell in cells]
    for kind, vector in (("counts", counts), ("sums", sums), ("maxima", maxima)):
        expected = iter(vector.tolist())
        for cell in cells:
            assert getattr(values[cell.name], kind) == {column: next(expected) for column in getattr(cell, kind)}


def test_a_minimum_is_read_back_with_its_sign() -> None:
    """A column of maxima that holds a negated minimum gives the minimum."""
    layout = make_layout([Cell("a", maxima=("high", "low"))])
    values = layout.values(np.empty(0), np.empty(0), np.array([3.0, 5.0]))["a"]
    assert values.minimum("low") == -5.0


def test_two_cells_of_one_name_are_refused() -> None:
    """Cells that share a name would add up what does not belong together; the error names them."""
    with pytest.raises(ValueError, match="twice: head:a"):
        make_layout([Cell("head:a", sums=("x",)), Cell("b"), Cell("head:a", sums=("y",))])


def test_the_fingerprint_tells_layouts_apart() -> None:
    """Equal cells in equal order have one fingerprint; another name, column, kind of column or order has another."""
    cells = [Cell("a", counts=("n",), sums=("x", "y")), Cell("b", maxima=("z",))]
    others = [
        list(reversed(cells)),
        [cells[0], Cell("c", maxima=("z",))],
        [cells[0], Cell("b", sums=("z",))],
        [cells[0], Cell("b", maxima=("z", "w"))],
        [Cell("a", counts=("n",), sums=("y", "x")), cells[1]],
        cells[:1],
    ]
    same = [Cell("a", counts=("n",), sums=("x", "y")), Cell("b", maxima=("z",))]
    assert make_layout(same).fingerprint() == make_layout(cells).fingerprint()
    prints = [make_layout(c).fingerprint() for c in [cells, *others]]
    assert len(set(prints)) == len(prints)
