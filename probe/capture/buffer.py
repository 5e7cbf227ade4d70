"""The step buffer: all captures of one step, bounded in bytes, readable by any callback while the step ends."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from probe.capture.cells import Cell, Places
from probe.capture.meter import Meter
from probe.capture.microbatch import MicroBatch
from probe.capture.totals import Totals
from probe.errors import SiteError
from probe.measure.statistics import COLUMNS_MAXIMA, COLUMNS_SUMS, Moments, finish

_ELEMENT_BYTES = 8
_VECTOR_BYTES = _ELEMENT_BYTES * (len(COLUMNS_SUMS) + len(COLUMNS_MAXIMA))


def fixed_bytes(cells: Sequence[Cell]) -> int:
    """Return what the columns of cells take: the least that a budget must hold."""
    return _ELEMENT_BYTES * sum(len(cell.counts) + len(cell.sums) + len(cell.maxima) for cell in cells)


@dataclass(frozen=True, slots=True)
class Capture:
    """What the hooks recorded in one call of one site in one micro-batch.

    Attributes:
        site: Name of the site.
        micro_batch: Index of the micro-batch in the step.
        call: Index of the call of this site in the step.
        shape, dtype: Of the site's output (its first tensor); ``()`` and "" if it returned none.
        tensor: The detached output for sites named in ``keep=``, on its device; ``None`` for others or when over budget.
        sums, maxima: Raw statistics on the device, see :mod:`probe.measure.statistics`; ``None`` if none were taken.
    """

    site: str
    micro_batch: int
    call: int
    shape: tuple[int, ...] = ()
    dtype: str = ""
    tensor: Tensor | None = None
    sums: Tensor | None = None
    maxima: Tensor | None = None

    def statistics(self) -> Moments | None:
        """Return mean, rms, std, minimum, maximum and non-finite count of the output. Waits for the device."""
        if self.sums is None or self.maxima is None:
            return None
        elements = 1
        for size in self.shape:
            elements *= size
        return finish(elements, dict(zip(COLUMNS_SUMS, self.sums.tolist())), dict(zip(COLUMNS_MAXIMA, self.maxima.tolist())))


class StepBuffer:
    """Captures, inputs and running sums of the step that is being observed, or was observed last.

    It is filled during a sampled step and holds its content until the next step begins, so a callback reads it in ``on_step_end``.
    Inputs are kept by reference; everything the buffer itself holds on to counts against the budget.
    """

    def __init__(self, *, budget_bytes: int, sites: Sequence[str] = (), cells: Sequence[Cell] = (), meter: Meter | None = None) -> None:
        """Make an empty buffer that knows the names of its sites and its cells; ``meter`` is told of the time that filling it takes."""
        self.budget_bytes = budget_bytes
        self.meter = meter or Meter()
        self.bytes = 0
        self.step: int | None = None
        self.micro_batches: list[MicroBatch] = []
        self._sites = tuple(sites)
        self._places = Places(cells)
        self._fixed_bytes = fixed_bytes(cells)
        self._captures: dict[str, list[Capture]] = {}
        self.totals = Totals(self._places)

    def __getitem__(self, site: str) -> tuple[Capture, ...]:
        """Return the captures of a site, in the order of its calls; empty if it did not run or no step was observed yet.

        Raises:
            SiteError: if no site has that name.
        """
        if site not in self._sites:
            near = difflib.get_close_matches(site, self._sites, n=3, cutoff=0.3)
            nearest = ", ".join(map(repr, near)) or "none"
            raise SiteError(f"no site is named {site!r}; the nearest are {nearest}; p.sites lists all {len(self._sites)}")
        return tuple(self._captures.get(site, ()))

    def __len__(self) -> int:
        """Return the number of captures held."""
        return sum(map(len, self._captures.values()))

    @property
    def inputs(self) -> Mapping[str, Any]:
        """The newest micro-batch's inputs by name, by reference; empty outside a sampled step."""
        return self.micro_batches[-1].inputs if self.micro_batches else {}

    def open(self, step: int) -> None:
        """Start an empty buffer for a sampled step."""
        self.clear()
        self.totals = Totals(self._places)  # reasons and facts may have been noted outside any step
        self.step = step
        self.bytes = self._fixed_bytes

    def clear(self) -> None:
        """Drop everything, references to inputs included. Costs nothing if there is nothing."""
        if self.step is None:
            return
        self.step, self.bytes = None, 0
        self.micro_batches = []
        self._captures = {}
        self.totals = Totals(self._places)

    def reserve(self, what: str, nbytes: int) -> bool:
        """Count bytes against the budget; if they do not fit, note what is left out and return ``False``."""
        if self.bytes + nbytes > self.budget_bytes:
            mib = 1024 * 1024
            self.totals.omit(what, f"{nbytes / mib:.3g} MiB more would exceed the budget of {self.budget_bytes / mib:g} MiB (budget_mib=)")
            return False
        self.bytes += nbytes
        return True

    def put(self, key: str, tensor: Tensor) -> bool:
        """Keep a small tensor of this rank for the record, if the budget admits it (float64, as it will travel); else note it and say so.

        A tensor of the same size under the same key replaces the one before and costs nothing more.
        """
        known = self.totals.local.get(key)
        if (known is None or known.numel() != tensor.numel()) and not self.reserve(key, _ELEMENT_BYTES * tensor.numel()):
            return False
        self.totals.put(key, tensor)
        return True

    def release(self, nbytes: int) -> None:
        """Give back bytes that were reserved and are free again."""
        self.bytes -= nbytes

    def add(self, site: str, *, micro_batch: int, output: Tensor | None, keep: bool, sums: Tensor | None, maxima: Tensor | None) -> None:
        """Record one call of a site. Over budget the call is still counted, without its tensor and, at the end, without its statistics."""
        calls = self._captures.setdefault(site, [])
        if sums is not None and not self.reserve(f"buffer:{site}", _VECTOR_BYTES):
            sums = maxima = None
        kept = None
        if keep and output is not None and self.reserve(f"kept:{site}", output.numel() * output.element_size()):
            kept = output.detach().clone()  # a later in-place operation of the model must not change what was kept
        shape = () if output is None else tuple(output.shape)
        dtype = "" if output is None else str(output.dtype).removeprefix("torch.")
        calls.append(Capture(site, micro_batch, len(calls), shape, dtype, kept, sums, maxima))

    def kept(self) -> dict[str, Tensor]:
        """Return the kept tensors, by ``<site>.<call>``."""
        return {f"{site}.{c.call}": c.tensor for site, calls in self._captures.items() for c in calls if c.tensor is not None}
