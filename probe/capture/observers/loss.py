"""Watches the loss that was backpropagated: what ``training_step`` returned, micro-batch by micro-batch."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from probe.capture.buffer import StepBuffer
from probe.capture.cells import Cell
from probe.capture.observer import StepEnd, Watcher

CELL = Cell("loss", counts=("micro_batches",), sums=("loss",))


class LossWatcher(Watcher):
    """Sums the returned losses of a step (the host averages over ranks), and tells the learning rates."""

    name = "loss"

    def cells(self) -> Sequence[Cell]:
        """Return the one cell."""
        return (CELL,)

    def training_step(self, loss: Tensor | None, buffer: StepBuffer) -> None:
        """Add one micro-batch's loss (the mean over its elements where a wrapper returned one a device)."""
        if loss is None:
            buffer.totals.omit("probe/loss", "training_step returned no tensor")
            return
        buffer.totals.add(CELL.name, counts=(1,), sums=loss.detach().double().mean().reshape(1))

    def step_end(self, end: StepEnd, buffer: StepBuffer) -> None:
        """Tell the learning rates that this step uses."""
        buffer.totals.tell("learning_rates", end.learning_rates)
