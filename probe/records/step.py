"""The record of one sampled step: all tables of all concerns, and the findings that are open in it."""

from __future__ import annotations

from dataclasses import dataclass

from probe.records.attention import Attention, Branches
from probe.records.checks import BatchChecks
from probe.records.counterfactual import Counterfactual, Verdict
from probe.records.finding import Finding
from probe.records.inputs import Inputs
from probe.records.modes import Modes
from probe.records.outputs import Head, SiteStatistics
from probe.records.overhead import Overhead
from probe.records.training import ActivationGradient, Conditioning, LossAudit, Optimisation, Part


@dataclass(frozen=True, slots=True)
class StepRecord:
    """The finished, host-side, immutable result of one sampled step.

    ``metrics`` holds every number by its public name (``probe/text/loss``); ``not_measured`` says for everything that is missing
    why it is. Tables (``inputs``, ``heads``, …) hold what does not fit a name. ``layers`` are in the order of the forward, with the same
    columns as ``parts``; ``activation_gradients`` too. ``findings`` are those that are open when the record is published.
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
    layers: tuple[Part, ...] = ()
    activation_gradients: tuple[ActivationGradient, ...] = ()
    checks: BatchChecks | None = None
    modes: Modes | None = None
    counterfactual: Counterfactual | None = None
    verdict: Verdict | None = None
    findings: tuple[Finding, ...] = ()
    overhead: Overhead | None = None
