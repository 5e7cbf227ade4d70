"""One ``train()`` call under observation: what is wired into the Trainer, and what each of its events does."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from torch import nn
from transformers.trainer_callback import TrainerState

from probe.capture.schedule import in_cadence
from probe.diagnosis import Diagnosis
from probe.foreign.patching import wrap_instance_method
from probe.foreign.trainer_loss import LossSettings, read_loss_settings
from probe.foreign.trainer_private import add_last, insert_first, outermost_module, processing_class, remove_callback, still_scaled
from probe.metrics import headline
from probe.observation import Observation
from probe.publication import Publisher, Show
from probe.records import Setup, StepRecord
from probe.runfacts import run_facts
from probe.settings import Options
from probe.sinks.run_folder import RunFolder
from probe.sinks.terminal import TerminalSink
from probe.sinks.trainer_log import enter, is_training_log
from probe.trainer.armed_step import ArmedStep
from probe.trainer.record_callback import Conductor, RecordCallback
from probe.trainer.setup import read_setup
from probe.trainer.stopping import Stopping

RUN_FOLDER = "_probe"
_EAGER = (
    "sampled steps of this compiled model run eagerly: they differ from compiled ones by rounding, and dropout masks after them differ "
    "(compile='off' leaves compiled regions unobserved)"
)


class TrainerSession:
    """Observes one ``train()`` call of one Trainer, and leaves it as it was at the end."""

    def __init__(
        self,
        trainer: Any,
        options: Options,
        *,
        attached: nn.Module,
        missing: Sequence[RecordCallback],
        keep: Callable[[StepRecord, bool], None],
        terminal: TerminalSink,
    ) -> None:
        """Find the sites on the model as it is trained, then wire the Trainer.

        Args:
            trainer: The Trainer, about to train.
            options: What ``attach`` was asked for.
            attached: What it was asked for on.
            missing: Callbacks to add for those kinds that the Trainer lacks.
            keep: Takes each published record.
            terminal: Prints sections and messages.
        """
        self._trainer = trainer
        self._handler = trainer.callback_handler
        self._undo: list[Callable[[], None]] = []
        self._predicting = False
        mine = [cb for cb in self._handler.callbacks if isinstance(cb, RecordCallback)]
        chief = bool(trainer.is_world_process_zero())
        rank = "" if chief else f"[rank {trainer.args.process_index}] "

        def say(message: str) -> None:
            terminal.say(rank + message)

        self._loss: LossSettings = read_loss_settings(trainer)
        processors = [options.tokenizer, *(cb.tokenizer for cb in mine if cb.tokenizer is not None), processing_class(trainer)]
        around = outermost_module(trainer)
        self.observation = Observation(
            trainer.model, options, attached=attached, around=around, processors=processors, say=say, loss=self._loss
        )
        setup: Setup | None = None
        with self.observation.breaker.guard("setup"):
            setup = read_setup(trainer, trainer.model, self.observation.discovery, processors)
        listener = options.on_finding if chief else None
        self._diagnosis = Diagnosis(self.observation.breaker, setup=setup, stop_on=options.stop_on, listener=listener)
        self._stopping = Stopping(options.stop_on, self.observation, say)
        self._publisher = Publisher(
            self.observation,
            diagnosis=self._diagnosis,
            folder=_folder(trainer, options, self.observation, setup) if chief else None,
            terminal=terminal if chief and options.settings.terminal else None,
            sections=self._sections,
            keep=keep,
            write_kept=options.settings.write_kept,
        )
        if chief and self.observation.window.runs_eagerly:
            terminal.say(_EAGER)
        cadences = {options.every, *(cb.log_every_n_steps for cb in mine)}
        self._step = ArmedStep(trainer, self.observation, cadences=cadences, failing=self.pause)
        try:
            self._wire([cb for cb in missing if not any(isinstance(known, type(cb)) for known in mine)])
        except BaseException:
            self._unwire()
            raise
        self.observation.join(cadences, stop_on=options.stop_on)
        self._stopping.begin()

    def _wire(self, added: Sequence[RecordCallback]) -> None:
        conductor = Conductor(self)
        insert_first(self._handler, conductor)
        self._undo.append(lambda: remove_callback(self._handler, conductor))
        for callback in added:
            add_last(self._handler, callback)
            self._undo.append(lambda callback=callback: remove_callback(self._handler, callback))  # type: ignore[misc]
        self._undo.append(wrap_instance_method(self._trainer, "training_step", self._step))

    def _unwire(self) -> None:
        while self._undo:
            self._undo.pop()()

    @property
    def trainer(self) -> Any:
        """The Trainer."""
        return self._trainer

    def close(self) -> None:
        """Publish what waits, and leave Trainer and model as they were. May be called twice."""
        self._publisher.publish()
        self.observation.close()
        self._unwire()

    def step_begins(self) -> None:
        """Let go of the last step's inputs and captures."""
        self._predicting = False
        self.observation.buffer.clear()

    def before_update(self) -> None:
        """Pass on to what is observed."""
        self.observation.before_update(still_scaled=still_scaled(self._trainer))

    def after_update(self) -> None:
        """Pass on to what is observed."""
        self.observation.after_update()

    def predicting(self) -> None:
        """Pass on the first batch of each evaluation; training goes on in between."""
        if not self._predicting:
            self._predicting = True
            self.observation.evaluating()

    @property
    def stop_wanted(self) -> bool:
        """Whether training is to end now: the same on every rank whenever an event of the Trainer ends."""
        return self._stopping.wanted(self._diagnosis.stop_asked)

    def step_ended(self, global_step: int) -> None:
        """Publish the step before; send off this one if it was sampled and has really ended (subclasses fire this event early, too)."""
        step = self.observation.buffer.step
        if step is not None and step != global_step:
            return
        with self.observation.breaker.guard("publication"):
            self._publisher.publish()
        with self.observation.breaker.guard("stop_on"):
            self._stopping.agree(self._diagnosis.stop_asked, sampled=step is not None)
        with self.observation.breaker.guard("publication"):
            measured = self.observation.finish()
            if measured is not None:
                self._publisher.expect(measured)

    def logs(self, logs: dict[str, Any], state: TrainerState) -> None:
        """Publish, and let a training log carry the newest record's headline metrics."""
        with self.observation.breaker.guard("trainer log"):
            if is_training_log(logs):
                self._publisher.publish(logged=self._logged_alone(logs, state))
                record = self._publisher.take_for_log()
                if record is not None:
                    enter(logs, state, headline(record.metrics), record.step)

    def _logged_alone(self, logs: dict[str, Any], state: TrainerState) -> tuple[int, float] | None:
        loss = logs.get("loss")
        return (state.global_step, float(loss)) if self._loss.logs_every_step and isinstance(loss, (int, float)) else None

    def pause(self) -> None:
        """Publish what waits."""
        with self.observation.breaker.guard("publication"):
            self._publisher.publish()

    def train_ended(self) -> None:
        """End the session."""
        with self.observation.breaker.guard("publication"):
            self.close()

    def _sections(self, step: int) -> Sequence[Show]:
        first = self._step.first or step
        shown = [cb for cb in self._handler.callbacks if isinstance(cb, RecordCallback)]
        return [cb.section for cb in shown if in_cadence(step, every=cb.log_every_n_steps, first=first)]


def _folder(trainer: Any, options: Options, observation: Observation, setup: Setup | None) -> RunFolder:
    path = Path(options.settings.run_folder or Path(trainer.args.output_dir) / RUN_FOLDER)
    return RunFolder(path, facts=run_facts(observation, options, setup))
