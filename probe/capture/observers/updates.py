"""Watches what the optimizer's step does to the weights, on a fixed sample of their elements, and how many gradients are zero.

Shapes: N parameter tensors, R sampled elements, U units.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from probe.capture.buffer import StepBuffer
from probe.capture.cells import Cell
from probe.capture.observer import StepEnd, Watcher
from probe.capture.totals import Totals
from probe.foreign.sharding import is_sharded
from probe.measure.element_sample import Spot, can_take, choose_spots, elements, take
from probe.measure.from_host import from_host
from probe.sites.parts import Division, Weight

MOST = 65_536
"""Sampled elements of all parameters together; fewer where a 16th of the budget does not hold them."""

ZERO_COLUMNS = ("zero", "gradients")
"""Elements whose gradient is exactly 0, and elements of tensors that have a gradient, as many as the sampled ones stand for."""

UPDATE_COLUMNS = ("moved", "weights", "unchanged", "compared", "elements", "nonfinite")
"""Sums of the squares of what the step added, and of the weights before it; elements with a gradient other than 0 that it left as they
were, and all such elements; all elements; whether the sums are not finite. As many as the sampled ones stand for."""

SAMPLED = "updates/sampled"
"""Fact: sampled elements of each unit."""

UPDATES = "updates"
"""The key of the reason why updates were not measured."""

_BYTES = 40  # an element: weights, units, what it stands for, a mask, and one temporary
_SHARE_OF_BUDGET = 16


def zero_cell(part: str, layer: str) -> str:
    """Return the name of the cell of one unit with its zero gradients."""
    return f"zero_gradients:{part}/{layer}"


def update_cell(part: str, layer: str) -> str:
    """Return the name of the cell of one unit with its update."""
    return f"update:{part}/{layer}"


@dataclass(slots=True)
class _Sample:
    """The sampled elements on one device in one step.

    ``strides`` are those of the parameters: one that has others afterwards has its elements elsewhere.
    """

    weights: list[Weight]
    spots: list[Spot]
    strides: list[tuple[tuple[int, ...], tuple[int, ...]]]
    unit_R: Tensor
    stands_for_R: Tensor
    nonzero_R: Tensor
    old_R: Tensor | None = None


class UpdateWatcher(Watcher):
    """Copies a sample of the weights before the optimizer's step and compares it with the same elements after it.

    Which elements is decided by the sizes of the tensors alone. Sums are weighted by what each element stands for, so that they estimate
    those over all elements. The number of kernels does not depend on the number of tensors; no wait for the device. The samples are freed
    after the optimizer's step, or with the step's buffer.
    """

    name = "updates"

    def __init__(self, division: Division) -> None:
        """Watch the parameters of this division."""
        self._division = division
        self._spots: dict[tuple[tuple[int, int], ...], tuple[Spot, ...]] = {}
        self._taken: WeakKeyDictionary[Totals, list[_Sample]] = WeakKeyDictionary()

    def cells(self) -> Sequence[Cell]:
        """Return two cells a unit."""
        units = self._division.units
        zeros = [Cell(zero_cell(unit.part, unit.layer), maxima=ZERO_COLUMNS) for unit in units]
        return [*zeros, *(Cell(update_cell(unit.part, unit.layer), maxima=UPDATE_COLUMNS) for unit in units)]

    def step_end(self, end: StepEnd, buffer: StepBuffer) -> None:
        """Choose the sample, and count the gradients in it that are 0."""
        training = [(weight, p) for weight in self._division.weights if (p := weight.parameter) is not None and p.requires_grad]
        known = [(weight, p) for weight, p in training if not is_sharded(p) and can_take(p)]
        if not any(p.grad is not None for _, p in known):
            buffer.totals.omit(UPDATES, "no parameter that trains has a .grad of its own after the backward")
            return
        spots = self._choose(known, min(MOST, buffer.budget_bytes // _SHARE_OF_BUDGET // _BYTES))
        if not buffer.reserve(UPDATES, _BYTES * sum(spot.count for spot in spots)):
            return
        sampled = [0] * len(self._division.units)
        for (weight, _), spot in zip(known, spots):
            sampled[weight.unit] += spot.count
        buffer.totals.tell(SAMPLED, tuple(sampled))
        devices = {p.device: None for _, p in known}
        here = ([(weight, p, spot) for (weight, p), spot in zip(known, spots) if p.device == device] for device in devices)
        looked = [self._look_at_gradients(each) for each in here]
        self._taken[buffer.totals] = [sample for sample, _ in looked]
        self._add(zero_cell, [zeros for _, zeros in looked], [weight.unit for weight, _ in known], buffer.totals)

    def before_update(self, buffer: StepBuffer) -> None:
        """Copy the sampled weights."""
        for sample in self._taken.get(buffer.totals, ()):
            sample.old_R = _weights(sample)

    def after_update(self, buffer: StepBuffer) -> None:
        """Compare the sampled weights with what they were, and let go of them."""
        samples = self._taken.pop(buffer.totals, [])
        found = [total for sample in samples if (total := self._compare(sample)) is not None]
        if samples and len(found) == len(samples):
            self._add(update_cell, found, [weight.unit for sample in samples for weight in sample.weights], buffer.totals)
        elif samples:
            buffer.totals.omit(UPDATES, "the optimizer's step put parameters of another form in the place of those before it")
        buffer.release(_BYTES * sum(sample.unit_R.numel() for sample in samples))

    def _compare(self, sample: _Sample) -> Tensor | None:
        """Return ``UPDATE_COLUMNS`` by unit, (U, Q); ``None`` if weights do not correspond to those before."""
        new_R, old_R = _weights(sample), sample.old_R
        if new_R is None or old_R is None:
            return None
        stands_for_R = sample.stands_for_R
        compared_R = stands_for_R * sample.nonzero_R
        rows = [(new_R - old_R).square() * stands_for_R, old_R.square() * stands_for_R]
        total = self._by_unit(torch.stack([*rows, compared_R * (new_R == old_R), compared_R, stands_for_R]), sample.unit_R)
        bad_U1 = ~torch.isfinite(total).all(dim=1, keepdim=True)
        return torch.cat([total.masked_fill(bad_U1, 0.0), bad_U1.to(total.dtype)], dim=1)

    def _choose(self, known: Sequence[tuple[Weight, Tensor]], most: int) -> tuple[Spot, ...]:
        key = tuple((elements(p), weight.unit) for weight, p in known)
        if key not in self._spots:
            self._spots = {key: choose_spots([size for size, _ in key], [unit for _, unit in key], most=most)}
        return self._spots[key]

    def _look_at_gradients(self, here: Sequence[tuple[Weight, Tensor, Spot]]) -> tuple[_Sample, Tensor]:
        """Take the sampled gradients of one device, and add up ``ZERO_COLUMNS`` by unit; a tensor without a gradient takes no part."""
        device, spots = here[0][1].device, [spot for _, _, spot in here]
        gradients = [p.grad if p.grad is not None and _alike(p.grad, p) else None for _, p, _ in here]
        nothing = torch.zeros(max(spot.count for spot in spots), device=device)
        gradient_R = take(
            [nothing if g is None else g for g in gradients],
            [Spot(spot.count, 1, 0) if g is None else spot for g, spot in zip(gradients, spots)],
        )
        each = [elements(p) / spot.count if spot.count else 0.0 for _, p, spot in here]
        with_gradient = [0.0 if g is None else weight for g, weight in zip(gradients, each)]
        rows = from_host([[float(weight.unit) for weight, _, _ in here], each, with_gradient], gradient_R.dtype, device)
        repeats = from_host([spot.count for spot in spots], torch.int64, device)
        unit_R, stands_for_R, gradients_R = rows.repeat_interleave(repeats, dim=1, output_size=gradient_R.numel()).unbind(0)
        zero_R = gradients_R * (gradient_R == 0)
        strides = [(tuple(p.shape), p.stride()) for _, p, _ in here]
        sample = _Sample([w for w, _, _ in here], spots, strides, unit_R.long(), stands_for_R, gradient_R != 0)
        return sample, self._by_unit(torch.stack([zero_R, gradients_R]), sample.unit_R)

    def _by_unit(self, rows: Tensor, unit_R: Tensor) -> Tensor:
        """Add up columns of (Q, R) by unit: (U, Q)."""
        total = torch.zeros((rows.shape[0], len(self._division.units)), dtype=rows.dtype, device=rows.device)
        return total.index_add_(1, unit_R, rows).t()

    def _add(self, cell: Callable[[str, str], str], matrices: Sequence[Tensor], mine: Collection[int], totals: Totals) -> None:
        """Add the sums of all devices to the cells of those units that have a share in them."""
        total = matrices[0]
        for matrix in matrices[1:]:
            total = total + matrix.to(total.device, non_blocking=True)
        units, wanted = self._division.units, set(mine)
        totals.add_rows([cell(unit.part, unit.layer) if index in wanted else None for index, unit in enumerate(units)], maxima=total)


def _weights(sample: _Sample) -> Tensor | None:
    """Return the sampled weights as they are now; ``None`` if a parameter is gone or lies otherwise in memory."""
    parameters = [weight.parameter for weight in sample.weights]
    found = [p for p, form in zip(parameters, sample.strides) if p is not None and (tuple(p.shape), p.stride()) == form]
    return take(found, sample.spots) if len(found) == len(parameters) else None


def _alike(gradient: Tensor, parameter: Tensor) -> bool:
    # Of a sparse gradient newer torch has strides of 0, and older raises.
    return gradient.layout is torch.strided and gradient.stride() == parameter.stride()
