"""One packed buffer a sampled step: all sums, maxima and small tensors leave the device in a single copy."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from probe.capture.cells import CellValues
from probe.capture.totals import Totals
from probe.merge.layout import Layout


@dataclass(frozen=True, slots=True)
class HostStep:
    """The numbers of one step on the host: cells combined over ranks, and this rank's own arrays, facts and reasons."""

    cells: Mapping[str, CellValues]
    local: Mapping[str, NDArray[np.float64]]
    facts: Mapping[str, Any]
    reasons: Mapping[str, str]


@torch.no_grad()  # type: ignore[untyped-decorator,unused-ignore]
def pack(totals: Totals, layout: Layout, *, device: torch.device) -> tuple[Tensor, Tensor]:
    """Lay a step's columns out in the fixed order.

    Args:
        totals: The sums of the step. They may sit on several devices; all are brought to ``device``.
        layout: The order of the columns.
        device: Where the collectives run.

    Returns:
        float64 (sums + counts,) and float64 (maxima,) on ``device``. Cells that nothing was added to hold 0 and -inf. Does not wait.
    """
    zeros = torch.zeros(max((len(cell.sums) for cell in layout.cells), default=0), dtype=torch.float64, device=device)
    lows = torch.full((max((len(cell.maxima) for cell in layout.cells), default=0),), -torch.inf, dtype=torch.float64, device=device)
    sums = [_wide(totals.sums[c.name], device) if c.name in totals.sums else zeros[: len(c.sums)] for c in layout.cells if c.sums]
    maxima = [_wide(totals.maxima[c.name], device) if c.name in totals.maxima else lows[: len(c.maxima)] for c in layout.cells if c.maxima]
    counts = torch.tensor([value for cell in layout.cells for value in totals.counts[cell.name]], dtype=torch.float64)
    if device.type == "cuda":
        counts = counts.pin_memory().to(device, non_blocking=True)  # from page-locked memory the copy does not wait
    return torch.cat([*sums, counts]), torch.cat(maxima) if maxima else lows


class Transfer:
    """A step's numbers on their way to the host. Making one issues the copy and does not wait for it; :meth:`result` waits."""

    def __init__(self, totals: Totals, layout: Layout, sums: Tensor, maxima: Tensor) -> None:
        """Send packed sums and maxima (as :func:`pack` laid them out, combined over ranks since), and this rank's small tensors."""
        self._layout = layout
        self._facts, self._reasons = totals.facts, totals.reasons
        self._local = {key: tuple(tensor.shape) for key, tensor in totals.local.items()}
        device = sums.device
        with torch.no_grad():
            parts = [sums, maxima, *(_wide(tensor, device).reshape(-1) for tensor in totals.local.values())]
            # To the CPU without waiting, torch takes page-locked memory from its cache of such blocks.
            self._packed = torch.cat(parts).to("cpu", non_blocking=True)
        self._copied = torch.cuda.Event() if device.type == "cuda" else None
        if self._copied is not None:
            self._copied.record(torch.cuda.current_stream(device))

    def result(self) -> HostStep:
        """Return the numbers. Waits for the copy if it is still under way."""
        if self._copied is not None:
            self._copied.synchronize()
        layout = self._layout
        ends = np.cumsum([layout.sums, layout.counts, layout.maxima])
        sums, counts, maxima, rest = np.split(self._packed.numpy(), ends)
        local = {}
        for key, shape in self._local.items():
            local[key], rest = rest[: prod(shape)].reshape(shape), rest[prod(shape) :]
        return HostStep(layout.values(sums, counts, maxima), local, self._facts, self._reasons)


def _wide(tensor: Tensor, device: torch.device) -> Tensor:
    return tensor.detach().to(device, non_blocking=True).to(torch.float64)
