"""Watches gradients: their norm part by part before clipping, and the gradient that reaches the audio encoder's output."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from probe.capture.breaker import Breaker
from probe.capture.buffer import StepBuffer
from probe.capture.cells import Cell
from probe.capture.observer import Call, StepEnd, Watcher, main_tensor
from probe.foreign.sharding import is_sharded
from probe.measure.norms import sum_of_squares
from probe.records import Site

OUTPUT_CELL = Cell("output_gradient", counts=("calls",), sums=("sum_of_squares",))
REST = "rest"


def part_cell(part: str) -> str:
    """Return the name of the cell of one part."""
    return f"gradient:{part}"


@dataclass(frozen=True, slots=True)
class PartParameters:
    """The parameters of one part of the model; each parameter belongs to the first part that claims it."""

    name: str
    parameters: tuple[nn.Parameter, ...]

    @property
    def elements(self) -> int:
        """Number of elements, trainable or not."""
        return sum(p.numel() for p in self.parameters)

    @property
    def trainable(self) -> int:
        """Number of elements that train."""
        return sum(p.numel() for p in self.parameters if p.requires_grad)


def parts_of(model: nn.Module, sites: Sequence[Site], modules: Mapping[str, nn.Module]) -> tuple[PartParameters, ...]:
    """Split a model's parameters into projector, audio encoder, heads and the rest, in this order of claim."""
    claims = [("projector", "projector"), ("audio_encoder", "audio_encoder"), ("lm_head", "lm_head")]
    taken: set[int] = set()
    parts = []
    for name, role in claims:
        mine: list[nn.Parameter] = []
        for site in sites:
            if site.role == role:
                mine += [p for p in modules[site.name].parameters() if id(p) not in taken]
                taken.update(map(id, mine))
        unique = tuple({id(p): p for p in mine}.values())
        if unique:
            parts.append(PartParameters(name, unique))
    rest = tuple(p for p in model.parameters() if id(p) not in taken)
    return (*parts, PartParameters(REST, rest)) if rest else tuple(parts)


class GradientWatcher(Watcher):
    """Reads ``.grad`` after the last backward of a step, before clipping; and hooks the encoder's output tensor for its gradient.

    After the backward every rank of DDP holds the same gradients, so parts combine over ranks by maximum, not by sum. Two tensor
    operations a part and device; no wait for the device.
    """

    name = "gradients"

    def __init__(self, parts: Sequence[PartParameters], sites: Sequence[Site], breaker: Breaker) -> None:
        """Watch these parts, and the audio encoders among the sites; the breaker guards what runs inside the backward."""
        self._parts = parts
        self._breaker = breaker
        self._encoders = tuple(site.name for site in sites if site.role == "audio_encoder")

    def cells(self) -> Sequence[Cell]:
        """Return a cell a part, and one for the encoder's output."""
        return [OUTPUT_CELL, *(Cell(part_cell(part.name), maxima=("sum_of_squares", "without_gradient")) for part in self._parts)]

    def sites(self) -> Sequence[str]:
        """Return the audio encoders."""
        return self._encoders

    def leave(self, call: Call, buffer: StepBuffer) -> None:
        """Ask for the gradient of the encoder's output: autograd runs the tensor hook in the backward, and adds no node for it."""
        output = main_tensor(call.output)
        if output is None or not output.requires_grad:
            buffer.totals.omit("encoder_output_gradient", "the encoder's output needs no gradient: nothing before it trains")
            return
        totals = buffer.totals

        def see(gradient: Tensor) -> None:
            with self._breaker.guard(self.name, "the encoder's output"), torch.no_grad():
                totals.add(OUTPUT_CELL.name, counts=(1,), sums=sum_of_squares([gradient.detach()]).reshape(1))

        output.register_hook(see)  # type: ignore[no-untyped-call]

    def step_end(self, end: StepEnd, buffer: StepBuffer) -> None:
        """Sum the squares of each part's gradients."""
        scale = None if end.loss_scale is None else end.loss_scale.double()
        if scale is not None:
            buffer.totals.put("loss_scale", scale)  # one number, without which gradients could not be read: not asked of the budget
        for part in self._parts:
            self._add_part(part, scale, buffer)

    def _add_part(self, part: PartParameters, scale: Tensor | None, buffer: StepBuffer) -> None:
        what = f"probe/grad/{part.name}/norm"
        training = [p for p in part.parameters if p.requires_grad]
        gradients = [p.grad for p in training if p.grad is not None]
        if not training:
            buffer.totals.omit(what, f"frozen: none of the {len(part.parameters)} parameters of this part requires a gradient")
            return
        if any(is_sharded(p) for p in training):
            buffer.totals.omit(what, "sharded parameters: this rank holds only a part of each gradient")
            return
        if not gradients:
            buffer.totals.omit(what, f"none of the {len(training)} parameters that train has a .grad after the backward")
            return
        squares = sum_of_squares(gradients)
        if scale is not None:
            squares = squares / (scale.to(squares.device, non_blocking=True) ** 2)
        missing = torch.full_like(squares, len(training) - len(gradients))
        buffer.totals.add(part_cell(part.name), maxima=torch.stack([squares, missing]))
