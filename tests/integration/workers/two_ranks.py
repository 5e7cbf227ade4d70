"""One of two processes of a training, started by torchrun: runs a list of scenarios and writes what this rank has seen of each.

Usage: two_ranks.py FOLDER SCENARIO...; each scenario leaves ``<scenario>.rank<r>.json`` in the folder.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).parents[2]), str(Path(__file__).parent)]

import torch
import torch.distributed as dist
from torch import nn
from transformers import Trainer, TrainerCallback
from truth import Truth

import probe
from models import CASES
from models.case import Case
from models.original_training import text_dataset
from models.running import RunResult, assert_identical, run
from probe.capture.observers.heads import HeadWatcher
from probe.merge import ranks
from probe.records_json import to_json

RANK = int(os.environ["RANK"])
SHORT = timedelta(seconds=0.7)
Attach = Callable[[nn.Module], Any]


class Records(TrainerCallback):
    """Keeps every record that ``p.last`` was, read where a user's callback would read it."""

    def __init__(self, model: nn.Module) -> None:
        self.lines: dict[int, str] = {}
        self.attached: Any = None

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.attached is not None and self.attached.last is not None:
            self.lines[self.attached.last.step] = to_json(self.attached.last)


def train(case: Case, folder: Path, attach: Attach | None, **overrides: Any) -> tuple[RunResult, dict[str, Any]]:
    """Train with this rank's callbacks in place; return the run and what is to be written of it."""
    kept: dict[str, Any] = {}

    def built(trainer: Trainer) -> None:
        kept["truth"], kept["records"] = Truth(case, trainer.model), Records(trainer.model)
        kept["records"].attached = kept["probe"]
        trainer.add_callback(kept["truth"])
        trainer.add_callback(kept["records"])
        prepare(trainer)

    def attached(model: nn.Module) -> Any:
        kept["probe"] = attach(model) if attach is not None else None
        return kept["probe"]

    original = dist.all_reduce

    def counted(*args: Any, **kwargs: Any) -> Any:
        kept["truth"].count_collective()
        return original(*args, **kwargs)

    prepare = overrides.pop("prepare", lambda trainer: None)
    chosen = {
        "max_steps": 4,
        "ddp_backend": "gloo",
        "output_dir": str(folder),
        "per_device_train_batch_size": 2,
        "samples": 16,
        **overrides,
    }
    dist.all_reduce = counted
    begin = time.perf_counter()
    try:
        result = run(case, attach=attached, built=built, **chosen)
    finally:
        dist.all_reduce = original
    report = {
        "truth": kept["truth"].steps,
        "collectives": kept["truth"].collectives,
        "records": [json.loads(line) for line in kept["records"].lines.values()],
        "log": result.log_history,
        "seconds": time.perf_counter() - begin,
    }
    return result, report


def compared(case: Case, folder: Path, attach: Attach | None, **overrides: Any) -> dict[str, Any]:
    """Train without and with the probe; tell whether this rank's two runs are the same bit for bit."""
    plain, without = train(case, folder / "plain", None, **overrides)
    watched, report = train(case, folder / "watched", attach, **overrides)
    report["collectives_without"] = without["collectives"]
    report["differences"] = ""
    try:
        assert_identical(plain, watched)
    except AssertionError as error:
        report["differences"] = str(error)
    return report


def everywhere(**options: Any) -> Attach:
    """Attach on every rank."""
    return lambda model: probe.attach(model, **options)


def on_rank(rank: int, **options: Any) -> Attach | None:
    """Attach on one rank only."""
    return everywhere(**options) if rank == RANK else None


def whisper(folder: Path) -> dict[str, Any]:
    return compared(CASES["whisper"], folder, everywhere(every=2))


def accumulation(folder: Path) -> dict[str, Any]:
    return compared(CASES["whisper"], folder, everywhere(every=2), gradient_accumulation_steps=2)


def original(folder: Path) -> dict[str, Any]:
    return compared(CASES["original"], folder, everywhere(every=1), max_steps=3)


def no_clips(folder: Path) -> dict[str, Any]:
    """Rank 1 is given batches with features of shape (0, 16, 100)."""

    def prepare(trainer: Trainer) -> None:
        if RANK == 1:
            trainer.train_dataset = text_dataset(16, 0)

    return compared(CASES["original"], folder, everywhere(every=1), max_steps=3, prepare=prepare)


