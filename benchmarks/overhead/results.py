"""What a run of the benchmark found, as records and as JSON."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.overhead.ratios import Ratio


@dataclass(frozen=True)
class Row:
    """One contender on one model; counts and memory are those beyond the plain step's.

    ``error`` says why there are no figures; ``ratio`` is ``None`` then.
    """

    name: str
    title: str
    gives: str
    ratio: Ratio | None = None
    step_ms: float = 0.0
    kernels: int = 0
    views: int = 0
    syncs: int = 0
    peak_mib: float = 0.0
    error: str = ""


@dataclass(frozen=True)
class ModelResult:
    """One model: its plain step, and every contender's row.

    ``sites`` is the number of modules that the probe observes. ``own_pct`` is what ``probe/overhead/pct`` said of ``own_records`` steps
    that were sampled one after the other in the same run; ``None`` where the records do not have it. ``probe`` is the revision that was
    measured: not that of the whole run where the model was measured before and kept.
    """

    name: str
    title: str
    batch: str
    parameters: int
    precision: str
    sites: int
    plain_ms: float
    kernels: int
    views: int
    syncs: int
    peak_mib: float
    rows: list[Row]
    own_pct: float | None = None
    own_records: int = 0
    small: bool = False
    probe: str = ""

    def row(self, name: str) -> Row | None:
        """Return a contender's row if it has figures."""
        return next((row for row in self.rows if row.name == name and row.ratio is not None), None)


@dataclass(frozen=True)
class Results:
    """A whole run, with the machine and the versions it holds for; ``failed`` says why a model has no figures."""

    date: str
    device: str
    machine: str
    versions: dict[str, str]
    minutes: float
    load: float
    models: list[ModelResult] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)


def write(results: Results, path: Path) -> None:
    """Write the results."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(asdict(results), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def read(path: Path) -> Results:
    """Read results that :func:`write` wrote."""
    data = json.loads(path.read_text(encoding="utf-8"))
    return Results(**{**data, "models": [_model(model) for model in data["models"]]})


def _model(data: dict[str, Any]) -> ModelResult:
    return ModelResult(**{**data, "rows": [_row(row) for row in data["rows"]]})


def _row(data: dict[str, Any]) -> Row:
    ratio = data["ratio"]
    return Row(**{**data, "ratio": None if ratio is None else Ratio(**ratio)})
