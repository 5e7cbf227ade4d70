"""Watches the loss: what ``training_step`` returned, what the model's own output says of it, and how many labels there were."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from probe.capture.buffer import StepBuffer
from probe.capture.cells import Cell
from probe.capture.microbatch import MicroBatch, named_output
from probe.capture.observer import Call, StepEnd, Watcher
from probe.sites.labels import AUDIO_LABELS, IGNORED, TEXT_LABELS

ABSENT = ("no labels among the inputs", "no audio labels among the inputs")
"""How :mod:`probe.sites.labels` begins to say that a micro-batch has no labels for a head, which is no failure to score it."""

CELL = Cell(
    "loss",
    counts=("micro_batches", "with_items", "unscored"),
    sums=("loss", "items", "nonfinite"),
    maxima=("first_nonfinite",),
)
"""What ``training_step`` returned: calls, and calls that were given ``num_items_in_batch``; ranks on which some head could not be scored
(their reasons stay with them, and the sums of all ranks lack their labels); sums of loss and items; NaN or Inf losses, and the index of
the first micro-batch that had one (as a minimum)."""

OUTPUT_CELL = Cell(
    "loss:output",
    counts=("with_loss", "with_auxiliary", "with_text_labels", "with_labels_key", "with_audio_labels"),
    sums=("loss", "auxiliary", "labels", "masked"),
)
"""What the root's output holds: its own ``loss`` and ``aux_loss``; in how many micro-batches there were text labels, labels under the name
that the Trainer looks for, audio labels; text labels that are not -100, and micro-batches without a label to learn from."""


class LossWatcher(Watcher):
    """Sums the losses of a step (the host averages over ranks), and tells the learning rates."""

    name = "loss"

    def cells(self) -> Sequence[Cell]:
        """Return the two cells."""
        return (CELL, OUTPUT_CELL)

    def sites(self) -> Sequence[str]:
        """Return the root."""
        return ("",)

    def leave(self, call: Call, buffer: StepBuffer) -> None:
        """See the model's own losses, and count the labels that came with the micro-batch."""
        micro = call.micro
        if call.output is None:
            return
        losses = (_scalar(output_loss(micro)), _scalar(named_output(micro.output, "aux_loss")))
        text, audio = _first(micro.inputs, TEXT_LABELS), _first(micro.inputs, AUDIO_LABELS)
        device = next((one.device for one in (*losses, text, audio) if one is not None), None)
        if device is None:
            return
        nothing = torch.zeros((), dtype=torch.float64, device=device)
        labels, audio_labels = (nothing if one is None else _labelled(one).to(device, non_blocking=True) for one in (text, audio))
        masked = (labels + audio_labels == 0).double() if text is not None or audio is not None else nothing
        values = [nothing if one is None else one.to(device, non_blocking=True) for one in losses]
        named = isinstance(micro.batch.get("labels"), Tensor)
        buffer.totals.add(
            OUTPUT_CELL.name,
            counts=[float(value is not None) for value in losses] + [float(text is not None), float(named), float(audio is not None)],
            sums=torch.stack([*values, labels, masked]),
        )

    def training_step(self, loss: Tensor | None, items: Tensor | float | None, buffer: StepBuffer) -> None:
        """Add one micro-batch's loss (the mean over its elements where a wrapper returned one a device)."""
        if loss is None:
            buffer.totals.omit("probe/loss", "training_step returned no tensor")
            return
        value = loss.detach().double().mean()
        index = buffer.totals.counts[CELL.name][0]
        bad = ~torch.isfinite(value)
        first = torch.where(bad, -index, -torch.inf).double()
        counted = torch.zeros_like(value) if items is None else _on(value, items)
        buffer.totals.add(
            CELL.name, counts=(1, items is not None), sums=torch.stack([value, counted, bad.double()]), maxima=first.reshape(1)
        )
        buffer.totals.tell("loss_dtype", str(loss.dtype).removeprefix("torch."))

    def step_end(self, end: StepEnd, buffer: StepBuffer) -> None:
        """Tell the learning rates that this step uses, and whether some head of this rank could not be scored in it."""
        unscored = any(name.startswith("head:") and not why.startswith(ABSENT) for name, why in buffer.totals.reasons.items())
        buffer.totals.add(CELL.name, counts=(0, 0, unscored))
        buffer.totals.tell("learning_rates", end.learning_rates)


def output_loss(micro: MicroBatch) -> Any:
    """Return what the Trainer would take for the loss in the root's output: ``output["loss"]``, or the first of a tuple."""
    if isinstance(micro.output, tuple):
        return micro.output[0] if micro.output else None
    return named_output(micro.output, "loss")


def _scalar(value: Any) -> Tensor | None:
    """Return a number as a float64 0-dim tensor; ``None`` for anything else."""
    return value.detach().double().reshape(()) if isinstance(value, Tensor) and value.numel() == 1 and value.is_floating_point() else None


def _first(inputs: Mapping[str, Any], names: Sequence[str]) -> Tensor | None:
    return next((inputs[name] for name in names if isinstance(inputs.get(name), Tensor) and inputs[name].numel()), None)


def _labelled(labels: Tensor) -> Tensor:
    return (labels.detach() != IGNORED).sum().double()


def _on(like: Tensor, items: Tensor | float) -> Tensor:
    """Return the number of items beside ``like``, without waiting (the mean, where a tensor holds one number for each device)."""
    if isinstance(items, Tensor):
        return items.detach().to(like.device, torch.float64, non_blocking=True).mean()
    return torch.full_like(like, float(items))
