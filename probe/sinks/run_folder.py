"""The run folder on disk: ``run.json``, records and findings line by line, kept tensors; append-only, safe to read while training runs.

No file stays open between writes, so that whoever holds the sink can still be copied and pickled.
"""

from __future__ import annotations

import json
import math
import numbers
import os
import platform
from collections.abc import Collection, Mapping, Sequence
from dataclasses import fields, is_dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from probe.errors import ProbeError, RunFolderError
from probe.records import Finding, StepRecord
from probe.records_json import SCHEMA_MAJOR, SCHEMA_MINOR, to_json

_PACKAGES = {"torch": "torch", "transformers": "transformers", "probe": "trainer-probe"}
_LONGEST_REPR = 200


class RunFolder:
    """Writes one run. The folder and ``run.json`` are made at the first write, and again when they have gone.

    Args:
        path: The folder, ``<output_dir>/_probe`` as a rule.
        facts: What is known about the run (settings, sites, reasons): dataclasses, mappings, sequences and plain values; of anything
            else its ``repr`` is written.
        rank: Number of this process; rank 0 writes ``run.json``.
    """

    def __init__(self, path: str | os.PathLike[str], *, facts: Mapping[str, Any], rank: int = 0) -> None:
        self.path = Path(path)
        self._facts = dict(facts)
        self._rank = rank
        self._run_written = False

    @property
    def records(self) -> Path:
        """The file of records of this rank."""
        return self.path / f"records-rank{self._rank:05d}.jsonl"

    def write(self, record: StepRecord) -> None:
        """Append a record as one line.

        Raises:
            RunFolderError: if it cannot be written (no permission, disk full), or holds something that is no plain data.
        """
        try:
            line = to_json(record)
            self._prepare()
            _append(self.records, line)
        except (OSError, ProbeError) as error:
            raise RunFolderError(f"cannot write the record of step {record.step} to {self.records}: {error}") from error

    def write_findings(self, events: Sequence[Finding]) -> None:
        """Append events of findings to ``findings.jsonl``, one a line. Written before the record of their step.

        Raises:
            RunFolderError: as :meth:`write`.
        """
        path = self.path / "findings.jsonl"
        try:
            lines = [to_json(event) for event in events]
            if lines:
                self._prepare()
                _append(path, "\n".join(lines))
        except (OSError, ProbeError) as error:
            raise RunFolderError(f"cannot write the findings of step {events[0].step} to {path}: {error}") from error

    def write_kept(self, step: int, tensors: Mapping[str, Tensor]) -> None:
        """Write tensors to ``kept/step-<step>.safetensors``, replacing an earlier file of the step.

        Copies each tensor to the host: waits for the device, and holds one more copy of all of them until written.

        Raises:
            RunFolderError: if they cannot be written, or have a type that safetensors does not know.
        """
        path = self.path / "kept" / f"step-{step:08d}.safetensors"
        try:
            # A copy of its own for each: safetensors refuses tensors that share memory, and views that are not contiguous.
            copies = {name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()}
            self._prepare()
            path.parent.mkdir(exist_ok=True)
            temporary = path.with_name(f"{path.name}.tmp-{os.getpid()}")
            try:
                save_file(copies, temporary, metadata={"step": str(step)})
                temporary.replace(path)
            finally:
                temporary.unlink(missing_ok=True)
        except (OSError, ProbeError, SafetensorError, RuntimeError, ValueError, TypeError, KeyError) as error:
            raise RunFolderError(f"cannot write the kept tensors of step {step} to {path}: {error}") from error

    def _prepare(self) -> None:
        self.path.mkdir(parents=True, exist_ok=True)
        run = self.path / "run.json"
        if self._rank == 0 and not (self._run_written and run.exists()):
            about = {
                **{str(name): _plain(value) for name, value in self._facts.items()},
                "schema": {"major": SCHEMA_MAJOR, "minor": SCHEMA_MINOR},
                "versions": {"python": platform.python_version(), **{name: _version(package) for name, package in _PACKAGES.items()}},
            }
            _replace(run, json.dumps(about, ensure_ascii=True, allow_nan=False, indent=2) + "\n")
            self._run_written = True


def _append(path: Path, line: str) -> None:
    """Append a line, or several, in one write. What a killed process left without its newline is ended first: only that line is lost."""
    with path.open("ab+", buffering=0) as file:
        size = file.seek(0, os.SEEK_END)
        cut_off = False
        if size:
            file.seek(size - 1)
            cut_off = file.read(1) != b"\n"
        data = (b"\n" if cut_off else b"") + line.encode("ascii") + b"\n"
        written = file.write(data)
        if written != len(data):
            raise OSError(f"only {written} of {len(data)} bytes were written")


def _replace(path: Path, text: str) -> None:
    """Write a file so that a reader sees the old one or the new one, never half of it."""
    temporary = path.with_name(f"{path.name}.tmp-{os.getpid()}")
    try:
        temporary.write_text(text, encoding="ascii")
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed as a package"


def _plain(value: Any) -> Any:
    """Return a fact as plain JSON data; numbers that are not finite become ``null``."""
    if value is None or isinstance(value, (bool, str)):
        return value
    if isinstance(value, numbers.Integral):
        return int(value)
    if isinstance(value, numbers.Real):
        return float(value) if math.isfinite(value) else None
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if is_dataclass(value) and not isinstance(value, type):
        return {field.name: _plain(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, Mapping):
        return {str(name): _plain(part) for name, part in value.items()}
    if isinstance(value, (set, frozenset)):
        return sorted((_plain(part) for part in value), key=repr)
    if isinstance(value, Collection) and isinstance(value, (list, tuple)):
        return [_plain(part) for part in value]
    text = repr(value)
    return text if len(text) <= _LONGEST_REPR else f"{text[:_LONGEST_REPR]}..."
