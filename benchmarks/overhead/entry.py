"""One contender in the lockstep: its copy of the model, its Trainer, what accompanies it, and its turns."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PrinterCallback, Trainer, TrainingArguments

from benchmarks.overhead.contenders import Contender
from benchmarks.overhead.lockstep import Runner
from benchmarks.overhead.subjects import Samples, Subject, collate

SEED = 0
Mixin = type | None


@dataclass(frozen=True)
class Setting:
    """What all contenders of a run share.

    Attributes:
        subject: The model.
        device: ``"cpu"`` or ``"cuda"``.
        mixin: A class that every Trainer is made to inherit from first, which lets a test look on.
    """

    subject: Subject
    device: str
    mixin: Mixin = None


class Entry:
    """A contender, built and ready to take turns. Use it as a context: its training ends with it."""

    def __init__(self, contender: Contender, setting: Setting) -> None:
        self.contender = contender
        self.companion = contender.companion()
        self._folder = tempfile.TemporaryDirectory(prefix="overhead-benchmark-")
        model = setting.subject.model(seed=SEED, attention=contender.attention).to(setting.device)
        self.companion.open(model)
        self.trainer = self._trainer(model, setting)
        self.companion.equip(self.trainer)
        self.runner = Runner(self.trainer, seed=SEED)

    def _trainer(self, model: Any, setting: Setting) -> Trainer:
        base = self.companion.trainer
        made = base if setting.mixin is None else type("Observed", (setting.mixin, base), {})
        trainer = made(
            model=model,
            args=arguments(setting, self._folder.name),
            train_dataset=Samples(setting.subject, seed=SEED),
            data_collator=collate,
            callbacks=list(self.companion.callbacks()),
        )
        trainer.remove_callback(PrinterCallback)
        return trainer

    def start(self) -> None:
        """Go to the beginning of the first step."""
        self.runner.start()
        self.companion.begun()

    def turn(self, by: Callable[[Callable[[], float]], Any] | None = None) -> Any:
        """Run one step, and return how many seconds it took.

        Args:
            by: Runs the step itself, what comes before and after it left out, and gives its own result.
        """
        self.companion.before()
        try:
            return self.runner.step() if by is None else by(self.runner.step)
        finally:
            self.companion.after()

    def close(self) -> None:
        """End the training and what accompanies it."""
        try:
            self.companion.before()
            self.runner.stop()
        finally:
            self.companion.close()
            self._folder.cleanup()


def arguments(setting: Setting, folder: str, **overrides: Any) -> TrainingArguments:
    """Return arguments for training without logs, checkpoints and an end."""
    cuda = setting.device != "cpu"
    chosen: dict[str, Any] = {
        "output_dir": folder,
        "per_device_train_batch_size": setting.subject.batch_size(setting.device),
        "max_steps": 10**6,
        "learning_rate": 1e-5,
        "optim": "adamw_torch",
        "logging_strategy": "no",
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "remove_unused_columns": False,
        "dataloader_pin_memory": cuda,
        "use_cpu": not cuda,
        "bf16": cuda,
        "seed": SEED,
    }
    return TrainingArguments(**{**chosen, **overrides})


def copy_bytes(parameters: int) -> int:
    """Return what one more contender takes between its steps: weights and AdamW's two states in float32."""
    return 12 * parameters


def parameters_of(subject: Subject) -> int:
    """Return the number of a model's parameters; allocates none of them."""
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in subject.build("sdpa").parameters())
