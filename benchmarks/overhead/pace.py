"""How long the steps of a model are, which says how much can be measured of it in a given time."""

from __future__ import annotations

from enum import IntEnum


class Pace(IntEnum):
    """SHORT: hundreds of pairs are to be had. MIDDLING: every contender, with a few pairs. LONG: only contenders of a few plain steps."""

    SHORT = 0
    MIDDLING = 1
    LONG = 2
