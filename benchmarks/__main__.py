"""Runs the benchmarks and writes their tables: ``python -m benchmarks [--pairs N] [--output FILE]``."""

from __future__ import annotations

import argparse
import platform
from datetime import date
from pathlib import Path

import torch
import transformers

import probe
from benchmarks.overhead import Row, measure

RESULTS = Path(__file__).parent / "results" / "overhead.md"
METHOD = """\
Plain, idle and sampled steps of copies of one model, one after the other on the same batch, in changing order, {pairs} times; ratios are
medians over the triples, with the interval that holds 95 % of bootstrapped medians. A sampled step includes making and writing its record;
at the default cadence of 100 its cost is spread over 100 steps."""


def table(rows: list[Row], *, pairs: int, threads: int) -> str:
    """Return the results as a Markdown page, with the machine and the versions they hold for."""
    versions = (
        f"Python {platform.python_version()} · torch {torch.__version__} · transformers {transformers.__version__} · "
        f"probe {probe.__version__}"
    )
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU ({platform.machine()}, {threads} threads)"
    lines = [
        "# What a step costs with the probe",
        "",
        f"{date.today().isoformat()} · {device} · {versions}",
        "",
        METHOD.format(pairs=pairs),
        "",
        "| model | batch | plain step, ms | idle ÷ plain | sampled ÷ plain |",
        "|---|---|---|---|---|",
    ]
    lines += [f"| {row.model} | {row.batch} | {row.plain_ms:.1f} | {row.idle.text()} | {row.sampled.text()} |" for row in rows]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure, print the table, and write it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=40, help="how often each kind of step is measured (default 40)")
    parser.add_argument("--output", type=Path, default=RESULTS, help=f"where the table is written (default {RESULTS})")
    options = parser.parse_args()
    page = table(measure(options.pairs), pairs=options.pairs, threads=torch.get_num_threads())
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(page, encoding="utf-8")
    print(page)


if __name__ == "__main__":
    main()
