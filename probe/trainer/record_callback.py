"""What the Trainer's list of callbacks holds of us: callbacks that show a record, and the one that conducts."""

from __future__ import annotations

from typing import Any, Protocol

from transformers.trainer_callback import TrainerCallback, TrainerControl, TrainerState
from transformers.training_args import TrainingArguments

from probe.records import StepRecord
from probe.sections.blocks import Section


class RecordCallback(TrainerCallback):  # type: ignore[misc,unused-ignore]
    """A callback with a cadence of its own that turns a published record into a section. It computes nothing."""

    log_every_n_steps: int
    tokenizer: Any = None

    def section(self, record: StepRecord) -> Section:
        """Return what this callback shows of a record."""
        raise NotImplementedError(f"{type(self).__name__} shows no section: override section(record)")


class TrainerEvents(Protocol):
    """What happens to a Trainer, as far as the probe acts on it."""

    def step_begins(self) -> None:
        """An optimizer step is about to begin."""

    def before_update(self) -> None:
        """The optimizer is about to step: gradients are clipped, weights are old (with DeepSpeed it already has)."""

    def after_update(self) -> None:
        """The optimizer has stepped; gradients are still there."""

    def step_ended(self, global_step: int) -> None:
        """``on_step_end`` was called; ``global_step`` tells whether a step really ended."""

    def logs(self, logs: dict[str, Any], state: TrainerState) -> None:
        """The Trainer is about to hand ``logs`` to its integrations."""

    def predicting(self) -> None:
        """A batch of an evaluation or a prediction has been run."""

    @property
    def stop_wanted(self) -> bool:
        """Whether training is to end, on every rank at this point."""

    def pause(self) -> None:
        """An evaluation or a checkpoint has been made: publish what waits."""

    def train_ended(self) -> None:
        """``train()`` is about to return."""


class Conductor(TrainerCallback):  # type: ignore[misc,unused-ignore]
    """Stands first in the list, so that integrations see what it adds to the logs, and passes events on.

    A copy of it (of a deep-copied Trainer) is inert.
    """

    def __init__(self, events: TrainerEvents | None) -> None:
        """Pass events on to ``events``, or nowhere."""
        self._events = events

    def __deepcopy__(self, memo: dict[int, Any]) -> Conductor:
        """Return an inert conductor: the copied Trainer is not observed."""
        return Conductor(None)

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Pass on."""
        if self._events is not None:
            self._events.step_begins()

    def on_pre_optimizer_step(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Pass on."""
        if self._events is not None:
            self._events.before_update()

    def on_optimizer_step(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Pass on."""
        if self._events is not None:
            self._events.after_update()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Pass on, and end training if that is wanted."""
        if self._events is not None:
            self._events.step_ended(state.global_step)
            self._stop(control)

    def on_prediction_step(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Pass on."""
        if self._events is not None:
            self._events.predicting()

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: dict[str, Any] | None = None, **kwargs: Any
    ) -> None:
        """Pass on, and end training if that is wanted."""
        if self._events is not None and logs is not None:
            self._events.logs(logs, state)
            self._stop(control)

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Pass on, and end training if that is wanted."""
        if self._events is not None:
            self._events.pause()
            self._stop(control)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Pass on, and end training if that is wanted."""
        if self._events is not None:
            self._events.pause()
            self._stop(control)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Pass on."""
        if self._events is not None:
            self._events.train_ended()

    def _stop(self, control: TrainerControl) -> None:
        if self._events is not None and self._events.stop_wanted:
            control.should_training_stop = True
