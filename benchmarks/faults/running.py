"""Runs one training under observation, in a process of its own, and keeps what the findings said of it."""

from __future__ import annotations

import io
import logging
import random
import time
import warnings
from collections.abc import Iterable, Iterator
from contextlib import redirect_stdout
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
import transformers
from transformers import Trainer

from benchmarks.faults.bases import case_of, load_base, make_base
from benchmarks.faults.fault import Fault
from benchmarks.faults.faults import FAULTS
from benchmarks.faults.healthy import HEALTHY, Healthy
from benchmarks.faults.training import Training
from benchmarks.faults.voices import dataset
from probe import RunFolderError, Settings, attach, load
from probe.records import Finding, StepRecord

BATCH, RATE = 4, 1e-3
SUBJECTS: dict[str, Fault | Healthy] = {subject.name: subject for subject in (*FAULTS, *HEALTHY)}


@dataclass(frozen=True)
class Outcome:
    """What became of one run.

    Attributes:
        name: Of the fault or the healthy run.
        steps: Records that the run folder holds.
        onset: The step from which on it is broken.
        findings: The lines of ``findings.jsonl``.
        losses: What the Trainer logged first and last.
        switched_off: Parts of the probe that switched themselves off, with the reason; none should.
        error: What ended the training early, "" if nothing did.
        seconds: Wall time.
    """

    name: str
    steps: int
    onset: int
    findings: tuple[Finding, ...]
    losses: tuple[float, ...]
    switched_off: tuple[str, ...]
    error: str
    seconds: float


def planned(name: str) -> Training:
    """Return the training of that name, broken or varied."""
    subject = SUBJECTS[name]
    training = Training(case_of(subject.model))
    if isinstance(subject, Fault):
        subject.kind.inject(training)
    else:
        subject.vary(training)
    return training


def run_one(name: str, bases: Path, folder: Path) -> Outcome:
    """Train once.

    Args:
        name: Of the fault or the healthy run.
        bases: Where the weights to begin with are.
        folder: Where the Trainer may write; the run folder is ``_probe`` in it.
    """
    start = time.perf_counter()
    training = planned(name)
    error = ""
    trainer: Trainer | None = None
    with redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            trainer = _trainer(training, bases, folder)
            trainer.train()
        except Exception as raised:  # a fault may end its own training; what was found until then counts
            error = f"{type(raised).__name__}: {raised}"
    records, findings = _written(folder)
    reasons = {f"{what}: {why}" for record in records for what, why in record.not_measured.items() if "switched off" in why}
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry] if trainer is not None else []
    return Outcome(
        name=name,
        steps=len(records),
        onset=training.onset,
        findings=findings,
        losses=(losses[0], losses[-1]) if losses else (),
        switched_off=tuple(sorted(reasons)),
        error=error,
        seconds=time.perf_counter() - start,
    )


def _written(folder: Path) -> tuple[tuple[StepRecord, ...], tuple[Finding, ...]]:
    """Return what is in the run folder; nothing if training ended before there was one."""
    try:
        run = load(folder)
    except RunFolderError:
        return (), ()
    return run.records, run.findings


def _trainer(training: Training, bases: Path, folder: Path) -> Trainer:
    random.seed(training.seed)
    np.random.seed(training.seed)
    model = training.case.build(training.seed)
    if not training.fresh:
        model.load_state_dict(load_base(make_base(training.case.name, bases)))
    for change in training.models:
        model = change(model) or model
    settings = Settings(terminal=False)
    tokenizer = training.tokenizer or training.case.tokenizer()
    attach(model, every=training.every, tokenizer=tokenizer, settings=settings, **training.attach)
    chosen = {"per_device_train_batch_size": BATCH, "learning_rate": RATE, "max_steps": training.steps, **training.arguments}
    trainer = training.trainer_class()(
        model=model,
        args=training.case.arguments(output_dir=str(folder), seed=training.seed, **chosen),
        train_dataset=dataset(training, training.samples, training.seed),
        eval_dataset=dataset(training, 8, training.seed + 1),
        data_collator=training.collated,
    )
    for arrange in training.trainers:
        arrange(trainer)
    return trainer


def run_all(names: Iterable[str], *, processes: int, bases: Path | None = None) -> Iterator[Outcome]:
    """Run trainings in a pool of fresh processes, and yield the outcomes as they come.

    The weights to begin with are made first; they are kept in ``bases`` if that is given.
    """
    names = list(names)
    with TemporaryDirectory(prefix="faults-") as scratch:
        weights = Path(bases or Path(scratch) / "bases")
        weights.mkdir(parents=True, exist_ok=True)
        context = get_context("forkserver")
        context.set_forkserver_preload([__name__])
        with context.Pool(processes, initializer=_quiet, maxtasksperchild=1) as pool:
            models = {planned(name).case.name for name in names if not planned(name).fresh}
            pool.starmap(_make_base, [(model, weights) for model in sorted(models)], chunksize=1)
            jobs = [(name, weights, Path(scratch) / name.replace("/", "-")) for name in names]
            yield from pool.imap_unordered(_run_job, jobs, chunksize=1)


def _quiet() -> None:
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    logging.disable(logging.WARNING)


def _make_base(name: str, folder: Path) -> None:
    with redirect_stdout(io.StringIO()):
        make_base(name, folder)


def _run_job(job: tuple[str, Path, Path]) -> Outcome:
    return run_one(*job)
