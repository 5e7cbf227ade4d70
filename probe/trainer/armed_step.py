"""What stands in the place of ``training_step``: the Trainer's own one, observed where its step is sampled."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

from probe.capture.arguments import shallow
from probe.capture.observer import StepEnd
from probe.capture.schedule import is_sampled
from probe.foreign.trainer_private import gradient_scale, gradients_complete
from probe.observation import Observation


class ArmedStep:
    """Runs each ``training_step`` as it is, with what arguments it is given; its result and its errors are passed on.

    Attributes:
        first: Number of the first step that ran; ``None`` until then.
    """

    def __init__(self, trainer: Any, observation: Observation, *, cadences: Collection[int], failing: Callable[[], None]) -> None:
        """Observe the steps that one of the cadences samples.

        Args:
            trainer: The Trainer, whose step is the one after ``state.global_step``.
            observation: What observes.
            cadences: Every how many steps one is sampled; the first one is.
            failing: Called when a step raises, before the error goes on.
        """
        self.first: int | None = None
        self._trainer = trainer
        self._observation = observation
        self._cadences = cadences
        self._failing = failing

    def __call__(self, wrapped: Callable[..., Any], instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run one micro-batch."""
        try:
            return self._run(wrapped, args, kwargs)
        except BaseException:
            self._failing()
            raise

    def _run(self, wrapped: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        step = self._trainer.state.global_step + 1
        if self.first is None:
            self.first = step
        if not is_sampled(step, cadences=self._cadences, first=self.first):
            return wrapped(*args, **kwargs)
        with self._observation.micro_batch(step, self._batch(args, kwargs)):
            loss = wrapped(*args, **kwargs)
        with self._observation.breaker.guard("step end"):
            items = kwargs.get("num_items_in_batch", args[2] if len(args) > 2 else None)
            self._observation.after_backward(loss, self._step_end() if gradients_complete(self._trainer) else None, items=items)
        return loss

    def _batch(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Mapping[str, Any]:
        with self._observation.breaker.guard("batch"):
            return shallow(kwargs.get("inputs", args[1] if len(args) > 1 else None))
        return {}

    def _step_end(self) -> StepEnd:
        optimizer = getattr(self._trainer, "optimizer", None)
        rates = tuple(group["lr"] for group in getattr(optimizer, "param_groups", ()) if isinstance(group.get("lr"), float))
        return StepEnd(gradient_scale(self._trainer), rates)