def no_audio(folder: Path) -> dict[str, Any]:
    """Rank 1 is given batches without any key of audio, and without placeholders in the text."""
    case = CASES["qwen2_audio"]

    def prepare(trainer: Trainer) -> None:
        collate = trainer.data_collator
        placeholder = case.tokenizer().convert_tokens_to_ids(case.audio_token)
        word = case.tokenizer().convert_tokens_to_ids("a")

        def text_only(samples: Any) -> Any:
            batch = {name: value for name, value in collate(samples).items() if "feature" not in name}
            batch["input_ids"] = torch.where(batch["input_ids"] == placeholder, word, batch["input_ids"])
            return batch

        if RANK == 1:
            trainer.data_collator = text_only

    return compared(case, folder, everywhere(every=1), max_steps=2, prepare=prepare)


def rank_0_only(folder: Path) -> dict[str, Any]:
    return compared(CASES["whisper"], folder, on_rank(0, every=2), max_steps=3)


def rank_1_only(folder: Path) -> dict[str, Any]:
    return compared(CASES["whisper"], folder, on_rank(1, every=2), max_steps=3)


def both_again(folder: Path) -> dict[str, Any]:
    return train(CASES["whisper"], folder, everywhere(every=2), max_steps=2)[1]


def other_sites(folder: Path) -> dict[str, Any]:
    sites = "auto" if RANK == 0 else {"custom": "model.decoder.layers.0.fc1"}
    return train(CASES["whisper"], folder, everywhere(every=2, sites=sites), max_steps=3)[1]


def other_cadence(folder: Path) -> dict[str, Any]:
    """Rank 0 samples steps 1, 2, 4, rank 1 steps 1, 3."""
    return compared(CASES["whisper"], folder, everywhere(every=2 + RANK), max_steps=4)


def failing_begin(folder: Path) -> dict[str, Any]:
    """On rank 1 the search for sites fails when training begins."""
    from probe import observation

    found = observation.discover

    def broken(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("planted in begin")

    if RANK == 1:
        observation.discover = broken
    try:
        return compared(CASES["whisper"], folder, everywhere(every=2), max_steps=3)
    finally:
        observation.discover = found


def failing_observer(folder: Path) -> dict[str, Any]:
    """On rank 1 the heads' observer fails in step 2."""
    leave = HeadWatcher.leave

    def broken(self: HeadWatcher, call: Any, buffer: Any) -> None:
        if buffer.step == 2:
            raise RuntimeError("planted in heads")
        leave(self, call, buffer)

    if RANK == 1:
        HeadWatcher.leave = broken
    try:
        return compared(CASES["whisper"], folder, everywhere(every=1), max_steps=4)
    finally:
        HeadWatcher.leave = leave


def failing_step(folder: Path) -> dict[str, Any]:
    """On rank 1 the user's own code fails in step 2: the training is over, and the probe must not keep it."""

    def prepare(trainer: Trainer) -> None:
        plain = trainer.training_step

        def broken(*args: Any, **kwargs: Any) -> Any:
            if trainer.state.global_step == 1:
                raise RuntimeError("planted in training_step")
            return plain(*args, **kwargs)

        if RANK == 1:
            trainer.training_step = broken

    return train(CASES["whisper"], folder, everywhere(every=1), max_steps=3, prepare=prepare)[1]


def agreement(folder: Path) -> dict[str, Any]:
    """What it costs to agree when training begins, in milliseconds, with both ranks there at the same time."""
    dist.init_process_group("gloo")
    taken = []
    for _ in range(20):
        dist.barrier()
        begin = time.perf_counter()
        found = ranks.agree("0" * 64)
        taken.append(1e3 * (time.perf_counter() - begin))
        assert found.merged
    return {"milliseconds": sorted(taken)}


def main() -> None:
    """Run the scenarios in order."""
    folder, *scenarios = sys.argv[1:]
    torch.set_num_threads(1)
    for scenario in scenarios:
        ranks._PATIENCE = SHORT if scenario in ("rank_0_only", "rank_1_only") else timedelta(seconds=30)
        print(f"--- {scenario}", flush=True) if RANK == 0 else None
        report = globals()[scenario](Path(folder) / scenario)
        Path(folder, f"{scenario}.rank{RANK}.json").write_text(json.dumps(report), encoding="utf-8")
    # Left to the interpreter's exit, gloo's threads sometimes make it exit with 1.
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
