"""What the probe itself took of the time: the overhead of a record."""

from __future__ import annotations

from dataclasses import replace

from probe.capture.meter import Spent
from probe.records import Overhead, StepRecord

METRIC = "probe/overhead/pct"


def with_overhead(record: StepRecord, spent: Spent) -> StepRecord:
    """Return the record with what the probe took since the last one; without it, and the reason, if no time has passed."""
    if spent.wall <= 0.0:
        return replace(record, not_measured={**record.not_measured, METRIC: "no time has passed since the last record"})
    pct = 100.0 * sum(spent.parts.values()) / spent.wall
    parts = dict(sorted(spent.parts.items(), key=lambda part: -part[1]))
    return replace(record, metrics={**record.metrics, METRIC: pct}, overhead=Overhead(pct, spent.wall, parts))
