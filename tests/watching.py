"""Runs a case under observation and hands back what was observed; fails if any part of the probe switched itself off."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from torch import nn

import probe
from models.case import Case
from models.running import RunResult, run
from probe.records import StepRecord


def attacher(**options: Any) -> Callable[[nn.Module], probe.Probe]:
    """Return a function that attaches a probe that prints nothing; ``rows`` is for ``Settings.attention_rows``."""
    rows = options.pop("rows", 64)
    settings = probe.Settings(terminal=False, attention_rows=rows)
    return lambda model: probe.attach(model, settings=settings, **options)


def observed_run(case: Case, *, options: dict[str, Any] | None = None, **arguments: Any) -> tuple[RunResult, tuple[StepRecord, ...]]:
    """Train a case with a probe, detach it, and return the run and the records of its run folder.

    Args:
        case: What to train.
        options: For ``probe.attach``; ``every`` is 1 unless given.
        **arguments: For ``models.running.run``.
    """
    result = run(case, attach=attacher(**{"every": 1, **(options or {})}), **arguments)
    result.attached.detach()
    records = records_of(result)
    assert_nothing_failed(records)
    return result, records


def records_of(result: RunResult) -> tuple[StepRecord, ...]:
    """Return the records in a run's folder."""
    return probe.load(Path(result.trainer.args.output_dir) / "_probe").records


def assert_nothing_failed(records: Iterable[StepRecord]) -> None:
    """Fail if there is no record, or one in which a part of the probe was switched off, or that saw no forward."""
    records = list(records)
    assert records
    for record in records:
        broken = {what: why for what, why in record.not_measured.items() if "switched off" in why}
        assert not broken, f"step {record.step}: {broken}"
        assert record.inputs is not None
        assert record.inputs.micro_batches > 0, f"step {record.step}: no training forward was seen"
