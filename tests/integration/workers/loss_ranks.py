"""One of two processes of a training, started by torchrun: the loss audit with uneven labels on the ranks.

Usage: loss_ranks.py FOLDER SCENARIO...; a scenario is ``<model>-<accumulation>-<smoothing>-<average>`` and leaves
``<scenario>.rank<r>.json``: the audits of its steps, and what ``backward()`` was really called on.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).parents[2]), str(Path(__file__).parent)]

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import TrainerCallback

import probe
from models import CASES
from models.running import run
from probe.merge import ranks

RANK = int(os.environ["RANK"])
KEPT = 4  # labels that rank 1 keeps of each row


class Audits(TrainerCallback):
    """Keeps the audit and the metrics of every record."""

    def __init__(self) -> None:
        self.attached: Any = None
        self.found: dict[int, Any] = {}

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        last = None if self.attached is None else self.attached.last
        if last is not None:
            audit = None if last.loss_audit is None else asdict(last.loss_audit)
            missing = {name: why for name, why in last.not_measured.items() if "loss" in name}
            self.found[last.step] = {"audit": audit, "ranks": last.ranks, "missing": missing}


def scenario(name: str, folder: Path) -> dict[str, Any]:
    """Train two steps of one scenario."""
    model, accumulation, smoothing, average = name.split("-")
    case, audits, seen = CASES[model], Audits(), []

    def collate(samples: Sequence[Any]) -> Any:
        batch = case.collate(samples)
        labelled = batch["labels"] != -100
        few = labelled & (labelled.cumsum(1) <= KEPT)
        return {**batch, "labels": torch.where(few, batch["labels"], -100)} if RANK else batch

    def attach(built: Any) -> Any:
        audits.attached = probe.attach(built, every=1, settings=probe.Settings(terminal=False)) if RANK == 0 or average != "alone" else None
        return audits.attached

    backward = Tensor.backward

    def watched(self: Tensor, *args: Any, **kwargs: Any) -> Any:
        seen.append(self.item())
        return backward(self, *args, **kwargs)

    Tensor.backward = watched
    try:
        run(
            replace(case, collate=collate),
            attach=attach,
            built=lambda trainer: trainer.add_callback(audits),
            samples=16,
            max_steps=2,
            ddp_backend="gloo",
            output_dir=str(folder),
            gradient_accumulation_steps=int(accumulation),
            label_smoothing_factor=float(smoothing),
            average_tokens_across_devices=average != "each",
        )
    finally:
        Tensor.backward = backward
    return {"steps": audits.found, "backward": seen}


def main() -> None:
    """Run the scenarios in order."""
    folder, *names = sys.argv[1:]
    torch.set_num_threads(1)
    for name in names:
        ranks._PATIENCE = timedelta(seconds=0.7 if name.endswith("-alone") else 30)
        report = scenario(name, Path(folder) / name)
        Path(folder, f"{name}.rank{RANK}.json").write_text(json.dumps(report), encoding="utf-8")
    # Left to the interpreter's exit, gloo's threads sometimes make it exit with 1.
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
