"""Numbers of the newest records in a row, one value a record or a row a site, and what judging costs as a model grows."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from judging import DECODER, in_order, record
from probe.findings.rule import WINDOW, History
from probe.findings.rules import RULES
from probe.findings.rules.streaks import newest, newest_rows
from probe.records import Attention, HeadwiseAttention, Part, SiteStatistics, StepRecord
from records_factory import speech_record

pytestmark = pytest.mark.pure  # of torch and probe alone: the same with every transformers


def history(*records: StepRecord) -> History:
    return History(None, tuple(in_order(*records)))


def sites(**rms: float) -> StepRecord:
    return record(statistics=tuple(SiteStatistics(name, "attention", 1, rms=value) for name, value in rms.items()))


def rms(record: StepRecord) -> float | None:
    return next((row.rms for row in record.statistics), None)


def test_records_without_the_number_are_passed_over() -> None:
    """The newest records that have it, oldest first; nothing of too few; ``None`` where the last record has none."""
    steps = history(sites(a=1.0), sites(a=2.0), record(), sites(a=3.0))
    assert newest(steps, 2, rms) == (2.0, 3.0)
    assert newest(steps, 3, rms) == (1.0, 2.0, 3.0)
    assert newest(steps, 4, rms) == ()
    assert newest(history(sites(a=1.0), record()), 1, rms) is None


def test_each_site_has_rows_of_its_own() -> None:
    """Every site of the last record has its newest rows, whichever records they are in; sites that the last record lacks have none."""
    steps = history(sites(a=1.0, b=5.0), sites(a=2.0, gone=9.0), sites(b=6.0), sites(b=7.0, a=3.0, new=8.0))
    found = newest_rows(steps, 2, lambda record: record.statistics)
    assert {site: [row.rms for row in rows] for site, rows in found.items()} == {"b": [6.0, 7.0], "a": [2.0, 3.0], "new": []}
    assert list(found) == ["b", "a", "new"]


def test_no_more_records_are_read_than_are_asked_for() -> None:
    """Of the last record, and of the newest ones until every site has its rows; all of them while one lacks some."""
    read: list[int] = []

    def rows(record: StepRecord) -> tuple[SiteStatistics, ...]:
        read.append(record.step)
        return record.statistics

    newest_rows(history(*[sites(a=1.0, b=1.0)] * 9), 3, rows)
    assert len(read) == 1 + 3
    read.clear()
    newest_rows(history(*[sites(a=1.0)] * 8, sites(a=1.0, b=1.0)), 3, rows)
    assert len(read) == 1 + 9


def lines(call: Callable[[], Any]) -> int:
    """Return how many lines of Python ``call`` ran, each turn of a loop counted."""
    count = 0

    def trace(frame: Any, event: str, arg: Any) -> Any:
        nonlocal count
        count += event == "line"
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        call()
    finally:
        sys.settrace(before)
    return count


def deep(layers: int) -> StepRecord:
    """Return a healthy record of a model with so many layers: attention, both branches, gradients."""
    heads = HeadwiseAttention((0.5, 0.6), first_token=(0.1, 0.2))
    names = [f"model.layers.{number}" for number in range(layers)]
    attention = [Attention(f"{name}.self_attn", "joint", "", 1, heads=2, keys=64, padding=0.0, per_head=heads) for name in names]
    outputs = [SiteStatistics(f"{name}.self_attn", "attention", 1, elements=9, rms=1.0) for name in names]
    branches = [SiteStatistics(f"{name}.{which}", "feed_forward", 1, elements=9, rms=1.0) for name in names for which in ("text", "audio")]
    gradients = [Part(name, 9, 1.0, without_gradient=0, gradient_norm=1.0, tensors=2) for name in names]
    return replace(speech_record(), attention=tuple(attention), statistics=(*outputs, *branches), layers=tuple(gradients))


def test_judging_grows_with_the_sites_and_not_with_their_square() -> None:
    """Four times the layers take all rules at most 4.4 times as many lines of Python, with as many records as they ever see."""

    def judged(layers: int) -> int:
        steps = History(DECODER, tuple(in_order(*[deep(layers)] * WINDOW)))
        return lines(lambda: [rule.check(steps) for rule in RULES])

    few, many = judged(20), judged(80)
    assert few > 1000
    assert many <= 4.4 * few
