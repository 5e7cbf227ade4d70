"""The probe of one model: what it found, what it saw last, and the training it observes."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

from torch import nn

from probe.capture.buffer import StepBuffer
from probe.errors import AttachError
from probe.merge.ranks import FAILED, agree
from probe.records import StepRecord
from probe.registry import Registry
from probe.settings import Options
from probe.sinks.terminal import TerminalSink
from probe.sites.discovery import SiteMap, discover
from probe.trainer.loop import LoopSession
from probe.trainer.record_callback import RecordCallback
from probe.trainer.session import TrainerSession

MakeCallbacks = Callable[[int], Sequence[RecordCallback]]


@dataclass(slots=True)
class Sightings:
    """What became of an attached probe: enough to say, at the end, why there is nothing to see.

    It holds neither the model nor the probe, so that it outlives both.
    """

    model: str
    sessions: int = 0
    steps: int = 0
    forwards: bool = False
    failures: list[str] = field(default_factory=list)
    others: list[str] = field(default_factory=list)
    told: bool = False

    def tell(self, say: Callable[[str], None]) -> None:
        """Say, once, that no training forward was seen, and what was tried; nothing if one was."""
        if self.forwards or self.told:
            return
        self.told = True
        if self.failures:
            tried = "; ".join(self.failures)
        elif self.sessions:
            tried = (
                f"training began {self.sessions} times, hooks stood in {self.steps} sampled steps, and the model's forward was not called "
                "with gradients enabled inside training_step"
            )
        elif self.others:
            tried = f"training began on {', '.join(self.others)}, and none of these contains the attached {self.model}"
        else:
            tried = "no Trainer began training after attach (CallbackHandler.on_train_begin was watched), and p.step() was not used"
        say(f"attached to {self.model}, but no training forward was seen: {tried}")


class Probe:
    """Observes the training of one model. Made by :func:`probe.attach`.

    It holds the model weakly. Usable as a context manager, which detaches at the end.
    """

    def __init__(self, model: nn.Module, options: Options, *, callbacks: MakeCallbacks, enabled: bool = True) -> None:
        """Find the sites; nothing is hooked or patched.

        Args:
            model: The model.
            options: What was asked for.
            callbacks: Makes, for a cadence, the callbacks that a Trainer may lack.
            enabled: ``False`` makes a probe that does nothing (``PROBE=0``).

        Raises:
            SiteError: if ``options.sites`` names what the model does not have.
        """
        self.options = options
        self.last: StepRecord | None = None
        self._enabled = enabled
        self._model = weakref.ref(model)
        self._callbacks = callbacks
        self._terminal = TerminalSink()
        self._trainer_session: weakref.ref[TrainerSession] | None = None
        self._loop: LoopSession | None = None
        self._sites = discover(model, choices=options.sites).sites if enabled else SiteMap((), {"model": "PROBE=0 turns the probe off"})
        self._idle = StepBuffer(budget_bytes=0, sites=tuple(site.name for site in self._sites.sites))
        self.sightings = Sightings(type(model).__name__)
        if enabled:
            weakref.finalize(model, self.sightings.tell, self._terminal.say)  # when the model goes, or the process

    def __repr__(self) -> str:
        """Say what it is attached to, and what it has seen."""
        model = self._model()
        state = "off (PROBE=0)" if not self._enabled else f"last record: step {self.last.step}" if self.last else "no record yet"
        return f"<Probe of {type(model).__name__ if model is not None else 'a model that is gone'}, {len(self._sites)} sites, {state}>"

    @property
    def sites(self) -> SiteMap:
        """What was found, role by role, and what was not, and why. Found again when training begins."""
        return self._sites

    @property
    def buffer(self) -> StepBuffer:
        """The step buffer: filled from a sampled step's first forward until the next step begins; empty at other times."""
        session = self._session()
        return self._idle if session is None else session.observation.buffer

    def begin(self, trainer: Any) -> None:
        """Observe a Trainer that begins training now. An error is said, and the training goes on unobserved."""
        session, model = self._session(), self._model()
        if session is not None:
            self._end(session)
        self.sightings.sessions += 1
        try:
            session = TrainerSession(
                trainer,
                self.options,
                attached=trainer.model if model is None else model,
                missing=self._callbacks(self.options.every),
                keep=self._keep,
                terminal=self._terminal,
            )
        except Exception as error:
            self._failed(error)
            return
        if session.observation.window.closed:
            self.sightings.failures.append(session.observation.window.closed)
        self._sites = session.observation.discovery.sites
        self._trainer_session = weakref.ref(session)

    def observes(self, trainer: Any) -> bool:
        """Tell whether this Trainer's current ``train()`` call is observed by this probe, or was tried."""
        session = self._trainer_session() if self._trainer_session else None
        return (session is not None and session.trainer is trainer) or bool(self.sightings.failures)

    @contextmanager
    def step(self) -> Iterator[None]:
        """Observe one optimizer step of a hand-written loop: forwards, backwards, update. Every ``every``-th is sampled, and the first.

        Its record is published when the next step begins, or at :meth:`detach`.

        Raises:
            AttachError: if the model is gone, or the probe was detached.
        """
        if not self._enabled:
            yield
            return
        if self._loop is None:
            model = self._model()
            if model is None or REGISTRY.get(model) is not self:
                raise AttachError("p.step() on a probe that is not attached: call probe.attach(model) again")
            shows = [callback.section for callback in self._callbacks(self.options.every)]
            self._loop = LoopSession(model, self.options, shows=shows, keep=self._keep, terminal=self._terminal)
            self._sites = self._loop.observation.discovery.sites
            self.sightings.sessions += 1
        with self._loop.step():
            yield
        self.sightings.forwards = self.sightings.forwards or self._loop.forwards_seen

    def detach(self) -> None:
        """Leave model, Trainer and callback list as they were before. Publishes what waits. May be called twice."""
        model, session = self._model(), self._session()
        if session is not None:
            self._end(session)
        if model is not None and REGISTRY.get(model) is self:
            REGISTRY.remove(model)
        if self._enabled:
            self.sightings.tell(self._terminal.say)

    def __enter__(self) -> Probe:
        """Return the probe."""
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """Detach."""
        self.detach()

    def _session(self) -> TrainerSession | LoopSession | None:
        if self._loop is not None:
            return self._loop
        return None if self._trainer_session is None else self._trainer_session()

    def _end(self, session: TrainerSession | LoopSession) -> None:
        with session.observation.breaker.guard("publication"):
            session.close()
        self._trainer_session = self._loop = None

    def _keep(self, record: StepRecord, seen: bool) -> None:
        self.last = record
        self.sightings.steps += 1
        self.sightings.forwards = self.sightings.forwards or seen

    def _failed(self, error: Exception) -> None:
        reason = f"{type(error).__name__}: {error}"
        self.sightings.failures.append(f"observing failed: {reason}")
        self._terminal.say(f"this training is not observed, because observing it failed at its begin: {reason}")
        agree(f"{FAILED}{reason}")  # or the other ranks would wait for this one


REGISTRY: Registry[Probe] = Registry()
"""The one piece of module state of the package: the probe of each model that has one."""
