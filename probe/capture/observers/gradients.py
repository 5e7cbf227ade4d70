"""Watches the gradients of the parameters: their norm by part and layer, before clipping and as the optimizer gets them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from probe.capture.buffer import StepBuffer
from probe.capture.cells import Cell
from probe.capture.observer import StepEnd, Watcher
from probe.capture.totals import Totals
from probe.foreign.sharding import is_sharded
from probe.measure.from_host import from_host
from probe.measure.norms import squares_by_group
from probe.sites.parts import Division, UnitFacts, count

COLUMNS = ("squares", "nonfinite", "missing")
"""Sum of the squares of the finite gradients, tensors (on a CPU pieces of them) that are not finite, tensors without a ``.grad``."""

CLIPPED_COLUMNS = ("squares", "nonfinite")

LOSS_SCALE = "loss_scale"
BACKWARD_SEEN = "backward_seen"
STILL_SCALED = "still_scaled"
UNITS = "units"


def gradient_cell(part: str, layer: str) -> str:
    """Return the name of the cell of one unit before clipping."""
    return f"gradient:{part}/{layer}"


def clipped_cell(part: str, layer: str) -> str:
    """Return the name of the cell of one unit as the optimizer gets it."""
    return f"clipped:{part}/{layer}"


def note_scale(end: StepEnd, totals: Totals) -> None:
    """Keep the factor that gradients carry in fp16 training: one number, without which they could not be read (not asked of the budget)."""
    if end.loss_scale is not None:
        totals.put(LOSS_SCALE, end.loss_scale.double())


class GradientWatcher(Watcher):
    """Reads ``.grad`` after the last backward of a step, before clipping, and again before the optimizer's step.

    After the backward every rank of DDP holds the same gradients, so cells combine over ranks by maximum, not by sum. The number of
    tensor operations depends on the devices and dtypes of the gradients, not on their number; no wait for the device. Values still carry
    the factor of fp16 training (``loss_scale``, and the fact ``still_scaled`` for the clipped ones); the host divides.
    """

    name = "gradients"

    def __init__(self, division: Division) -> None:
        """Watch the parameters of this division."""
        self._division = division

    def cells(self) -> Sequence[Cell]:
        """Return two cells a unit."""
        units = self._division.units
        before = [Cell(gradient_cell(unit.part, unit.layer), maxima=COLUMNS) for unit in units]
        return [*before, *(Cell(clipped_cell(unit.part, unit.layer), maxima=CLIPPED_COLUMNS) for unit in units)]

    def step_end(self, end: StepEnd, buffer: StepBuffer) -> None:
        """Sum the squares of the gradients before clipping, and name the parts that have none."""
        totals = buffer.totals
        note_scale(end, totals)
        facts = count(self._division)
        totals.tell(UNITS, facts)
        found = _read(self._division)
        if not found.gradients and totals.facts.get(BACKWARD_SEEN):
            for part in _parts(facts):
                totals.omit(_norm(part), "a backward ran, and .grad is empty after it: the optimizer's engine (DeepSpeed, …) has taken it")
            return
        self._name_missing(facts, found, totals)
        device = found.gradients[0].device if found.gradients else next((p.device for p in found.training), torch.device("cpu"))
        matrix = torch.zeros((len(facts), 2), dtype=torch.float64, device=device)
        if found.gradients:
            matrix = torch.stack(squares_by_group(found.gradients, found.units, len(facts)), dim=1)
        missing = from_host(found.missing, matrix.dtype, matrix.device)
        self._add(gradient_cell, torch.cat([matrix, missing[:, None]], dim=1), facts, found, totals)

    def before_update(self, buffer: StepBuffer) -> None:
        """Sum the squares of the gradients as the optimizer gets them."""
        found = _read(self._division)
        facts = buffer.totals.facts.get(UNITS)
        if found.gradients and facts is not None:
            matrix = torch.stack(squares_by_group(found.gradients, found.units, len(facts)), dim=1)
            self._add(clipped_cell, matrix, facts, found, buffer.totals)

    def _add(self, cell: Callable[[str, str], str], matrix: Tensor, facts: Sequence[UnitFacts], found: _Gradients, totals: Totals) -> None:
        read = (unit.tensors and index not in found.unreadable for index, unit in enumerate(facts))
        totals.add_rows([cell(unit.part, unit.layer) if ok else None for unit, ok in zip(facts, read)], maxima=matrix)

    def _name_missing(self, facts: Sequence[UnitFacts], found: _Gradients, totals: Totals) -> None:
        for part in _parts(facts):
            mine = [index for index, unit in enumerate(facts) if unit.part == part]
            training = sum(facts[index].tensors for index in mine)
            if not training:
                tensors = sum(weight.unit in mine for weight in self._division.weights)
                totals.omit(_norm(part), f"frozen: none of the {tensors} parameters of this part requires a gradient")
            elif why := next((found.unreadable[index] for index in mine if index in found.unreadable), ""):
                totals.omit(_norm(part), why)
            elif sum(found.missing[index] for index in mine) == training:
                totals.omit(_norm(part), f"none of the {training} parameters that train has a .grad after the backward")


@dataclass(frozen=True, slots=True)
class _Gradients:
    """What training parameters hold in ``.grad``: dense tensors and their units; by unit, how many have none, and why it cannot be read."""

    training: list[Tensor]
    gradients: list[Tensor]
    units: list[int]
    missing: list[float]
    unreadable: dict[int, str]


def _read(division: Division) -> _Gradients:
    found = _Gradients([], [], [], [0.0] * len(division.units), {})
    for weight in division.weights:
        parameter = weight.parameter
        if parameter is None or not parameter.requires_grad:
            continue
        found.training.append(parameter)
        gradient = parameter.grad
        if is_sharded(parameter):
            found.unreadable[weight.unit] = "sharded parameters: this rank holds only a part of each gradient"
        elif gradient is None:
            found.missing[weight.unit] += 1
        elif gradient.layout is not torch.strided:
            found.unreadable[weight.unit] = "a sparse gradient, which is not added up before the optimizer does it"
        else:
            found.gradients.append(gradient)
            found.units.append(weight.unit)
    return found


def _parts(facts: Sequence[UnitFacts]) -> list[str]:
    return list(dict.fromkeys(unit.part for unit in facts))


def _norm(part: str) -> str:
    return f"probe/grad/{part}/norm"
