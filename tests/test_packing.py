"""Packing: the columns of a step in one fixed order, to the host in one copy, with no wait on the way."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from costs import kernels
from probe.capture.cells import Cell
from probe.capture.totals import Totals
from probe.merge.layout import make_layout
from probe.merge.packing import Transfer, pack

pytestmark = pytest.mark.pure  # of torch and probe alone: the same with every transformers

CPU = torch.device("cpu")
CELLS = (
    Cell("full", counts=("calls", "elements"), sums=("a", "b", "c"), maxima=("high", "low")),
    Cell("sums only", sums=("d",)),
    Cell("host only", counts=("n",)),
    Cell("maxima only", maxima=("z",)),
    Cell("nothing"),
)
LAYOUT = make_layout(CELLS)


def _filled(seed: int) -> Totals:
    generator = torch.Generator().manual_seed(seed)
    totals = Totals(CELLS)
    for _ in range(2):  # two micro-batches
        totals.add(
            "full", counts=(1, 10), sums=torch.randn(3, generator=generator).double(), maxima=torch.randn(2, generator=generator).double()
        )
    totals.add("sums only", sums=torch.randn(1, generator=generator).double())
    totals.add("host only", counts=(7,))
    totals.add("maxima only", maxima=torch.randn(1, generator=generator).double())
    return totals


def test_columns_stand_in_the_order_of_the_cells() -> None:
    """Sums cell by cell, then the host's counts; maxima apart: the same places whatever order they were measured in."""
    totals, reordered = _filled(0), Totals(CELLS)
    for name, maxima in reversed(totals.maxima.items()):
        reordered.add(name, maxima=maxima)
    for name, sums in reversed(totals.sums.items()):
        reordered.add(name, sums=sums)
    for name, counts in totals.counts.items():
        reordered.add(name, counts=counts)
    for these in (totals, reordered):
        sums, maxima = pack(these, LAYOUT, device=CPU)
        assert sums.tolist() == [*totals.sums["full"].tolist(), *totals.sums["sums only"].tolist(), 2.0, 20.0, 7.0]
        assert maxima.tolist() == [*totals.maxima["full"].tolist(), *totals.maxima["maxima only"].tolist()]
        assert sums.dtype == maxima.dtype == torch.float64


def test_cells_without_values_hold_what_changes_nothing() -> None:
    """An empty cell is as wide as a full one: 0 for what adds up, -inf for what is a maximum."""
    sums, maxima = pack(Totals(CELLS), LAYOUT, device=CPU)
    assert sums.tolist() == [0.0] * 7
    assert maxima.tolist() == [-float("inf")] * 3
    some_sums, some_maxima = pack(_filled(1), LAYOUT, device=CPU)
    assert torch.equal(some_sums + sums, some_sums)
    assert torch.equal(torch.maximum(some_maxima, maxima), some_maxima)


def test_a_layout_without_maxima_or_without_cells_packs() -> None:
    """No column of a kind gives an empty vector, not an error."""
    cells = (Cell("a", counts=("n",)),)
    sums, maxima = pack(Totals(cells), make_layout(cells), device=CPU)
    assert (sums.tolist(), maxima.tolist()) == ([0.0], [])
    sums, maxima = pack(Totals(()), make_layout(()), device=CPU)
    assert (sums.tolist(), maxima.tolist()) == ([], [])
    assert maxima.dtype == sums.dtype == torch.float64


def test_totals_of_other_cells_are_refused() -> None:
    """A vector longer or shorter than the other ranks' would hang them all: it never leaves this rank."""
    with pytest.raises(ValueError, match="other cells than the layout"):
        pack(Totals(CELLS[:-2]), LAYOUT, device=CPU)


