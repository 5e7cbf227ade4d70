"""Numbers of the newest records in a row: what a rule asks for when one step alone could mislead."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Protocol, TypeVar

from probe.findings.rule import History
from probe.records import StepRecord

T = TypeVar("T")


class _OfSite(Protocol):
    @property
    def site(self) -> str:
        """The site that the row is of."""


Row = TypeVar("Row", bound=_OfSite)


def newest(history: History, count: int, read: Callable[[StepRecord], T | None]) -> tuple[T, ...] | None:
    """Return what ``read`` finds in the newest ``count`` records that have it, oldest first.

    Records without it (a text-only step between steps with audio, say) are passed over.

    Returns:
        ``None`` if the last record does not have it: then nothing new can be said. Empty if fewer than ``count`` have it.
    """
    if read(history.last) is None:
        return None
    found: list[T] = []
    for record in reversed(history.records):
        if (value := read(record)) is not None:
            found.append(value)
        if len(found) == count:
            return tuple(reversed(found))
    return ()


def newest_rows(history: History, count: int, rows: Callable[[StepRecord], Iterable[Row]]) -> dict[str, tuple[Row, ...]]:
    """Return, for each site of which the last record has a row, its rows of the newest ``count`` records that have one, oldest first.

    As :func:`newest` for each of these sites, in one pass over the records. The sites are in the last record's order.

    Returns:
        An empty tuple for a site of which fewer than ``count`` records have a row.
    """
    found: dict[str, list[Row]] = {row.site: [] for row in rows(history.last)}
    open_sites = set(found)
    for record in reversed(history.records):
        if not open_sites:
            break
        for site, row in {row.site: row for row in rows(record) if row.site in open_sites}.items():
            found[site].append(row)
            if len(found[site]) == count:
                open_sites.remove(site)
    return {site: () if site in open_sites else tuple(reversed(kept)) for site, kept in found.items()}


def spanning(history: History, *, steps: int, records: int) -> tuple[StepRecord, ...]:
    """Return the newest records, as few as span at least ``steps`` optimizer steps and are at least ``records``; empty if none do."""
    for first in range(len(history.records) - records, -1, -1):
        if history.last.step - history.records[first].step >= steps:
            return history.records[first:]
    return ()
