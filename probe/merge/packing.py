"""One packed buffer a sampled step: all sums, maxima and small tensors leave the device in a single copy."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
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
        float64 (sums + counts,) and float64 (maxima,) on ``device`` (for MPS on the CPU), copies. Cells that nothing was added to hold 0
        and -inf. A few tensor operations, however many cells there are. Does not wait, unless sums of an accelerator are asked for on
        the CPU (as gloo needs them): then once for each of the two vectors.

    Raises:
        ValueError: if the totals are of other cells than the layout; all-reduces of unequal size would hang the ranks.
    """
    if totals.places.cells != layout.cells:
        raise ValueError("the totals were made for other cells than the layout")
    if device.type == "mps":
        device = torch.device("cpu")  # MPS has no float64
    home = _home([vectors.sums for vectors in totals.vectors.values()], device)
    counts = torch.tensor([value for cell in layout.cells for value in totals.counts[cell.name]], dtype=torch.float64)
    sums, maxima = _together(totals, home)
    return torch.cat([sums, _near(counts, home)]).to(device), maxima.to(device)


def _together(totals: Totals, home: torch.device) -> tuple[Tensor, Tensor]:
    """Return all sums, perhaps the totals' own tensor, and a copy of all maxima, float64 at ``home``: the devices' vectors combined."""
    parts = [(_near(vectors.sums, home), _near(vectors.maxima, home)) for vectors in totals.vectors.values()]
    if not parts:
        width, lows = totals.places.width
        return torch.zeros(width, dtype=torch.float64, device=home), torch.full((lows,), -torch.inf, dtype=torch.float64, device=home)
    (sums, maxima), *others = parts
    if not others:
        return sums, maxima.clone()
    for more_sums, more_maxima in others:
        sums, maxima = sums + more_sums, torch.maximum(maxima, more_maxima)
    return sums, maxima


class Transfer:
    """A step's numbers on their way to the host. Making one issues the copy and does not wait for it; :meth:`result` waits."""

    def __init__(self, totals: Totals, layout: Layout, sums: Tensor, maxima: Tensor) -> None:
        """Send packed sums and maxima (as :func:`pack` laid them out, combined over ranks since), and this rank's small tensors."""
        self._layout = layout
        self._facts, self._reasons = totals.facts, totals.reasons
        self._local = {key: tuple(tensor.shape) for key, tensor in totals.local.items()}
        parts = [sums, maxima, *totals.local.values()]
        home = _home(parts, sums.device)
        with torch.no_grad():
            # One operation whatever their dtypes: it widens them to the float64 of the first.
            self._packed = torch.cat([tensor.to(home, non_blocking=home.type != "cpu").reshape(-1) for tensor in parts])
        self._copied = None
        if home.type == "cuda":
            # To the CPU without waiting, torch takes page-locked memory from its cache of such blocks.
            self._packed = self._packed.to("cpu", non_blocking=True)
            self._copied = torch.cuda.Event()  # type: ignore[no-untyped-call,unused-ignore]
            self._copied.record(torch.cuda.current_stream(home))

    def wait(self) -> None:
        """Wait for the copy if it is still under way."""
        if self._copied is not None:
            self._copied.synchronize()

    def result(self) -> HostStep:
        """Return the numbers. Waits for the copy if it is still under way (on devices other than CUDA's it is made only now)."""
        self.wait()
        layout = self._layout
        ends = np.cumsum([layout.sums, layout.counts, layout.maxima])
        sums, counts, maxima, rest = np.split(self._packed.cpu().numpy(), ends)
        local = {}
        for key, shape in self._local.items():
            local[key], rest = rest[: prod(shape)].reshape(shape), rest[prod(shape) :]
        return HostStep(layout.values(sums, counts, maxima), local, self._facts, self._reasons)


def _home(tensors: Iterable[Tensor], device: torch.device) -> torch.device:
    """Return where tensors are put together: on ``device``, but never on the CPU what is on an accelerator.

    A copy to the CPU that does not wait may be read before it has arrived; one that waits should be one copy, not one a cell.
    """
    if device.type != "cpu":
        return device
    return next((tensor.device for tensor in tensors if tensor.device.type not in ("cpu", "mps")), device)


def _near(tensor: Tensor, home: torch.device) -> Tensor:
    """Return float64 at ``home``; from the CPU's memory to a CUDA device through page-locked memory, from which the copy does not wait."""
    if home.type == "cuda" and tensor.device.type == "cpu":
        tensor = tensor.pin_memory()
    return tensor.to(home, non_blocking=home.type != "cpu").to(torch.float64)
