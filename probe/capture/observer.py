"""The seam between hooks and measurements: what an observer is, and the call of a site that it is shown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor, nn

from probe.capture.buffer import StepBuffer
from probe.capture.cells import Cell
from probe.capture.microbatch import MicroBatch
from probe.records import Site


@dataclass(slots=True)
class Call:
    """One call of one site inside a training forward.

    ``output`` is ``None`` until the call returns, and stays ``None`` if it raised. ``notes`` carries what an observer wants to find
    again when the call returns, by the observer's name; ``entered`` holds contexts that an observer opened round the call. Whoever calls
    the observers closes it, before any observer sees the call's end, and even if one of them is off by then or fails.
    """

    site: Site
    module: nn.Module
    micro: MicroBatch
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    output: Any = None
    notes: dict[str, Any] = field(default_factory=dict)
    entered: ExitStack = field(default_factory=ExitStack)


@dataclass(frozen=True, slots=True)
class StepEnd:
    """What is known when the last backward of a step is done and its gradients are not yet clipped.

    Attributes:
        loss_scale: The gradient scaler's factor (0-dim tensor on the device) that gradients still carry, or ``None``.
        learning_rates: One a parameter group, as this step uses them; empty if they are not known on the host.
    """

    loss_scale: Tensor | None = None
    learning_rates: tuple[float, ...] = ()


class Observer(Protocol):
    """One concern that watches some sites.

    Its methods run inside the training forward: on the device's stream, under ``no_grad``, with no wait for the device, no random
    number, no collective, and nothing kept alive beyond what the buffer's budget admits. An exception switches the observer off.
    """

    name: str

    def cells(self) -> Sequence[Cell]:
        """Return the cells it adds to: the same list on every rank, whatever the data."""

    def sites(self) -> Sequence[str]:
        """Return the names of the sites whose calls it wants to see ("" is the root)."""

    def enter(self, call: Call, buffer: StepBuffer) -> None:
        """See a call before the module's forward runs."""

    def leave(self, call: Call, buffer: StepBuffer) -> None:
        """See a call after the module's forward returned or raised (then ``call.output`` is ``None``)."""

    def training_step(self, loss: Tensor | None, items: Tensor | float | None, buffer: StepBuffer) -> None:
        """See what ``training_step`` returned for one micro-batch, after its backward, and the ``num_items_in_batch`` it was given."""

    def step_end(self, end: StepEnd, buffer: StepBuffer) -> None:
        """See the end of the last backward of the step, before clipping."""

    def before_update(self, buffer: StepBuffer) -> None:
        """See the moment before the optimizer's step: gradients are clipped, weights are old. Not called without a Trainer."""

    def after_update(self, buffer: StepBuffer) -> None:
        """See the moment after the optimizer's step: weights are new. Not called without a Trainer."""


class Watcher:
    """An observer's default behaviour: no cells, no sites, nothing done. Observers override what they need.

    ``on_host`` names those of its methods that put no work on the device, so that nothing is recorded there to time them.
    """

    name = ""
    on_host: frozenset[str] = frozenset()

    def cells(self) -> Sequence[Cell]:
        """Return no cells."""
        return ()

    def sites(self) -> Sequence[str]:
        """Return no sites."""
        return ()

    def enter(self, call: Call, buffer: StepBuffer) -> None:
        """Do nothing."""

    def leave(self, call: Call, buffer: StepBuffer) -> None:
        """Do nothing."""

    def training_step(self, loss: Tensor | None, items: Tensor | float | None, buffer: StepBuffer) -> None:
        """Do nothing."""

    def step_end(self, end: StepEnd, buffer: StepBuffer) -> None:
        """Do nothing."""

    def before_update(self, buffer: StepBuffer) -> None:
        """Do nothing."""

    def after_update(self, buffer: StepBuffer) -> None:
        """Do nothing."""


def main_tensor(output: Any) -> Tensor | None:
    """Return the tensor that a module's output is about: itself, ``last_hidden_state``, or its first tensor."""
    if isinstance(output, Tensor):
        return output
    named = getattr(output, "last_hidden_state", None)
    if isinstance(named, Tensor):
        return named
    parts = output.values() if isinstance(output, Mapping) else output if isinstance(output, (tuple, list)) else ()
    return next((part for part in parts if isinstance(part, Tensor)), None)
