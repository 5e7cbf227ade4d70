"""Watches the gradient that reaches the embeddings of reference audio where they enter the decoder.

Shapes: B batch, S tokens, D width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from probe.capture.breaker import Breaker
from probe.capture.buffer import StepBuffer
from probe.capture.cells import Cell
from probe.capture.observer import Call, Watcher
from probe.capture.observers.modality import late_modality, modalities
from probe.measure.chunks import accumulator
from probe.records import Site
from probe.sites.modality import REFERENCE

CELL = Cell("reference_gradient", counts=("calls",), sums=("squares", "nonfinite", "rows"))
"""Gradients seen; over the rows that are reference audio the squares of those that are finite, how many are not, and all."""

METRIC = "probe/reference/gradient_norm"


class ReferenceGradientWatcher(Watcher):
    """Registers one hook a micro-batch, on the embeddings that the first decoder layer is given; the graph gets no node for it.

    In the backward one norm a row is taken, (B, S), and the rows of reference audio are added up: a dozen small tensor operations, no
    wait for the device. Stands behind the observer that knows modalities. Nothing but the modality (B, S) is kept until the backward.
    """

    name = "reference_gradient"

    def __init__(self, entrance: str, sites: Sequence[Site], breaker: Breaker) -> None:
        """Watch the module called ``entrance`` ("": none)."""
        self._entrance = entrance
        self._joint = next((site for site in sites if site.role == "attention" and site.kind == "joint"), None)
        self._breaker = breaker

    def cells(self) -> Sequence[Cell]:
        """Return the one cell."""
        return (CELL,)

    def sites(self) -> Sequence[str]:
        """Return the first decoder layer and the root."""
        return (self._entrance, "") if self._entrance else ()

    def enter(self, call: Call, buffer: StepBuffer) -> None:
        """Hook what the layer is given, at its first call in a micro-batch."""
        if call.site.name != self._entrance or self.name in call.micro.scratch:
            return
        given_BSD = _embeddings(call.args, call.kwargs)
        if given_BSD is None or not given_BSD.requires_grad or given_BSD.grad_fn is None:
            buffer.totals.omit(METRIC, f"what {self._entrance} is given needs no gradient: nothing before it trains")
            return
        told: list[Tensor] = []
        call.micro.scratch[self.name] = (told, (given_BSD.shape[0], given_BSD.shape[1]))
        samples, length = given_BSD.shape[:2]
        codes_BS, _ = modalities(call, (samples, 1, length, length))
        if codes_BS is not None:
            told.append(codes_BS == REFERENCE)
        totals, breaker, spent = buffer.totals, self._breaker, buffer.meter.section(self.name, launches=True)

        def see(gradient_BSD: Tensor) -> None:
            if told and not breaker.is_off(self.name):
                with spent, breaker.guard(self.name, self._entrance), torch.no_grad():
                    totals.add(CELL.name, counts=(1,), sums=_over_reference(gradient_BSD.detach(), told[0]))

        given_BSD.register_hook(see)  # type: ignore[no-untyped-call]

    def leave(self, call: Call, buffer: StepBuffer) -> None:
        """At the root, ask its output where nothing before has told which token is what."""
        noted = call.micro.scratch.pop(self.name, None) if call.site.name == "" else None
        if noted is None or noted[0] or self._joint is None:
            return
        told, shape = noted
        codes_BS = late_modality(call.micro, self._joint)
        if codes_BS is not None and tuple(codes_BS.shape) == shape:
            told.append(codes_BS == REFERENCE)


def _over_reference(gradient_BSD: Tensor, reference_BS: Tensor) -> Tensor:
    wide = accumulator(gradient_BSD.device)
    norm_BS = torch.linalg.vector_norm(gradient_BSD, dim=-1, dtype=torch.promote_types(gradient_BSD.dtype, torch.float32)).to(wide)
    reference_BS = reference_BS.to(norm_BS.device, non_blocking=True)
    finite_BS = torch.isfinite(norm_BS)
    squares = norm_BS.square().masked_fill(~(finite_BS & reference_BS), 0.0).sum()
    return torch.stack([squares, (reference_BS & ~finite_BS).sum().to(wide), reference_BS.sum().to(wide)])


def _embeddings(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor | None:
    """Return what a decoder layer works on: ``hidden_states``, or its first argument with three dimensions."""
    given = (kwargs.get("hidden_states"), *args, *kwargs.values())
    return next((one for one in given if isinstance(one, Tensor) and one.dim() == 3 and one.is_floating_point()), None)
