"""The weights that runs begin with: each tiny model, trained for a while on the voices, so that it uses its audio."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import Trainer

from benchmarks.faults.training import Training
from benchmarks.faults.voices import dataset
from benchmarks.faults.waveform_model import CASE as MOONSHINE
from models import CASES
from models.case import Case

STEPS, RATE, BATCH = 300, 3e-3, 8
HIGGS = "higgs_audio_v2"
_SEED = 5


class OwnMeans(Trainer):
    """A Trainer that leaves the means to the model.

    The stock one hands HiggsAudioV2 the number of *text* labels, by which transformers 5 divides the audio losses, too: a defect that
    the loss audit rightly tells of, so that a run with it would be no healthy one.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Say that the model takes no ``num_items_in_batch``."""
        super().__init__(*args, **kwargs)
        self.model_accepts_loss_kwargs = False


def case_of(name: str) -> Case:
    """Return the case of that name."""
    if name == HIGGS:
        return replace(CASES[name], trainer_class=OwnMeans)
    return MOONSHINE if name == MOONSHINE.name else CASES[name]


def make_base(name: str, folder: Path, steps: int = STEPS) -> Path:
    """Train the model of a case, write its weights into the folder unless they are there, and return their file."""
    path = folder / f"{name}.pt"
    if path.exists():
        return path
    training = Training(case_of(name), seed=_SEED)
    model = training.case.build(_SEED)
    arguments = training.case.arguments(
        max_steps=steps,
        learning_rate=RATE,
        per_device_train_batch_size=BATCH,
        logging_steps=max(steps // 5, 1),
        warmup_steps=10,
        seed=_SEED,
    )
    trainer = training.case.trainer_class(
        model=model, args=arguments, train_dataset=dataset(training, 256, _SEED), data_collator=training.case.collate
    )
    trainer.train()
    scratch = path.with_suffix(f".{os.getpid()}")
    torch.save(model.state_dict(), scratch)
    scratch.replace(path)  # whole or not at all: another process may look
    return path


def load_base(path: Path) -> dict[str, Tensor]:
    """Return the weights that :func:`make_base` wrote."""
    weights: dict[str, Tensor] = torch.load(path, weights_only=True)
    return weights
