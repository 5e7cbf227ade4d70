"""Numbers of the newest records in a row: what a rule asks for when one step alone could mislead."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from probe.findings.rule import History
from probe.records import StepRecord

T = TypeVar("T")


def newest(history: History, count: int, read: Callable[[StepRecord], T | None]) -> tuple[T, ...] | None:
    """Return what ``read`` finds in the newest ``count`` records that have it, oldest first.

    Records without it (a text-only step between steps with audio, say) are passed over.

    Returns:
        ``None`` if the last record does not have it: then nothing new can be said. Empty if fewer than ``count`` have it.
    """
    if read(history.last) is None:
        return None
    found = [value for record in history.records if (value := read(record)) is not None]
    return tuple(found[-count:]) if len(found) >= count else ()


def spanning(history: History, *, steps: int, records: int) -> tuple[StepRecord, ...]:
    """Return the newest records, as few as span at least ``steps`` optimizer steps and are at least ``records``; empty if none do."""
    for first in range(len(history.records) - records, -1, -1):
        if history.last.step - history.records[first].step >= steps:
            return history.records[first:]
    return ()
