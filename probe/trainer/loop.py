"""Hand-written loops: the steps of a training that has no Trainer."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from torch import nn

from probe.capture.observer import StepEnd
from probe.capture.schedule import is_sampled
from probe.diagnosis import Diagnosis
from probe.observation import Observation
from probe.publication import Publisher, Show
from probe.records import StepRecord
from probe.runfacts import run_facts
from probe.settings import Options
from probe.sinks.run_folder import RunFolder
from probe.sinks.terminal import TerminalSink

_OWN_LOOP = "a hand-written loop ends itself; look at p.last.findings, or give on_finding="
_LOSS = "a hand-written loop keeps its loss to itself; the losses of the heads are measured"


class LoopSession:
    """Observes the steps of a loop, one context a step.

    The loss of such a step is the loop's own and is not seen; gradients are read when the context ends, so ``zero_grad`` belongs
    after it (or before the forward). There is an output folder only if the settings name one.
    """

    def __init__(
        self,
        model: nn.Module,
        options: Options,
        *,
        shows: Sequence[Show],
        keep: Callable[[StepRecord, bool], None],
        terminal: TerminalSink,
    ) -> None:
        """Find the sites; see :class:`probe.trainer.session.TrainerSession` for the arguments. ``shows`` give the sections."""
        self._every = options.every
        self._step = 0
        self.observation = Observation(model, options, attached=model, around=model, processors=[options.tokenizer], say=terminal.say)
        chief = self.observation.ranks.rank == 0
        folder = options.settings.run_folder if chief else None
        self._publisher = Publisher(
            self.observation,
            diagnosis=Diagnosis(self.observation.breaker, listener=options.on_finding if chief else None),
            folder=None if folder is None else RunFolder(folder, facts=run_facts(self.observation, options)),
            terminal=terminal if chief and options.settings.terminal else None,
            sections=lambda step: shows,
            keep=keep,
            write_kept=options.settings.write_kept,
        )
        self.observation.join((options.every,), stop_on=options.stop_on)
        if chief and options.stop_on is not None:
            terminal.say(f"stop_on={options.stop_on!r} is not in force: {_OWN_LOOP}")

    @property
    def forwards_seen(self) -> bool:
        """Whether a training forward was observed in the newest sampled step."""
        return bool(self.observation.buffer.micro_batches)

    @contextmanager
    def step(self) -> Iterator[None]:
        """Observe the forwards and backwards inside the context as one optimizer step. The step before is published first."""
        self._step += 1
        with self.observation.breaker.guard("publication"):
            self._publisher.publish()
            self.observation.buffer.clear()
        if not is_sampled(self._step, cadences=(self._every,), first=1):
            yield
            return
        with self.observation.micro_batch(self._step, {}):
            yield
        with self.observation.breaker.guard("step end"):
            self.observation.buffer.totals.omit("probe/loss", _LOSS)
            self.observation.after_backward(None, StepEnd())
            measured = self.observation.finish()
            if measured is not None:
                self._publisher.expect(measured)

    def close(self) -> None:
        """Publish what waits, and let go of everything."""
        self._publisher.publish()
        self.observation.close()
