"""A real Trainer that trains on one batch over and over, with nothing switched on that the benchmarks do not measure."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import Trainer, TrainerCallback, TrainingArguments

import probe


class Numbers(Dataset[int]):
    """As many samples as are asked for; the collator makes the batch."""

    def __init__(self, count: int) -> None:
        """Hold ``count`` numbers."""
        self._count = count

    def __len__(self) -> int:
        """Return how many there are."""
        return self._count

    def __getitem__(self, index: int) -> int:
        """Return the number itself."""
        return index


def trainer(
    model: nn.Module,
    batch: dict[str, Tensor],
    *,
    steps: int,
    device: torch.device,
    optimizer: str = "sgd",
    callbacks: Sequence[TrainerCallback] = (),
    kind: type[Trainer] = Trainer,
    **changes: Any,
) -> Trainer:
    """Return a Trainer over ``steps`` optimizer steps of the same batch: no log, no checkpoint, no progress bar.

    ``changes`` are further training arguments.
    """
    transformers.logging.set_verbosity_error()
    arguments = TrainingArguments(
        output_dir=tempfile.mkdtemp(prefix="probe-units-"),
        max_steps=steps,
        per_device_train_batch_size=1,
        learning_rate=1e-5,
        lr_scheduler_type="constant",
        optim=optimizer,
        logging_strategy="no",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_pin_memory=False,
        use_cpu=device.type == "cpu",
        **changes,
    )

    def collate(samples: list[int]) -> dict[str, Tensor]:
        return dict(batch)

    samples = Numbers(steps * changes.get("gradient_accumulation_steps", 1))
    made = kind(
        model=model,
        args=arguments,
        train_dataset=samples,
        data_collator=collate,
        callbacks=list(callbacks),
    )
    made.remove_callback(transformers.PrinterCallback)  # it prints the summary at the end
    return made


def quiet(**changes: Any) -> probe.Settings:
    """Return the settings of a probe that prints nothing and makes no counterfactual passes; its run folder is a new one."""
    folder = tempfile.mkdtemp(prefix="probe-units-")
    return probe.Settings(**{"terminal": False, "run_folder": folder, "counterfactual_every": 0, **changes})
