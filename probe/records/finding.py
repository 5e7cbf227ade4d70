"""A finding: a diagnosis of the run, with its evidence and its state."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

Severity = Literal["critical", "warning", "info"]
FindingState = Literal["opened", "changed", "closed"]


@dataclass(frozen=True, slots=True)
class Finding:
    """A diagnosis: something that is, or may be, wrong with the run. Its identity is code and site.

    critical: the result will be wrong or wasted unless the training is stopped; warning: probably; info: worth knowing. ``state`` is
    what became of it at step ``step``: it opened, its severity changed, or it closed. ``message`` says what was seen, with the value and
    the bound; ``advice`` what to do next. ``evidence`` holds the numbers by name. ``time`` is that of the record of ``step``.
    """

    code: str
    severity: Severity
    site: str
    since_step: int
    message: str
    evidence: dict[str, float] = field(default_factory=dict)
    state: FindingState = "opened"
    step: int = 0
    advice: str = ""
    time: float = 0.0
