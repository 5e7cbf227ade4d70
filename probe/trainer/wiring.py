"""Wiring: when any Trainer begins training, the probes of the models inside it begin to observe."""

from __future__ import annotations

import os
from collections.abc import Callable

from transformers.trainer_callback import CallbackHandler

from probe.attachment import REGISTRY, Probe
from probe.foreign.trainer_private import before_every_train_begin, running_trainer
from probe.settings import Options
from probe.trainer.record_callback import RecordCallback


def is_switched_off() -> bool:
    """Tell whether ``PROBE=0`` in the environment turns everything off."""
    return os.environ.get("PROBE") == "0"


def watch_trainers() -> Callable[[], None]:
    """From now on, let probes hear of every Trainer that begins training. Returns a function that undoes it."""
    return before_every_train_begin(_train_begins)


def _train_begins(handler: CallbackHandler) -> None:
    trainer = running_trainer(handler)
    if trainer is None:
        return
    concerned = list(REGISTRY.inside(trainer.model))
    for probe in REGISTRY.all():
        if probe not in concerned:
            probe.sightings.others.append(type(trainer.model).__name__)
    for probe in concerned[1:]:
        probe.sightings.failures.append(f"a probe of {concerned[0].sightings.model}, which contains it, observes the same training")
    for probe in concerned[:1]:  # several would capture the same calls twice
        probe.begin(trainer)


def ensure_observed(callback: RecordCallback) -> None:
    """Attach a probe for a callback whose Trainer begins training now, unless one observes it already."""
    trainer = running_trainer(callback=callback)
    if trainer is None or is_switched_off():
        return
    if any(probe.observes(trainer) for probe in REGISTRY.inside(trainer.model)):
        return
    options = Options(every=callback.log_every_n_steps)
    probe = Probe(trainer.model, options, callbacks=lambda every: ())
    REGISTRY.add(trainer.model, probe, patch=watch_trainers)
    probe.begin(trainer)
