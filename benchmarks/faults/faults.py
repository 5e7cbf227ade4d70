"""All faults, area by area."""

from __future__ import annotations

from benchmarks.faults.areas import audio, backward, conditioning, heads, labels, loss, setup
from benchmarks.faults.fault import Fault, Kind, each

KINDS: tuple[Kind, ...] = tuple(kind for module in (setup, backward, loss, labels, audio, conditioning, heads) for kind in module.KINDS)
FAULTS: tuple[Fault, ...] = tuple(each(KINDS))
