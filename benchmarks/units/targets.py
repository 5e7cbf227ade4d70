"""A target and what was measured of it, as the page of results shows it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Target:
    """One line of the table.

    Attributes:
        target: What was promised.
        bound: The figure.
        measured: The measured figure.
        met: Whether it is met; ``None`` where this machine cannot tell.
        why: Where it is missed or cannot be told: the reason.
    """

    target: str
    bound: str
    measured: str
    met: bool | None
    why: str = ""
