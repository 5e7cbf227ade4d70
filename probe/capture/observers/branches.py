"""Watches decoder layers with separate feed-forward branches: how many tokens the text and the audio branch receive."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from probe.capture.buffer import StepBuffer
from probe.capture.cells import Cell
from probe.capture.observer import Call, Watcher
from probe.records import Site


def branch_cell(site: str) -> str:
    """Return the name of the cell of one branch."""
    return f"branch:{site}"


class BranchWatcher(Watcher):
    """Counts tokens by the shape of what a branch is given: the host knows it without asking the device."""

    name = "branches"

    def __init__(self, sites: Sequence[Site]) -> None:
        """Watch the feed-forward sites among these."""
        self._names = tuple(site.name for site in sites if site.role == "feed_forward")

    def cells(self) -> Sequence[Cell]:
        """Return a cell a branch."""
        return [Cell(branch_cell(name), counts=("calls", "tokens")) for name in self._names]

    def sites(self) -> Sequence[str]:
        """Return the branches."""
        return self._names

    def enter(self, call: Call, buffer: StepBuffer) -> None:
        """Count the tokens of one call: every dimension of its input but the last."""
        given = next((value for value in (*call.args, *call.kwargs.values()) if isinstance(value, Tensor)), None)
        tokens = 0 if given is None or not given.shape[-1] else given.numel() // given.shape[-1]
        buffer.totals.add(branch_cell(call.site.name), counts=(1, tokens))
