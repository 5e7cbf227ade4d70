"""What trains a model in the benchmark: a plain Trainer, and the same with the probe in its different settings."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

import probe
from benchmarks.overhead.competitors import COMPETITORS, Companion

NEVER = 10**9
FEATURES = {
    "statistics": ("statistics",),
    "attention rows": ("attention",),
    "heads and loss": ("heads", "loss"),
    "gradients and updates": ("gradients", "activation_gradients", "reference_gradient", "updates"),
    "inputs and checks": ("inputs", "modality", "checks", "audio_checks", "branches", "modes", "adapters"),
}


@dataclass(frozen=True)
class Contender:
    """One way to train.

    Attributes:
        name: Its key on the command line and in the results.
        title: How the page calls it.
        gives: What one has of it after a step.
        companion: Makes what accompanies its training.
        attention: The attention implementation its model needs.
        often: Whether it has as many pairs as there are rounds, or the few of most contenders.
        most: Pairs beyond which no more are asked for, where there are hundreds of rounds.
        apart: Whether it changes the process round it, so that it is measured after all others, against a plain Trainer of its own.
        short: Whether it takes part beside short steps only: it needs hundreds of pairs.
        every: The cadence whose cycle its figure is the mean of; 0: the figure is the median over all its steps.
    """

    name: str
    title: str
    gives: str
    companion: Callable[[], Companion]
    attention: str = "sdpa"
    often: bool = False
    most: int = NEVER
    apart: bool = False
    short: bool = False
    every: int = 0


class Watched(Companion):
    """The probe with everything on, or with some observers only."""

    warm_up = 2
    """The first step of a training is always sampled; its record is published in the second."""

    def __init__(self, *, every: int, passes: int = 0, only: Sequence[str] | None = None) -> None:
        self.every = every
        self._passes, self._only = passes, only
        self._folder = tempfile.TemporaryDirectory(prefix="probe-benchmark-")
        self.probe: Any = None

    def open(self, model: nn.Module) -> None:
        """Attach."""
        settings = probe.Settings(terminal=False, run_folder=self._folder.name, counterfactual_every=self._passes)
        self.probe = probe.attach(model, every=self.every, settings=settings)

    def begun(self) -> None:
        """Switch off what is not measured, as an error in it would."""
        if self._only is not None:
            observation = self.probe._session().observation
            for observer in observation._observers:
                if observer.name not in self._only:
                    observation.breaker.failures[observer.name] = "left out by the benchmark"

    def troubles(self) -> list[str]:
        """Return which parts of the probe failed, which would make it cheaper than it is."""
        session = self.probe._session()
        failures = session.observation.breaker.failures if session is not None else {}
        return [f"{part}: {reason}" for part, reason in failures.items() if reason != "left out by the benchmark"]

    def records(self) -> list[Any]:
        """Return the records that the run folder holds by now."""
        return list(probe.load(self._folder.name).records) if (Path(self._folder.name) / "run.json").exists() else []

    def close(self) -> None:
        """Detach."""
        if self.probe is not None:
            self.probe.detach()
        self._folder.cleanup()


def plain() -> Contender:
    """Return what all others are compared with."""
    return Contender("plain", "plain Trainer", "", Companion, often=True)


def contenders() -> list[Contender]:
    """Return all of them, the plain one left out."""
    mine = "the probe, "
    everything = "every number of the metrics page"
    found = [
        Contender("again", "plain Trainer, a second copy", "the noise of the comparison", Companion, often=True, short=True),
        Contender("idle", f"{mine}unsampled step", "", lambda: Watched(every=NEVER), often=True),
        Contender("sampled", f"{mine}sampled step, everything on", everything, lambda: Watched(every=1), often=True, most=60),
        Contender("passes", f"{mine}sampled step with counterfactual passes", everything, lambda: Watched(every=1, passes=1)),
    ]
    for every, most in ((10, 104), (100, 304)):
        title = f"{mine}every {every}th step"
        beside = partial(Watched, every=every)
        found.append(Contender(f"every-{every}", title, everything, beside, often=True, most=most, short=True, every=every))
    for feature, parts in FEATURES.items():
        title = f"{mine}sampled step, {feature} only"
        found.append(Contender(f"only {feature}", title, feature, partial(Watched, every=1, only=parts)))
    return [*found, *(Contender(**row) for row in COMPETITORS)]
