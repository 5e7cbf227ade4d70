"""Several ``Trainer.train()`` calls in one thread, each held at the beginning of its next step until it is told to go on.

Each call runs in a greenlet of its own; a callback hands control back at ``on_step_begin``. What lies between two such moments is one
whole step of the Trainer: callbacks, forward, backward, the optimizer, the end of the step, and the next batch.
"""

from __future__ import annotations

import random
import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from greenlet import greenlet
from torch.overrides import _get_current_function_mode_stack
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack
from transformers import Trainer, TrainerCallback, set_seed


class UnbalancedError(RuntimeError):
    """A step left a mode of torch behind, which every other contender would then run under."""


@dataclass(frozen=True)
class Generators:
    """The states of all global random generators."""

    python: Any
    numpy: Any
    torch: torch.Tensor
    cuda: tuple[torch.Tensor, ...]

    @classmethod
    def now(cls) -> Generators:
        """Return the present states."""
        cuda = tuple(torch.cuda.get_rng_state_all()) if torch.cuda.is_available() else ()
        return cls(random.getstate(), np.random.get_state(), torch.get_rng_state(), cuda)

    def restore(self) -> None:
        """Make these the present states."""
        random.setstate(self.python)
        np.random.set_state(self.numpy)
        torch.set_rng_state(self.torch)
        if self.cuda:
            torch.cuda.set_rng_state_all(list(self.cuda))


class Turn(TrainerCallback):
    """Gives control back to the hub whenever a step is about to begin."""

    def __init__(self) -> None:
        self.hub: greenlet | None = None
        self.last = False

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        """Wait for the next turn; the last turn ends training after its step."""
        if self.hub is not None and not self.last:
            self.hub.switch()
            control.should_training_stop = self.last
        return control

    def __deepcopy__(self, memo: dict[int, Any]) -> Turn:
        """Return one that waits for nobody."""
        return Turn()


class Runner:
    """One ``train()`` call that goes step by step.

    It has random generators of its own, so that it draws what it would draw alone.
    """

    def __init__(self, trainer: Trainer, *, seed: int) -> None:
        self.trainer = trainer
        self.steps = 0
        self._turn = Turn()
        self._train = greenlet(lambda *_: trainer.train())
        self._ended = False
        trainer.add_callback(self._turn)
        outside = Generators.now()
        set_seed(seed)
        self._generators = Generators.now()
        outside.restore()

    def start(self) -> None:
        """Run to the beginning of the first step."""
        self._turn.hub = greenlet.getcurrent()
        self._switch()

    def step(self) -> float:
        """Run one step and return how many seconds it took; on a GPU with all of its work.

        Raises:
            RuntimeError: if training ended by itself.
            UnbalancedError: if the step left a mode of torch behind.
        """
        took = self._switch()
        self.steps += 1
        if self._ended:
            raise RuntimeError("training ended before it was told to")
        return took

    def stop(self) -> None:
        """Let the Trainer do the step that it is at, and end. Does nothing if training has ended or never began."""
        if self._ended or not self._train:
            return
        self._turn.last = True
        self._switch()
        self.steps += 1
        if not self._ended:
            raise RuntimeError("training went on after it was told to stop")

    def _switch(self) -> float:
        outside, modes = Generators.now(), _modes()
        self._generators.restore()
        try:
            _synchronize()
            begin = time.perf_counter()
            self._train.switch()
            _synchronize()
            took = time.perf_counter() - begin
        finally:
            self._ended = self._train.dead
            self._generators = Generators.now()
            outside.restore()
        if _modes() != modes:
            raise UnbalancedError(f"a step began under {modes} and left {_modes()}")
        return took


def _modes() -> tuple[Any, ...]:
    autocast = tuple(torch.is_autocast_enabled(device) for device in ("cpu", "cuda"))
    stacks = (len(_get_current_function_mode_stack()), len(_get_current_dispatch_mode_stack()))
    return (torch.is_grad_enabled(), torch.is_inference_mode_enabled(), *autocast, *stacks)


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
