"""Watches adapters: how many adapter layers have an output weight that is all zero, and so add nothing."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from probe.capture.buffer import StepBuffer
from probe.capture.cells import Cell
from probe.capture.observer import StepEnd, Watcher
from probe.foreign.sharding import is_sharded
from probe.foreign.torch_private import foreach_largest
from probe.measure.from_host import from_host
from probe.measure.norms import real_view
from probe.sites.adapter_weights import AdapterOutputs

CELL = Cell("adapters", counts=("adapters",), maxima=("zero",))
"""Adapter layers that could be read (they add up over ranks), and those of them whose output weights are all 0 (the same on each)."""


class AdapterWatcher(Watcher):
    """Reads the output weights of adapters (``lora_B``, …) after the last backward of a step: with the weights that it was run with.

    An adapter layer counts as zero if the output weights of all its active adapters are. A handful of tensor operations; no wait for
    the device.
    """

    name = "adapters"

    def __init__(self, layers: Sequence[AdapterOutputs]) -> None:
        """Watch these adapter layers."""
        self._layers = tuple(layers)

    def cells(self) -> Sequence[Cell]:
        """Return the one cell."""
        return (CELL,)

    def step_end(self, end: StepEnd, buffer: StepBuffer) -> None:
        """Count the adapter layers, and those that are zero."""
        weights: dict[tuple[torch.device, torch.dtype], list[tuple[int, Tensor]]] = {}
        read: set[int] = set()
        for index, layer in enumerate(self._layers):
            found = [weight for owner, key in layer.places if (weight := owner._parameters.get(key)) is not None]
            if found and not any(is_sharded(weight) for weight in found):
                read.add(index)
                for weight in found:
                    weights.setdefault((weight.device, weight.dtype), []).append((index, real_view(weight)))
        if not read:
            return
        device = next(iter(weights))[0]
        filled = torch.zeros(len(self._layers), dtype=torch.float64, device=device)
        for members in weights.values():
            largest = torch.stack(foreach_largest([weight for _, weight in members]))
            nonzero = (largest != 0).double().to(device, non_blocking=True)
            filled.index_add_(0, from_host([index for index, _ in members], torch.int64, device), nonzero)
        unread = len(self._layers) - len(read)
        zero = (filled == 0).sum().double() - unread
        buffer.totals.add(CELL.name, counts=(len(read),), maxima=zero.reshape(1))