def test_packing_leaves_the_totals_alone() -> None:
    """Combining ranks in place changes the packed vectors only: the step's own sums stay readable."""
    totals = _filled(2)
    before = {name: tensor.clone() for name, tensor in (*totals.sums.items(), *(("max " + n, t) for n, t in totals.maxima.items()))}
    for vector in pack(totals, LAYOUT, device=CPU):
        vector.fill_(99.0)
    after = {**totals.sums, **{"max " + n: t for n, t in totals.maxima.items()}}
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_what_was_packed_arrives() -> None:
    """The host gets every column under its name, and this rank's facts and reasons."""
    totals = _filled(3)
    totals.tell("shape", (1, 2))
    totals.omit("heads", "no labels")
    host = Transfer(totals, LAYOUT, *pack(totals, LAYOUT, device=CPU)).result()
    assert host.cells["full"].counts == {"calls": 2.0, "elements": 20.0}
    assert list(host.cells["full"].sums.values()) == totals.sums["full"].tolist()
    assert list(host.cells["full"].maxima.values()) == totals.maxima["full"].tolist()
    assert host.cells["maxima only"].maxima == {"z": totals.maxima["maxima only"].item()}
    assert host.cells["nothing"].sums == {}
    assert host.facts == {"shape": (1, 2)}
    assert host.reasons == {"heads": "no labels"}


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.int32, torch.uint8, torch.bool]
)
def test_small_tensors_come_back_in_their_shape(dtype: torch.dtype) -> None:
    """Tensors of any shape, dtype and stride arrive with equal values, empty and 0-dim ones included."""
    generator = torch.Generator().manual_seed(4)
    totals = Totals(CELLS)
    whole = torch.randint(0, 2 if dtype is torch.bool else 100, (5, 4, 3), generator=generator).to(dtype)
    tensors = {"whole": whole, "transposed": whole.permute(2, 0, 1), "row": whole[0, 0], "one": whole[0, 0, 0], "none": whole[:0]}
    for key, tensor in tensors.items():
        totals.put(key, tensor)
    host = Transfer(totals, LAYOUT, *pack(totals, LAYOUT, device=CPU)).result()
    assert list(host.local) == list(tensors)
    for key, tensor in tensors.items():
        assert host.local[key].shape == tuple(tensor.shape)
        assert np.array_equal(host.local[key], tensor.double().numpy())


def test_token_ids_are_exact() -> None:
    """Ids travel as float64, which holds every whole number up to 2**53."""
    totals = Totals(CELLS)
    totals.put("ids", torch.tensor([2**53, -(2**53), -100]))
    host = Transfer(totals, LAYOUT, *pack(totals, LAYOUT, device=CPU)).result()
    assert host.local["ids"].astype(np.int64).tolist() == [2**53, -(2**53), -100]


class _Seen(TorchDispatchMode):
    """Notes every operation that reaches the dispatcher."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def test_the_number_of_operations_does_not_grow_with_the_cells() -> None:
    """Four hundred cells and forty small tensors leave in as few operations as one of each: ten at most."""
    cells = [Cell(f"cell {i}", counts=("n",), sums=("a", "b"), maxima=("m",)) for i in range(400)]
    assert _operations(cells[:1], small=1) == _operations(cells, small=40) <= 10


def _operations(cells: Sequence[Cell], *, small: int) -> int:
    totals, layout = Totals(cells), make_layout(cells)
    for cell in cells:
        totals.add(cell.name, counts=(1,), sums=torch.ones(2).double(), maxima=torch.ones(1).double())
    for i in range(small):
        totals.put(f"rows {i}", torch.ones(3, 2, dtype=(torch.int64, torch.float32, torch.bool)[i % 3]))
    return kernels(lambda: Transfer(totals, layout, *pack(totals, layout, device=CPU)))


def test_a_second_device_is_added_and_compared() -> None:
    """What lies in the vectors of two devices is combined column by column."""
    totals, other = _filled(6), _filled(7)
    expected = [[*map(float, vector)] for vector in _combined(totals, other)]
    totals.vectors[torch.device("cpu", 0)] = next(iter(other.vectors.values()))
    sums, maxima = pack(totals, LAYOUT, device=CPU)
    assert sums.tolist()[:4] == pytest.approx(expected[0])
    assert maxima.tolist() == pytest.approx(expected[1])


def _combined(one: Totals, other: Totals) -> tuple[torch.Tensor, torch.Tensor]:
    (mine,), (theirs,) = one.vectors.values(), other.vectors.values()
    return mine.sums + theirs.sums, torch.maximum(mine.maxima, theirs.maxima)


def test_nothing_waits_for_the_device() -> None:
    """Packing and sending read no tensor on the host: no ``item``, no ``nonzero``, no comparison of values."""
    totals = _filled(5)
    totals.put("rows", torch.randn(3, 2).requires_grad_())
    with _Seen() as seen:
        transfer = Transfer(totals, LAYOUT, *pack(totals, LAYOUT, device=CPU))
    assert len(seen.names) > 3
    waiting = ("_local_scalar_dense", "nonzero", "is_nonzero", "masked_select", "equal", "unique")
    assert not [name for name in seen.names if any(word in name for word in waiting)]
    transfer.result()


def test_the_mode_sees_a_wait() -> None:
    """The check above would notice one ``item()``."""
    with _Seen() as seen:
        torch.ones(1).item()
    assert any("_local_scalar_dense" in name for name in seen.names)


def test_packing_builds_no_graph() -> None:
    """A kept tensor that still requires a gradient is sent without one."""
    totals = Totals(CELLS)
    leaf = torch.ones(3, dtype=torch.float64, requires_grad=True)
    totals.add("full", sums=leaf * 2)
    totals.local["rows"] = leaf * 3
    sums, maxima = pack(totals, LAYOUT, device=CPU)
    assert not sums.requires_grad
    assert Transfer(totals, LAYOUT, sums, maxima).result().local["rows"].tolist() == [3.0] * 3
