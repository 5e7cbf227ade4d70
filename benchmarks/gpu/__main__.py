"""Checks sampled steps on a CUDA device: ``python -m benchmarks.gpu [--output FILE]``; without one it says so and ends.

Writes ``benchmarks/results/gpu-<date>-<device>.json`` with a list of targets. ``tests`` has to be on the path, as by ``make bench-gpu``.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from datetime import date
from pathlib import Path

import torch

from benchmarks.gpu.collect import JUDGED, strict, trace, warned
from benchmarks.gpu.verdicts import judge
from benchmarks.units.machine import machine, short
from benchmarks.units.statistics import bandwidths, target
from benchmarks.units.targets import Target
from benchmarks.units.workloads import Workload, whisper

RESULTS = Path(__file__).parents[1] / "results"


def main() -> None:
    """Check, write, and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=None, help="the file to write (default: by date and device in benchmarks/results)")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("no CUDA device")
        return
    device = torch.device("cuda")
    targets = check(whisper("small", clips=8), device)
    output = options.output or RESULTS / f"gpu-{date.today().isoformat()}-{short(device)}.json"
    output.parent.mkdir(parents=True, exist_ok=True)
    report = {"machine": machine(device), "targets": [asdict(one) for one in targets]}
    output.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    for one in targets:
        print(one)
    print(f"wrote {output}")


def check(workload: Workload, device: torch.device) -> list[Target]:
    """Make every check on a device."""
    judged = judge(trace(workload, device, observe=False), trace(workload, device, observe=True))
    return [*judged, warnings_target(workload, device), strict_target(workload, device), target(bandwidths(device), device)]


def warnings_target(workload: Workload, device: torch.device) -> Target:
    """Compare the synchronising calls that torch warns of, in the judged step and over all steps."""
    before, after = (warned(workload, device, observe=observe) for observe in (False, True))
    said = f"{after[JUDGED]} in a sampled step, {before[JUDGED]} without the probe; {after.total()} and {before.total()} over all steps"
    met = before == after
    why = "" if met else "steps that differ: " + ", ".join(str(step) for step in sorted(after) if after[step] != before[step])
    return Target('synchronising calls under set_sync_debug_mode("warn")', "as many as without the probe", said, met, why)


def strict_target(workload: Workload, device: torch.device) -> Target:
    """Train with synchronising calls forbidden; where the plain training cannot, nothing is told of the probe."""
    name = 'synchronising calls under set_sync_debug_mode("error"), logging_nan_inf_filter=False'
    plain = strict(workload, device, observe=False)
    if plain:
        return Target(name, "none", "not told", None, f"the training synchronises without the probe, too: {plain}")
    observed = strict(workload, device, observe=True)
    return Target(name, "none", observed or "none", not observed, observed)


if __name__ == "__main__":
    main()
