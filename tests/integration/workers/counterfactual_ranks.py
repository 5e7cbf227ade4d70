"""One of two processes of a training, started by torchrun: counterfactual passes on both ranks, on one, and failing on one.

Usage: counterfactual_ranks.py FOLDER SCENARIO...; each scenario leaves ``<scenario>.rank<r>.json``: this rank's records, and how its run
differs from one without the probe.
"""

from __future__ import annotations

import json
import os
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).parents[2]), str(Path(__file__).parent)]

import torch
import torch.distributed as dist
from torch import nn
from transformers import Trainer, TrainerCallback

import probe
from models import CASES
from models.original_training import text_dataset
from models.running import assert_identical, run
from probe.counterfactual import passes
from probe.merge import ranks
from probe.records_json import to_json

RANK = int(os.environ["RANK"])
STEPS = 4


class Records(TrainerCallback):
    """Keeps every record that ``p.last`` was."""

    def __init__(self) -> None:
        self.attached: Any = None
        self.lines: dict[int, str] = {}

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.attached is not None and self.attached.last is not None:
            self.lines[self.attached.last.step] = to_json(self.attached.last)


def compared(model: str, folder: Path, *, observed: bool = True, text_only: bool = False) -> dict[str, Any]:
    """Train without and with passes in every step; report this rank's records and whether the two runs are the same."""
    kept, results = Records(), []
    collectives: list[int] = []
    settings = probe.Settings(terminal=False, counterfactual_every=1)

    def attach(built: nn.Module) -> Any:
        kept.attached = probe.attach(built, every=1, settings=settings)
        return kept.attached

    def prepare(trainer: Trainer) -> None:
        trainer.add_callback(kept)
        if text_only and RANK == 1:
            trainer.train_dataset = text_dataset(16, 0)

    original = dist.all_reduce

    def counted(*args: Any, **kwargs: Any) -> Any:
        collectives[-1] += 1
        return original(*args, **kwargs)

    dist.all_reduce = counted
    try:
        for chosen in (None, attach if observed else None):
            collectives.append(0)
            results.append(
                run(
                    CASES[model],
                    attach=chosen,
                    built=prepare,
                    samples=16,
                    max_steps=STEPS,
                    ddp_backend="gloo",
                    output_dir=str(folder / str(len(results))),
                )
            )
    finally:
        dist.all_reduce = original
    report = {"records": [json.loads(line) for line in kept.lines.values()], "differences": "", "collectives": collectives}
    try:
        assert_identical(*results)
    except AssertionError as error:
        report["differences"] = str(error)
    return report


def both(folder: Path) -> dict[str, Any]:
    return compared("whisper", folder)


def text_on_one(folder: Path) -> dict[str, Any]:
    """Rank 1's batches hold no audio at all."""
    return compared("original", folder, text_only=True)


def alone(folder: Path) -> dict[str, Any]:
    """Rank 1 has no probe: rank 0 makes its passes by itself."""
    return compared("whisper", folder, observed=RANK == 0)


def memory(folder: Path) -> dict[str, Any]:
    """Rank 1 runs out of memory in the passes of step 2."""
    replay = passes.run_again
    calls = 0

    def failing(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 6:  # of step 1 there are four: as it is, and three changes
            raise torch.OutOfMemoryError("CUDA out of memory.") if hasattr(torch, "OutOfMemoryError") else RuntimeError("memory")
        return replay(*args, **kwargs)

    if RANK == 1:
        passes.run_again = failing
    try:
        return compared("whisper", folder)
    finally:
        passes.run_again = replay


def main() -> None:
    """Run the scenarios in order."""
    folder, *names = sys.argv[1:]
    torch.set_num_threads(1)
    for name in names:
        ranks._PATIENCE = timedelta(seconds=0.7 if name == "alone" else 30)
        report = globals()[name](Path(folder) / name)
        Path(folder, f"{name}.rank{RANK}.json").write_text(json.dumps(report), encoding="utf-8")
    # Left to the interpreter's exit, gloo's threads sometimes make it exit with 1.
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
