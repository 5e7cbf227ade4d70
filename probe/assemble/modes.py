"""Which modules trained and which did not: the modes of a record."""

from __future__ import annotations

from dataclasses import replace

from probe.assemble.draft import Draft
from probe.capture.observers.modes import MODES
from probe.records import Modes

_ADAPTERS = "adapters"


def modes(draft: Draft) -> Modes | None:
    """Return the modes of this rank's modules in the step; ``None`` if no training forward was seen."""
    found: Modes | None = draft.host.facts.get(MODES)
    values = draft.host.cells.get(_ADAPTERS)
    if found is None or values is None or not values.counts[_ADAPTERS]:
        return found
    return replace(found, adapters_zero=int(max(values.maxima["zero"], 0.0)))
