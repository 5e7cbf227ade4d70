"""One variant trained on one seed by an unmodified Trainer, with the probe attached: its verdict, and the truth."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from transformers import set_seed

import probe
from benchmarks.verdicts.truth import Truth, measure
from benchmarks.verdicts.variants import BY_NAME
from clone_voice import Clip, VoiceClonerConfig, cloning_trainer, spoken_clips
from probe.records import StepRecord, Verdict


@dataclass(frozen=True, slots=True)
class Plan:
    """Speakers and texts of the data, optimizer steps (``None``: the variant's), how often the probe looks and changes the audio."""

    speakers: int = 48
    texts: int = 12
    steps: int | None = None
    every: int = 20
    counterfactual_every: int | None = 20


FULL = Plan()


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of one training.

    Attributes:
        variant, seed: Which.
        verdict: The verdict of the last record, or ``None``.
        reason: Why there is none, "" if there is one.
        first: The step at which the last verdict's word was first given and then kept.
        loss: Of the predictions at the last step, nats a token.
        truth: What the reference really does, ``None`` without one.
        findings: Codes of critical findings and warnings that were open at the end.
    """

    variant: str
    seed: int
    verdict: Verdict | None
    reason: str
    first: int | None
    loss: float | None
    truth: Truth | None
    findings: tuple[str, ...]

    @property
    def right(self) -> bool:
        """Whether the verdict is the expected one; where none is to be had, whether there is none and the reason is there."""
        expected = BY_NAME[self.variant].expected
        return (self.verdict.use == expected) if self.verdict is not None else expected is None and bool(self.reason)


def train(name: str, seed: int, folder: Path, plan: Plan = FULL) -> Outcome:
    """Train one variant in a folder of its own on one thread, and read its run folder."""
    torch.set_num_threads(1)
    variant, clips = BY_NAME[name], _clips(plan.speakers, plan.texts, seed)
    set_seed(seed)
    model = variant.model(VoiceClonerConfig())
    data = variant.data(clips)
    steps = variant.steps if plan.steps is None else plan.steps
    settings = probe.Settings(terminal=False, counterfactual_every=plan.counterfactual_every)
    with probe.attach(model, every=plan.every, settings=settings):
        trainer = cloning_trainer(
            model,
            data,
            variant.collator,
            output_dir=folder,
            steps=steps,
            seed=seed,
            use_cpu=True,
            disable_tqdm=True,
            logging_steps=1000,
        )
        trainer.train()
    records = probe.load(folder / "_probe").records
    last = records[-1]
    return Outcome(
        name,
        seed,
        last.verdict,
        "" if last.verdict is not None else last.not_measured.get("verdict", last.not_measured.get("counterfactual", "")),
        _since(records),
        last.metrics.get("probe/audio/loss"),
        measure(model, data, variant.collator, seed=seed),
        tuple(finding.code for finding in last.findings if finding.severity != "info"),
    )


@cache
def _clips(speakers: int, texts: int, seed: int) -> tuple[Clip, ...]:
    return spoken_clips(speakers=speakers, texts=texts, seed=seed)


def _since(records: tuple[StepRecord, ...]) -> int | None:
    step = None
    for record in reversed(records):
        if record.verdict is None or records[-1].verdict is None or record.verdict.use != records[-1].verdict.use:
            break
        step = record.step
    return step
