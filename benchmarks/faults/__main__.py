"""Runs faults and healthy runs and writes docs/faults.md: ``python -m benchmarks.faults``, with ``tests`` on the path."""

from __future__ import annotations

import argparse
import fnmatch
import os
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks.faults.fault import Fault
from benchmarks.faults.page import page, totals_line
from benchmarks.faults.running import SUBJECTS, run_all
from benchmarks.faults.scoring import Score, score, summary
from benchmarks.faults.split import part_of
from benchmarks.faults.subset import QUICK

PAGE = Path(__file__).parents[2] / "docs" / "faults.md"
REMARKS = Path(__file__).with_name("remarks.md")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run what was asked for, say what came out, and write the page if everything was run."""
    options = _options(arguments)
    names = chosen(options.only, options.part, quick=options.quick)
    if not names:
        raise SystemExit(f"no fault and no healthy run is called {options.only!r} in that part")
    start = time.perf_counter()
    scores: list[Score] = []
    for outcome in run_all(names, processes=options.processes, bases=options.bases):
        scores.append(score(outcome))
        print(_line(scores[-1]), flush=True)
    for part in dict.fromkeys(one.part for one in scores):
        print(totals_line(part, summary(one for one in scores if one.part == part)))
    if options.output or len(names) == len(SUBJECTS):
        target = options.output or PAGE
        target.write_text(page(scores, remarks=REMARKS.read_text(encoding="utf-8"), seconds=time.perf_counter() - start), encoding="utf-8")
        print(f"wrote {target}")


def chosen(only: str, part: str, *, quick: bool = False) -> list[str]:
    """Return the names of the runs of a part that fit a pattern, the long ones first so that no process waits for one at the end."""
    names = [name for name in SUBJECTS if fnmatch.fnmatch(name, only) and part in ("all", _part(name)) and (not quick or name in QUICK)]
    return sorted(names, key=lambda name: ("long" not in name, "another-sample" not in name, "dropped" not in name))


def _part(name: str) -> str:
    subject = SUBJECTS[name]
    if isinstance(subject, Fault):
        return part_of("faults", subject.kind.area, subject.kind.name)
    return part_of("healthy", subject.area, subject.kind)


def _line(one: Score) -> str:
    said = f"found after {one.found_at}" if one.found_at is not None else "missed" if isinstance(one.subject, Fault) else "healthy"
    codes = f"right: {', '.join(sorted(one.right)) or '-'}; not right: {', '.join(sorted(one.wrong)) or '-'}"
    problems = "".join(f"\n    {problem}" for problem in (one.outcome.error, *one.outcome.switched_off) if problem)
    return f"{one.outcome.name}: {said} ({codes}; {one.outcome.seconds:.1f} s){problems}"


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.faults", description=__doc__)
    parser.add_argument("--only", default="*", metavar="NAME", help="a name such as whisper/no-backward, or a pattern such as '*/plain'")
    parser.add_argument("--part", default="all", choices=("development", "test", "all"))
    parser.add_argument("--quick", action="store_true", help="the few that continuous integration runs")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--bases", type=Path, help="a folder that keeps the weights to begin with from one call to the next")
    parser.add_argument("--output", type=Path, help="write the page here; by default to docs/faults.md, and only if everything was run")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
