"""Trains all variants over seeds and writes the table: ``python -m benchmarks.verdicts``, with ``docs/examples`` on the path."""

from __future__ import annotations

import argparse
import multiprocessing
import tempfile
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

from benchmarks.verdicts.page import page
from benchmarks.verdicts.training import FULL, Outcome, train
from benchmarks.verdicts.variants import VARIANTS

PAGE = Path(__file__).parents[2] / "docs" / "verdicts-table.md"


def main() -> int:
    """Train, write the page, and say where; 1 if a verdict is wrong."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=PAGE, help="where the page is written (default docs/verdicts-table.md)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4], help="which seeds (default 0 to 4)")
    parser.add_argument("--only", nargs="+", choices=[variant.name for variant in VARIANTS], help="which variants (default all)")
    parser.add_argument("--processes", type=int, default=2, help="how many at a time, one thread each (default 2)")
    options = parser.parse_args()
    names = options.only or [variant.name for variant in VARIANTS]
    outcomes = train_all([(name, seed) for seed in options.seeds for name in names], options.processes)
    options.output.write_text(page(outcomes, FULL), encoding="utf-8")
    print(f"wrote {options.output}")
    return 0 if all(outcome.right for outcome in outcomes) else 1


def train_all(runs: list[tuple[str, int]], processes: int) -> list[Outcome]:
    """Train each variant on each seed, some at a time, and return what came of them in the order that was asked for."""
    done: dict[tuple[str, int], Outcome] = {}
    with (
        tempfile.TemporaryDirectory() as folder,
        ProcessPoolExecutor(processes, mp_context=multiprocessing.get_context("spawn")) as pool,
    ):
        asked = {pool.submit(train, name, seed, Path(folder) / f"{name}-{seed}"): (name, seed) for name, seed in runs}
        for future in as_completed(asked):
            outcome = done[asked[future]] = future.result()
            said = outcome.verdict.because if outcome.verdict is not None else outcome.reason
            use = outcome.verdict.use if outcome.verdict is not None else "no verdict"
            print(f"{outcome.variant}, seed {outcome.seed}: {use}{'' if outcome.right else ' (WRONG)'}: {said}", flush=True)
    return [done[run] for run in runs]


if __name__ == "__main__":
    raise SystemExit(main())
