"""The step buffer: bounded, named, empty again when the next step begins."""

from __future__ import annotations

import pytest
import torch

from probe.capture.buffer import StepBuffer
from probe.capture.cells import Cell
from probe.capture.microbatch import MicroBatch
from probe.errors import SiteError
from probe.measure.statistics import summarise

pytestmark = pytest.mark.pure  # of torch and probe alone: the same with every transformers


def filled(buffer: StepBuffer, x: torch.Tensor, *, keep: bool = True) -> None:
    sums, maxima = summarise(x)
    buffer.add("encoder", micro_batch=0, output=x, keep=keep, sums=sums, maxima=maxima)


def test_captures_come_in_the_order_of_calls_with_their_statistics() -> None:
    """Each call has its own capture; its statistics are those of its own output."""
    buffer = StepBuffer(budget_bytes=1 << 20, sites=["encoder"])
    buffer.open(1)
    tensors = [torch.randn(3, 4), torch.randn(2, 4)]
    for x in tensors:
        filled(buffer, x)
    assert [capture.call for capture in buffer["encoder"]] == [0, 1]
    for x, capture in zip(tensors, buffer["encoder"]):
        moments = capture.statistics()
        assert moments is not None
        assert moments.mean == pytest.approx(x.double().mean().item(), abs=1e-7)
        assert capture.shape == tuple(x.shape)


def test_what_is_kept_is_as_it_was_seen() -> None:
    """A later in-place operation of the model does not change the kept tensor, which is detached."""
    buffer = StepBuffer(budget_bytes=1 << 20, sites=["encoder"])
    buffer.open(1)
    x = torch.randn(3, 4, requires_grad=True) * 1.0
    expected = x.detach().clone()
    filled(buffer, x)
    x.detach().add_(1)
    kept = buffer["encoder"][0].tensor
    assert kept is not None
    assert torch.equal(kept, expected)
    assert not kept.requires_grad


def test_a_tensor_over_budget_is_left_out_and_named() -> None:
    """The capture stays, its tensor does not; the reason carries the size and the budget."""
    buffer = StepBuffer(budget_bytes=1000, sites=["encoder"])
    buffer.open(1)
    filled(buffer, torch.randn(1000))
    assert buffer["encoder"][0].tensor is None
    assert "budget of 0.000953674 MiB (budget_mib=)" in buffer.totals.reasons["kept:encoder"]
    assert buffer.bytes <= 1000


def test_the_budget_is_never_exceeded_and_can_be_given_back() -> None:
    """reserve refuses what does not fit; release makes room."""
    buffer = StepBuffer(budget_bytes=100)
    buffer.open(1)
    assert buffer.reserve("a", 60)
    assert not buffer.reserve("b", 60)
    buffer.release(60)
    assert buffer.reserve("b", 60)
    assert set(buffer.totals.reasons) == {"b"}


def test_columns_of_the_cells_count_against_the_budget() -> None:
    """What the running sums take is part of the budget: 8 bytes a column."""
    buffer = StepBuffer(budget_bytes=100, cells=[Cell("a", counts=("x",), sums=("y",), maxima=("z",))])
    buffer.open(1)
    assert buffer.bytes == 24


def test_an_unknown_site_is_named_with_its_nearest() -> None:
    """A slip in the name is an error that helps; a known site that did not run is just empty."""
    buffer = StepBuffer(budget_bytes=100, sites=["model.encoder", "model.decoder"])
    assert buffer["model.encoder"] == ()
    with pytest.raises(SiteError, match=r"'model.encodr'; the nearest are 'model.encoder'"):
        buffer["model.encodr"]


def test_clear_lets_go_of_inputs() -> None:
    """After clear neither inputs nor captures are held."""
    buffer = StepBuffer(budget_bytes=1 << 20, sites=["encoder"])
    buffer.open(1)
    buffer.micro_batches.append(MicroBatch(0, {"labels": 1, "text": None}, {"input_ids": 2}))
    filled(buffer, torch.randn(3))
    assert dict(buffer.inputs) == {"labels": 1, "input_ids": 2}
    assert len(buffer) == 1
    buffer.clear()
    assert (dict(buffer.inputs), len(buffer), buffer.bytes, buffer.step) == ({}, 0, 0, None)


def test_small_tensors_for_the_record_are_counted_once() -> None:
    """put counts 8 bytes an element, a replacement of the same size nothing, and refuses what does not fit."""
    buffer = StepBuffer(budget_bytes=100)
    buffer.open(1)
    assert buffer.put("ids", torch.arange(5))
    assert buffer.put("ids", torch.arange(5, 10))
    assert buffer.bytes == 40
    assert not buffer.put("labels", torch.arange(10))
    assert set(buffer.totals.local) == {"ids"}
    assert "budget_mib" in buffer.totals.reasons["labels"]
