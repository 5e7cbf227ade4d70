"""Watches what comes out of every site: statistics of its output, spread of encoder's and projector's, tensors that the user keeps."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from fnmatch import fnmatchcase

from torch import Tensor

from probe.capture.buffer import StepBuffer
from probe.capture.cells import Cell
from probe.capture.observer import Call, Watcher, main_tensor
from probe.capture.totals import Totals
from probe.measure.fused_statistics import FUSED, FusedStatistics
from probe.measure.spread import COLUMNS_COUNTS as SPREAD_COUNTS
from probe.measure.spread import COLUMNS_SUMS as SPREAD_SUMS
from probe.measure.spread import spread
from probe.measure.statistics import COLUMNS_MAXIMA, COLUMNS_SUMS, summarise
from probe.records import Site

# A projector that answers with its bias has the usual size and deviation; only over the frames of a clip it does not vary.
_SPREADING = ("audio_encoder", "projector")


def statistics_cell(site: str) -> str:
    """Return the name of the cell with a site's statistics."""
    return f"statistics:{site}"


def spread_cell(site: str) -> str:
    """Return the name of the cell with an encoder's, or a projector's, spread over time and batch."""
    return f"spread:{site}"


class StatisticsWatcher(Watcher):
    """One reduction of each output tensor of each site (the root's output is left to the other observers)."""

    name = "statistics"

    def __init__(self, sites: Sequence[Site], *, keep: Collection[str]) -> None:
        """Watch these sites; ``keep`` holds names, roles or name patterns of those whose output tensors stay in the buffer."""
        self._watched = {site.name: site for site in sites if site.role != "model"}
        self._fused = FusedStatistics()
        self._kept = {s.name for s in self._watched.values() if any(p == s.role or fnmatchcase(s.name, p) for p in keep)}

    def cells(self) -> Sequence[Cell]:
        """Return a cell a site, and one more for each audio encoder and projector."""
        cells = [
            Cell(statistics_cell(name), counts=("calls", "elements"), sums=COLUMNS_SUMS, maxima=COLUMNS_MAXIMA) for name in self._watched
        ]
        spreading = [s.name for s in self._watched.values() if s.role in _SPREADING]
        return cells + [Cell(spread_cell(name), counts=SPREAD_COUNTS, sums=SPREAD_SUMS) for name in spreading]

    def sites(self) -> Sequence[str]:
        """Return every site but the root."""
        return tuple(self._watched)

    def leave(self, call: Call, buffer: StepBuffer) -> None:
        """Reduce the output of one call."""
        name, output = call.site.name, main_tensor(call.output)
        sums = maxima = None
        if output is not None:
            output = output.detach()
            sums, maxima = self._add(statistics_cell(name), output, buffer.totals)
            buffer.totals.tell(f"output:{name}", (tuple(output.shape), str(output.dtype).removeprefix("torch."), str(output.device)))
            if call.site.role in _SPREADING and output.dim() in (2, 3) and output.numel():
                variances, rows = spread(output)
                buffer.totals.add(spread_cell(name), counts=rows, sums=variances)
        buffer.totals.add(statistics_cell(name), counts=(1, 0 if output is None else output.numel()))
        buffer.add(name, micro_batch=call.micro.index, output=output, keep=name in self._kept, sums=sums, maxima=maxima)

    def _add(self, cell: str, output: Tensor, totals: Totals) -> tuple[Tensor, Tensor]:
        """Reduce a tensor and add its columns to a cell: one kernel where that can be, else at most six operations on the CPU."""
        if self._fused.takes(output):
            columns = self._fused(output, into=totals.row(cell, output.device))
            if columns is not None:
                return columns[:3], columns[3:]
        if self._fused.failure is not None:
            totals.omit(FUSED, self._fused.failure)
        sums, maxima = summarise(output)
        totals.add(cell, sums=sums, maxima=maxima)
        return sums, maxima
