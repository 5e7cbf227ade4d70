"""Measures what the probe costs and writes results, page and plot: ``python -m benchmarks.overhead [--pairs N] [--minutes M] ...``."""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from datetime import date
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
import transformers

from benchmarks.machine import machine, revision
from benchmarks.overhead.contenders import Contender, contenders
from benchmarks.overhead.measuring import Budget, measure
from benchmarks.overhead.page import Beside, page
from benchmarks.overhead.results import ModelResult, Results, read, write
from benchmarks.overhead.subjects import SUBJECTS, Subject
from benchmarks.units.targets import Target

RESULTS = Path(__file__).parents[1] / "results"
DOCS = Path(__file__).parents[2] / "docs"
_RESERVED_GIB = 6
_OPTIONAL = ("wandb", "nnsight", "torchlens")


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure what was asked for, and write it."""
    options = _options(arguments)
    found = options.results or RESULTS / f"overhead-{date.today().isoformat()}-{_device()}.json"
    if not options.page_only:
        transformers.logging.set_verbosity_error()
        for results in run(options):
            write(results, found)  # after each group, so that what is measured is not lost with what is not
        print(f"wrote {found}")
    publish([read(path) for path in latest(found)], options.docs)


def run(options: argparse.Namespace) -> Iterator[Results]:
    """Measure the chosen contenders on the chosen models, and yield the results so far after each group of contenders."""
    subjects = [subject for subject in SUBJECTS if subject.name in options.models]
    begin, device = time.monotonic(), _device()
    results = Results(date.today().isoformat(), device, machine(device), versions(), 0.0, os.getloadavg()[0])
    if options.add is not None:
        results = _others(read(options.add), results, subjects)
    earlier = results.minutes
    for subject in subjects:
        gc.collect()  # what the model before it left, else less memory is counted as free
        budget = Budget(
            pairs=(_at_most(options.pairs, subject.pairs[0]), _at_most(options.pairs, subject.pairs[1])),
            seconds=60 * options.minutes * subject.share / sum(each.share for each in subjects),
            memory=(options.memory or _memory_gib(device)) * 2**30,
        )
        try:
            others = results.models
            for measured in measure(subject, chosen(options.contenders, subject), budget, device=device, say=partial(_say, begin)):
                measured = replace(measured, probe=results.versions["probe"])
                results = replace(results, models=_in_order([*others, measured]), minutes=earlier + _minutes(begin))
                yield results
        except Exception as error:
            _say(begin, f"{subject.title}: {type(error).__name__}: {error}")
            results = replace(results, failed={**results.failed, subject.title: f"{type(error).__name__}: {error}"})
            yield replace(results, minutes=earlier + _minutes(begin))


def _at_most(asked: int | None, own: int) -> int:
    return own if asked is None else min(asked, own)


def _others(added: Results, results: Results, subjects: Sequence[Subject]) -> Results:
    """Return results that begin with what was measured before of models that are not measured now."""
    names, titles = ({getattr(subject, what) for subject in subjects} for what in ("name", "title"))
    models = [model for model in added.models if model.name not in names]
    failed = {title: why for title, why in added.failed.items() if title not in titles}
    return replace(results, models=models, failed=failed, minutes=added.minutes)


def _in_order(models: Sequence[ModelResult]) -> list[ModelResult]:
    """Return models in the order of the subjects; what is none of them comes last."""
    names = [subject.name for subject in SUBJECTS]
    return sorted(models, key=lambda model: names.index(model.name) if model.name in names else len(names))


def _say(begin: float, line: str) -> None:
    print(f"{_minutes(begin):5.1f} min  {line}", flush=True)


def _minutes(begin: float) -> float:
    return (time.monotonic() - begin) / 60


def chosen(names: Sequence[str], subject: Subject) -> list[Contender]:
    """Return the contenders asked for (all if none are named).

    Those that need hundreds of pairs are left out beside long steps, and counterfactual passes with models that hear no audio.
    """
    possible = [each for each in contenders() if (subject.short or not each.short) and (subject.audio or each.name != "passes")]
    return [each for each in possible if (not names or each.name in names) and (not subject.only or each.name in subject.only)]


def publish(results: Sequence[Results], docs: Path) -> None:
    """Write page and plots; other benchmarks' targets of the same device are on it if their results lie there."""
    plots = [f"overhead-{run.device}.svg" if run.device == "cuda" else "overhead.svg" for run in results]
    drawn = []
    for run, name in zip(results, plots, strict=True):
        try:
            from benchmarks.overhead.plot import draw

            draw(run, docs / name)
            drawn.append(name)
        except ModuleNotFoundError as error:
            print(f"no plot: {error}")
    (docs / "overhead.md").write_text(page(results, others=[units(run.device) for run in results], plots=drawn), encoding="utf-8")
    print(f"wrote {docs / 'overhead.md'}")


def latest(given: Path) -> list[Path]:
    """Return the file given and, of the other kind of device, the newest beside it."""
    other = "cpu" if given.stem.endswith("cuda") else "cuda"
    return [given, *sorted(given.parent.glob(f"overhead-*-{other}.json"))[-1:]]


def units(device: str) -> Beside:
    """Return the targets that the newest measurement of unit costs on this device has, if there is one that was not just a trial."""
    for path in sorted(RESULTS.glob("units-*.json"), reverse=True):
        report = json.loads(path.read_text(encoding="utf-8"))
        if ("cpu" in path.stem) == (device == "cpu") and not report.get("quick"):
            found = report["machine"]
            source = f"`make bench-units`, {found['date']}, {found['device']}, torch {found['torch']}, probe {found['probe']}"
            return Beside(source, [Target(**row) for row in report["targets"]])
    return Beside("", [])


def versions() -> dict[str, str]:
    """Return the versions that the figures hold for."""
    found = {"Python": platform.python_version(), "torch": torch.__version__, "transformers": transformers.__version__}
    for name in _OPTIONAL:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "missing"
    return {**found, "probe": revision()}


def _device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def _memory_gib(device: str) -> float:
    """Return what copies of the model may take: what is free, less what a step needs."""
    if device == "cuda":
        return torch.cuda.mem_get_info()[0] / 2**30 * 0.6
    info = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
    free = next(int(line.split()[1]) for line in info if line.startswith("MemAvailable")) / 2**20
    return max(2.0, free - _RESERVED_GIB)


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    names = [subject.name for subject in SUBJECTS]
    parser.add_argument("--models", nargs="+", choices=names, default=names, help="models to train")
    parser.add_argument("--contenders", nargs="+", choices=[each.name for each in contenders()], default=[], help="default: all")
    parser.add_argument("--pairs", type=int, default=None, help="pairs to ask for at most, for a trial (default: each model's own)")
    parser.add_argument("--minutes", type=float, default=18, help="time that pairs beyond those are measured in, all models together")
    parser.add_argument("--memory", type=float, default=None, help="GiB for the copies of a model (default: what is free, less a reserve)")
    parser.add_argument("--results", type=Path, default=None, help="the file to write (default: by date and device in benchmarks/results)")
    parser.add_argument("--add", type=Path, default=None, help="results of other models of the same day and machine to stand beside these")
    parser.add_argument("--docs", type=Path, default=DOCS, help="the folder of page and plot")
    parser.add_argument("--page-only", action="store_true", help="measure nothing, write the page of the results that are there")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
