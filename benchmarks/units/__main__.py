"""Measures the unit costs on the device at hand: ``python -m benchmarks.units [--only PART ...] [--quick] [--output FILE] [--add FILE]``.

Writes ``benchmarks/results/units-<date>-<device>.json``: the measured rows by part, and a list of targets.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from dataclasses import asdict
from datetime import date
from pathlib import Path
from typing import Any

import torch

from benchmarks.units.machine import machine, short
from benchmarks.units.plan import PARTS, QUICK_PARTS, Measured

RESULTS = Path(__file__).parents[1] / "results"


def main() -> None:
    """Measure, write, and print the targets."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="+", choices=list(PARTS), default=list(PARTS), help="parts to measure (default: all)")
    parser.add_argument("--quick", action="store_true", help="few rounds of small sizes, to see that it works; the figures mean nothing")
    parser.add_argument("--output", type=Path, default=None, help="the file to write (default: by date and device in benchmarks/results)")
    parser.add_argument("--add", type=Path, default=None, help="a file with other parts of the same machine, to stand beside these")
    options = parser.parse_args()
    added = json.loads(options.add.read_text(encoding="utf-8")) if options.add else None
    if added and (twice := sorted(set(added["rows"]) & set(options.only))):
        parser.error(f"{options.add} holds {', '.join(twice)} already: leave them out of --only")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    output = options.output or RESULTS / f"units-{date.today().isoformat()}-{short(device)}.json"
    with tempfile.TemporaryDirectory(prefix="probe-units-") as folder:
        tempfile.tempdir = folder  # run folders and outputs of all measurements go with it
        try:
            report = measure(device, options.only, quick=options.quick, output=output, added=added)
        finally:
            tempfile.tempdir = None
    for one in report["targets"]:
        verdict = {True: "met", False: "MISSED", None: "not told here"}[one["met"]]
        print(f"{verdict}: {one['target']} ({one['bound']}): {one['measured']}{' -- ' + one['why'] if one['why'] else ''}")
    print(f"wrote {output}")


def measure(device: torch.device, parts: list[str], *, quick: bool, output: Path, added: dict[str, Any] | None = None) -> dict[str, Any]:
    """Run the parts and return what the file holds; a part that fails is named with its error, and the others go on.

    The file is written after each part, so that one that is stopped keeps what it has.
    """
    chosen = QUICK_PARTS if quick else PARTS
    report: dict[str, Any] = {"machine": machine(device), "quick": quick, "rows": {}, "seconds": {}, "failed": {}, "targets": []}
    if added:
        report |= {key: added[key] for key in ("rows", "seconds", "targets")}
        report["failed"] = {name: why for name, why in added["failed"].items() if name not in parts}
    output.parent.mkdir(parents=True, exist_ok=True)
    for name in parts:
        _write(report, output)
        begin, busy = time.perf_counter(), time.process_time()
        try:
            found: Measured = chosen[name](device)
        except Exception as error:
            report["failed"][name] = f"{type(error).__name__}: {error}"
            print(f"{name}: failed: {report['failed'][name]}", flush=True)
            continue
        report["rows"][name] = found.rows
        report["targets"] += [asdict(target) for target in found.targets]
        report["seconds"][name] = round(time.perf_counter() - begin, 1)
        print(f"{name}: {report['seconds'][name]} s, {time.process_time() - busy:.0f} s of them at work on a core", flush=True)
    _write(report, output)
    return report


def _write(report: dict[str, Any], output: Path) -> None:
    output.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
