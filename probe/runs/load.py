"""Read a run folder back, also one that is still being written or was cut off; needs NumPy and nothing of the model side."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from probe.errors import ProbeValueError, RunFolderError
from probe.metrics import nearest
from probe.records import Finding, StepRecord
from probe.records_json import SCHEMA_MAJOR, parse

FOLDER = "_probe"
_RUN = "run.json"
_RECORDS = "records-rank00000.jsonl"
_FINDINGS = "findings.jsonl"

R = TypeVar("R")


@dataclass(frozen=True, slots=True)
class Run:
    """A run, as it was when it was loaded.

    Attributes:
        path: The run folder.
        records: One record a sampled step, by step; where a resume repeated a step, the later line.
        findings: What findings.jsonl says in order, the whole history of findings: each opened, changed and closed. What belongs to a
            training that was given up is left out, as with records. A finding may open again without having closed: each ``train()``
            begins with none. What is open at the end is ``records[-1].findings``. Empty without that file.
        facts: What ``run.json`` says: schema, versions, settings, sites, reasons. Empty without that file.
        truncated: Whether a file ended in a cut-off line, which was left out.
        broken_lines: How many other lines could not be read and were left out.
    """

    path: Path
    records: tuple[StepRecord, ...]
    findings: tuple[Finding, ...]
    facts: Mapping[str, Any]
    truncated: bool
    broken_lines: int

    def series(self, name: str) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        """Return the steps and the values of a metric, over the records that have it.

        Raises:
            ProbeValueError: if no record has it; the message names the nearest metrics that are there.
        """
        points = [(record.step, record.metrics[name]) for record in self.records if name in record.metrics]
        if not points:
            known = sorted({metric for record in self.records for metric in record.metrics})
            reason = next((f": {record.not_measured[name]}" for record in reversed(self.records) if name in record.not_measured), "")
            raise ProbeValueError(f"no record of {self.path} has the metric {name!r}{reason}{nearest(name, known)}")
        return np.array([step for step, _ in points], dtype=np.int64), np.array([value for _, value in points], dtype=np.float64)


def load(run_folder: str | os.PathLike[str]) -> Run:
    """Read a run.

    Args:
        run_folder: The run folder, the ``output_dir`` that holds it as ``_probe``, or the path of its ``run.json``.

    Raises:
        RunFolderError: if there is no run folder, it cannot be read, or it was written with a newer major schema.
    """
    path = _find(Path(run_folder))
    facts = _facts(path / _RUN)
    records, records_cut, records_broken = _lines(path / _RECORDS, StepRecord)
    findings, findings_cut, findings_broken = _lines(path / _FINDINGS, Finding)
    return Run(
        path=path,
        records=_newest_branch(records),
        findings=_standing(findings, records),
        facts=facts,
        truncated=records_cut or findings_cut,
        broken_lines=records_broken + findings_broken,
    )


def _newest_branch(records: list[StepRecord]) -> tuple[StepRecord, ...]:
    """Return the records that lead to the last one, in order of steps.

    A training that was resumed from a checkpoint, or begun anew in the same folder, goes on from an earlier step than the file has
    reached: what was written of that step and of later ones belongs to a training that was given up.
    """
    branch: list[StepRecord] = []
    for record in records:
        while branch and branch[-1].step >= record.step:
            branch.pop()
        branch.append(record)
    return tuple(branch)


def _standing(findings: list[Finding], records: list[StepRecord]) -> tuple[Finding, ...]:
    """Return the events after which no training went back to their step or to an earlier one."""

    def given_up(finding: Finding) -> bool:
        return bool(finding.time) and any(record.step <= finding.step and record.time > finding.time for record in records)

    return tuple(finding for finding in findings if not given_up(finding))


def _find(path: Path) -> Path:
    """Return the run folder that ``path`` means."""
    if path.is_file():
        path = path.parent
    for candidate in (path, path / FOLDER):
        if (candidate / _RUN).is_file() or (candidate / _RECORDS).is_file():
            return candidate
    where = "" if path.exists() else f" ({path} does not exist)"
    raise RunFolderError(f"no run folder at {path}: looked for {_RUN} or {_RECORDS} in it and in {path / FOLDER}{where}")


def _facts(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        facts = json.loads(_read(path))
    except ValueError as error:
        raise RunFolderError(f"{path} is not JSON ({error}); without that file the records can still be read") from error
    if not isinstance(facts, dict):
        raise RunFolderError(f"{path} is not the run.json of a run folder: it holds a {type(facts).__name__}")
    schema = facts.get("schema")
    major = schema.get("major") if isinstance(schema, dict) else None
    if isinstance(major, int) and major > SCHEMA_MAJOR:
        versions = facts.get("versions")
        writer = versions.get("probe", "unknown") if isinstance(versions, dict) else "unknown"
        raise RunFolderError(
            f"{path} was written with schema {major} (trainer-probe {writer}); this version reads up to schema {SCHEMA_MAJOR}: "
            "install a newer trainer-probe to read it"
        )
    return facts


def _read(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8", errors="replace")
    except OSError as error:
        raise RunFolderError(f"cannot read {path}: {error}") from error


def _lines(path: Path, kind: type[R]) -> tuple[list[R], bool, int]:
    """Return the readable lines of a file, whether its last line is cut off, and how many others are broken."""
    if not path.is_file():
        return [], False, 0
    *whole, last = _read(path).split("\n")
    rows: list[R] = []
    broken = 0
    for line in whole:
        try:
            rows += [parse(line, kind)] if line.strip() else []
        except ProbeValueError:
            broken += 1
    if not last.strip():
        return rows, False, broken
    try:
        return [*rows, parse(last, kind)], False, broken
    except ProbeValueError:
        return rows, True, broken
