"""The frozen data that travels from the hooks to whoever reads it: sites, reasons, and the record of one step.

Everything here is plain host data: Python numbers, strings and tuples, no tensor. A number that could not be measured is ``None`` (or
its key is absent from ``metrics``) and ``StepRecord.not_measured`` says why; NaN never stands for "unknown".

Shapes: B batch, T audio frames, S tokens, H heads, D width, V vocabulary.
"""

from __future__ import annotations

from probe.records.attention import Attention, Branches, HeadwiseAttention
from probe.records.checks import AudioChecks, BatchChecks, LabelChecks
from probe.records.counterfactual import Counterfactual, Effect, Intervention, SampleEffect, Use, Verdict
from probe.records.finding import Finding, FindingState, Severity
from probe.records.inputs import AudioSegment, Inputs, InputSample, InputTensor
from probe.records.modes import Modes
from probe.records.outputs import Accuracy, Head, HeadSample, SiteStatistics
from probe.records.overhead import Overhead
from probe.records.setup import Setup
from probe.records.sites import AttentionKind, Modality, Role, Site
from probe.records.step import StepRecord
from probe.records.training import ActivationGradient, Conditioning, LossAudit, Optimisation, Part

__all__ = [
    "Accuracy",
    "ActivationGradient",
    "Attention",
    "AttentionKind",
    "AudioChecks",
    "AudioSegment",
    "BatchChecks",
    "Branches",
    "Conditioning",
    "Counterfactual",
    "Effect",
    "Finding",
    "FindingState",
    "Head",
    "HeadSample",
    "HeadwiseAttention",
    "InputSample",
    "InputTensor",
    "Inputs",
    "Intervention",
    "LabelChecks",
    "LossAudit",
    "Modality",
    "Modes",
    "Optimisation",
    "Overhead",
    "Part",
    "Role",
    "SampleEffect",
    "Setup",
    "Severity",
    "Site",
    "SiteStatistics",
    "StepRecord",
    "Use",
    "Verdict",
]
