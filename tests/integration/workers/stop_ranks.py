"""One of two processes of a training, started by torchrun: a finding on one rank ends the training on both, or on none.

Usage: stop_ranks.py FOLDER SCENARIO...; each scenario leaves ``<scenario>.rank<r>.json``: the last step, what the terminal was told,
what ``on_finding`` heard, and the all-reduces of the whole training.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import sys
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).parents[2]), str(Path(__file__).parent)]

import torch
import torch.distributed as dist
from transformers import Trainer, TrainerCallback

import probe
import probe.trainer.session as session
from models import CASES
from models.running import run
from probe.diagnosis import Diagnosis
from probe.findings.rule import History, Rule, Symptom
from probe.merge import ranks
from probe.observation import Observation

RANK = int(os.environ["RANK"])


def at_step(step: int, *, on: int | None) -> Rule:
    """A rule that finds something from a step on, on one rank only (``None``: on none)."""

    def check(history: History) -> list[Symptom]:
        return [Symptom("planted")] if on == RANK and history.last.step >= step else []

    return Rule("planted", "critical", "", "", check)


class LogsByItself(TrainerCallback):
    """Logs a loss of its own on rank 0, in the middle of a step: that rank publishes at another moment than the others."""

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if RANK == 0:
            self._trainer.log({"loss": 1.0})


def train(folder: Path, *, rule: Rule, built: Callable[[Trainer], Any] | None = None, **options: Any) -> dict[str, Any]:
    """Train four steps with one rule; return what this rank has seen."""
    heard: list[tuple[int, str, str]] = []
    calls = 0
    original, plain = dist.all_reduce, session.Diagnosis

    def counted(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        return original(*args, **kwargs)

    def attach(model: Any) -> Any:
        hear = lambda finding: heard.append((finding.step, finding.code, finding.state))  # noqa: E731
        return probe.attach(model, every=2, on_finding=hear, **options)

    dist.all_reduce = counted
    session.Diagnosis = partial(Diagnosis, rules=[rule])
    said = io.StringIO()
    try:
        with contextlib.redirect_stdout(said):
            common = {"max_steps": 6, "ddp_backend": "gloo", "output_dir": str(folder), "per_device_train_batch_size": 2, "samples": 24}
            result = run(CASES["llama"], attach=attach, built=built, **common)
    finally:
        dist.all_reduce, session.Diagnosis = original, plain
    last = result.attached.last
    return {
        "steps": result.trainer.state.global_step,
        "said": [line for line in said.getvalue().splitlines() if "stop_on" in line or "switched off" in line],
        "heard": heard,
        "all_reduces": calls,
        "failures": {part: why for part, why in last.not_measured.items() if "switched off" in why},
        "open": [finding.code for finding in last.findings],
    }


def together(folder: Path) -> dict[str, Any]:
    return train(folder, rule=at_step(2, on=1), stop_on="critical")


def rank_0_logs(folder: Path) -> dict[str, Any]:
    return train(folder, rule=at_step(2, on=1), stop_on="critical", built=lambda trainer: trainer.add_callback(LogsByItself(trainer)))


def rank_0_fails(folder: Path) -> dict[str, Any]:
    """On rank 0 no record can be made: it takes part in the decision all the same."""
    record = Observation.record

    def broken(self: Observation, *args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("planted in record")

    def unbroken_first(self: Observation, measured: Any, **kwargs: Any) -> Any:
        return (record if measured.step < 2 else broken)(self, measured, **kwargs)

    if RANK == 0:
        Observation.record = unbroken_first  # type: ignore[method-assign]
    try:
        return train(folder, rule=at_step(2, on=1), stop_on="critical")
    finally:
        Observation.record = record  # type: ignore[method-assign]


def nothing_found(folder: Path) -> dict[str, Any]:
    return train(folder, rule=at_step(2, on=None), stop_on="critical")


def not_asked(folder: Path) -> dict[str, Any]:
    return train(folder, rule=at_step(2, on=1))


def other_stop_on(folder: Path) -> dict[str, Any]:
    return train(folder, rule=at_step(2, on=1), stop_on="critical" if RANK else "warning")


def main() -> None:
    """Run the scenarios in order."""
    folder, *scenarios = sys.argv[1:]
    torch.set_num_threads(1)
    ranks._PATIENCE = timedelta(seconds=30)
    for scenario in scenarios:
        report = globals()[scenario](Path(folder) / scenario)
        Path(folder, f"{scenario}.rank{RANK}.json").write_text(json.dumps(report), encoding="utf-8")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
