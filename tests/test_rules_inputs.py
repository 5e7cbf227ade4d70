"""Rules about the rows of a batch."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from judging import DECODER, in_order, judged, record, repeated, seen, with_labels
from probe.records import AudioChecks, BatchChecks, Head, Inputs, InputTensor, Setup

pytestmark = pytest.mark.pure  # of torch and probe alone: the same with every transformers


def text_head(rows: int = 288) -> Head:
    return Head("lm_head", "text", 1, shape=(2, 8, rows))


def ids(outside: int | None, low: float = 0, high: float = 287) -> Inputs:
    return Inputs(1, 2, tensors=(InputTensor("input_ids", (2, 8), "torch.int64", "cpu", low, high),), ids_outside_vocabulary=outside)


def prints(*values: int | None) -> tuple[Any, ...]:
    return in_order(*(record(checks=BatchChecks(4, fingerprint=value)) for value in values))


def copies(*counts: int, rows: int = 8) -> tuple[Any, ...]:
    return in_order(*(record(checks=BatchChecks(rows, duplicated_rows=count)) for count in counts))


def test_ids_out_of_range() -> None:
    """One id without a row is critical; none is fine; ids that nobody counted say nothing."""
    assert seen("ids-out-of-range", record(inputs=ids(1, 0, 288), heads=(text_head(),)), setup=DECODER) == [("critical", "")]
    assert seen("ids-out-of-range", record(inputs=ids(0)), setup=DECODER) == []
    assert seen("ids-out-of-range", record(inputs=ids(None)), setup=DECODER) is None
    assert seen("ids-out-of-range", record()) is None
    (symptom,) = judged("ids-out-of-range", record(inputs=ids(3, 0, 300)), setup=DECODER) or ()
    assert "3 ids" in symptom.message
    assert "288 rows" in symptom.message
    assert symptom.evidence == {"ids_outside_vocabulary": 3.0}


def test_ids_below_zero_alone_are_marks() -> None:
    """Where every id without a row is negative, it is a warning: some models replace such marks."""
    marks = record(inputs=ids(5, -200, 287), heads=(text_head(),))
    assert seen("ids-out-of-range", marks, setup=DECODER) == [("warning", "")]
    assert seen("ids-out-of-range", record(inputs=ids(5, -200, 288), heads=(text_head(),)), setup=DECODER) == [("critical", "")]
    assert seen("ids-out-of-range", record(inputs=ids(5, -200, 287)), setup=DECODER) == [("critical", "")]  # how many rows is not known
    nothing = Inputs(1, 2, tensors=(InputTensor("input_ids", (2, 8), "torch.int64", "cpu"),), ids_outside_vocabulary=5)
    assert seen("ids-out-of-range", record(inputs=nothing, heads=(text_head(),)), setup=DECODER) == [("critical", "")]


def test_whose_rows_are_counted() -> None:
    """Of the text head, and of the ids: an audio head, a head of unknown shape, or another input with negative values do not count."""
    audio, unknown = Head("audio_lm_head", "audio", 1, shape=(9, 4000)), Head("lm_head", "text", 1)
    too_large = ids(5, -200, 300)
    other = replace(too_large, tensors=(InputTensor("position_ids", (2, 8), "torch.int64", "cpu", -1, 7), *too_large.tensors))
    for heads in ((audio, text_head()), (unknown, text_head())):
        assert seen("ids-out-of-range", record(inputs=too_large, heads=heads), setup=DECODER) == [("critical", "")]
        outside = record(**with_labels(outside_vocabulary=2), heads=heads)
        assert seen("ids-out-of-range", outside, setup=DECODER) == [("critical", "")]
    assert seen("ids-out-of-range", record(inputs=other, heads=(text_head(),)), setup=DECODER) == [("critical", "")]
    positive = record(inputs=ids(5, 0, 287), heads=(text_head(),))  # what was shown was of another micro-batch
    assert seen("ids-out-of-range", positive, setup=DECODER) == [("critical", "")]
    unnamed = record(**with_labels(outside_vocabulary=2), heads=(text_head(),))
    assert seen("ids-out-of-range", unnamed, setup=Setup()) == [("critical", "")]
    bare = replace(too_large, tensors=())
    assert seen("ids-out-of-range", record(inputs=bare, heads=(text_head(),)), setup=DECODER) == [("critical", "")]


def test_ids_outside_the_tokenizer() -> None:
    """An id that only the tokenizer lacks is a warning."""
    assert seen("ids-out-of-range", record(checks=BatchChecks(4, ids_outside_tokenizer=1))) == [("warning", "")]
    assert seen("ids-out-of-range", record(checks=BatchChecks(4, ids_outside_tokenizer=0))) == []


def test_labels_outside_the_vocabulary() -> None:
    """A label without a row is critical, unless the head has more rows than the embedding; of several the worst is told."""
    outside = with_labels(outside_vocabulary=2)
    assert seen("ids-out-of-range", record(**outside, heads=(text_head(),)), setup=DECODER) == [("critical", "")]
    assert seen("ids-out-of-range", record(**outside)) == [("critical", "")]
    assert seen("ids-out-of-range", record(**outside, heads=(text_head(400),)), setup=DECODER) is None
    assert seen("ids-out-of-range", record(**with_labels(outside_vocabulary=0)), setup=DECODER) == []
    both = record(inputs=ids(5, -200, 287), heads=(text_head(),), **outside)
    (symptom,) = judged("ids-out-of-range", both, setup=DECODER) or ()
    assert symptom.severity == "critical"
    assert symptom.evidence == {"ids_outside_vocabulary": 5.0, "labels_outside_vocabulary": 2.0}


def test_the_same_batch() -> None:
    """The same fingerprint three times in a row is worth knowing; twice, or with another between, it is chance."""
    assert seen("same-batch-repeated", *prints(7, 7, 7)) == [("info", "")]
    assert seen("same-batch-repeated", *prints(7, 7)) == []
    assert seen("same-batch-repeated", *prints(7, 7, 7, 8)) == []
    assert seen("same-batch-repeated", *prints(7, 8, 7)) == []
    assert seen("same-batch-repeated", *prints(7, 7, None)) is None
    assert seen("same-batch-repeated", record()) is None


def test_copied_rows() -> None:
    """A quarter of the rows, twice in a row; just below, or once, is no finding."""
    assert seen("rows-duplicated", *copies(2, 2)) == [("warning", "")]
    assert seen("rows-duplicated", *copies(2)) == []
    assert seen("rows-duplicated", *copies(2, 1)) == []
    assert seen("rows-duplicated", *copies(1, 2)) == []
    assert seen("rows-duplicated", *copies(249, 249, rows=1000)) == []
    assert seen("rows-duplicated", *copies(0, 0, rows=0)) == []
    assert seen("rows-duplicated", *repeated(2)) is None


def test_rows_that_are_alike_by_their_silence() -> None:
    """Where clips hold one value everywhere, rows are alike because of that; other audio changes nothing."""
    for constant, found in ((1, []), (0, [("warning", "")])):
        checks = BatchChecks(8, duplicated_rows=8, audio=AudioChecks("log-mel", 8, constant=constant))
        assert seen("rows-duplicated", *repeated(2, checks=checks)) == found
