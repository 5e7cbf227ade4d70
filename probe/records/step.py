"""The record of one sampled step, and the findings that are open in it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from probe.records.attention import Attention, Branches
from probe.records.inputs import Inputs
from probe.records.outputs import Head, SiteStatistics
from probe.records.training import Conditioning, LossAudit, Optimisation, Part


@dataclass(frozen=True, slots=True)
class Finding:
    """A diagnosis: something that is, or may be, wrong with the run."""

    code: str
    severity: Literal["critical", "warning", "info"]
    site: str
    since_step: int
    message: str
    evidence: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class StepRecord:
    """The finished, host-side, immutable result of one sampled step.

    ``metrics`` holds every number by its public name (``probe/text/loss``); ``not_measured`` says for everything that is missing
    why it is. Tables (``inputs``, ``heads``, …) hold what does not fit a name.
    """

    step: int
    time: float
    ranks: int
    metrics: dict[str, float]
    not_measured: dict[str, str]
    inputs: Inputs | None = None
    statistics: tuple[SiteStatistics, ...] = ()
    heads: tuple[Head, ...] = ()
    attention: tuple[Attention, ...] = ()
    branches: tuple[Branches, ...] = ()
    parts: tuple[Part, ...] = ()
    conditioning: Conditioning | None = None
    optimisation: Optimisation | None = None
    loss_audit: LossAudit | None = None
    findings: tuple[Finding, ...] = ()
