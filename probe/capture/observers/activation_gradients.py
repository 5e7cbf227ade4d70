"""Watches the gradients of activations: a tensor hook on the output of every site tells the norm of what reached it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from probe.capture.breaker import Breaker
from probe.capture.buffer import StepBuffer
from probe.capture.cells import Cell
from probe.capture.observer import Call, StepEnd, Watcher, main_tensor
from probe.capture.observers.gradients import BACKWARD_SEEN, note_scale
from probe.capture.totals import Totals
from probe.measure.norms import add_norms, norm_of
from probe.records import Site

ORDER = "activation_gradients/order"
"""Fact: the sites in the order in which their outputs were made in this step."""

_NO_GRAPH = (
    "its output needs no gradient although parameters in it train: it ran without a graph, inside a reentrant checkpoint (which builds the "
    "graph only in the backward) or under the model's own no_grad"
)
_NOTHING_BEFORE = "its output needs no gradient: nothing in it or before it trains"


def activation_cell(site: str) -> str:
    """Return the name of the cell of one site."""
    return f"activation_gradient:{site}"


@dataclass(slots=True)
class _Seen:
    """What the backward of one step has shown: a norm a call, its site and its size."""

    norms: list[Tensor] = field(default_factory=list)
    sites: list[int] = field(default_factory=list)
    elements: list[int] = field(default_factory=list)
    order: dict[str, None] = field(default_factory=dict)


class ActivationGradientWatcher(Watcher):
    """Registers a hook on the output tensor of each call; autograd runs it in the backward, and adds no node for it.

    A hook takes one norm (one tensor operation, off the CPU) and keeps that one number until the step ends; there the number of
    operations does not depend on the sites. Hooks go with the graph. Sums over micro-batches and ranks are of the squares; they still
    carry the factor of fp16 training, by which the host divides.
    """

    name = "activation_gradients"
    on_host = frozenset({"leave"})

    def __init__(self, sites: Sequence[Site], breaker: Breaker) -> None:
        """Watch these sites, without the root; the breaker guards what runs inside the backward."""
        self._sites = tuple(site.name for site in sites if site.role != "model")
        self._places = {name: index for index, name in enumerate(self._sites)}
        self._breaker = breaker
        self._seen: WeakKeyDictionary[Totals, _Seen] = WeakKeyDictionary()  # a step that ends early takes its own with it

    def cells(self) -> Sequence[Cell]:
        """Return a cell a site."""
        return [Cell(activation_cell(name), counts=("calls", "elements"), sums=("squares", "nonfinite")) for name in self._sites]

    def sites(self) -> Sequence[str]:
        """Return every site but the root."""
        return self._sites

    def leave(self, call: Call, buffer: StepBuffer) -> None:
        """Ask for the gradient of the output, if there is to be one."""
        name, output = call.site.name, main_tensor(call.output)
        if output is None:
            return
        seen, breaker, place = self._seen.setdefault(buffer.totals, _Seen()), self._breaker, self._places[name]
        spent = buffer.meter.section(self.name, launches=True)
        seen.order.setdefault(name)
        if not output.requires_grad:
            trains = any(parameter.requires_grad for parameter in call.module.parameters())
            buffer.totals.omit(activation_cell(name), _NO_GRAPH if trains else _NOTHING_BEFORE)
            return
        if output.grad_fn is None:
            buffer.totals.omit(activation_cell(name), "its output is a leaf of the graph, such as a parameter, where a hook would stay")
            return

        def see(gradient: Tensor) -> None:
            if not breaker.is_off(self.name):
                with spent, breaker.guard(self.name, name), torch.no_grad():
                    norm = norm_of(gradient)
                    seen.norms.append(norm)
                    seen.sites.append(place)
                    seen.elements.append(gradient.numel())

        output.register_hook(see)  # type: ignore[no-untyped-call]

    def step_end(self, end: StepEnd, buffer: StepBuffer) -> None:
        """Add up the squares by site."""
        totals, seen = buffer.totals, self._seen.pop(buffer.totals, None)
        note_scale(end, totals)
        if seen is None:
            return
        totals.tell(ORDER, tuple(seen.order))
        totals.tell(BACKWARD_SEEN, bool(seen.norms))
        for place, size in zip(seen.sites, seen.elements):
            totals.add(activation_cell(self._sites[place]), counts=(1, size))
        for device in {norm.device: None for norm in seen.norms}:
            here = [(norm, place) for norm, place in zip(seen.norms, seen.sites) if norm.device == device]
            places = [place for _, place in here]
            total = add_norms([norm for norm, _ in here], places, len(self._sites))
            among = set(places)
            names = [activation_cell(name) if place in among else None for place, name in enumerate(self._sites)]
            totals.add_rows(names, sums=total.t())
