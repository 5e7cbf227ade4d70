"""The frozen data that travels from the hooks to whoever reads it: sites, reasons, and the record of one step.

Everything here is plain host data: Python numbers, strings and tuples, no tensor. A number that could not be measured is ``None`` (or
its key is absent from ``metrics``) and ``StepRecord.not_measured`` says why; NaN never stands for "unknown".

Shapes: B batch, T audio frames, S tokens, H heads, D width, V vocabulary.
"""

from __future__ import annotations

from probe.records.attention import Attention, Branches, HeadwiseAttention
from probe.records.inputs import AudioSegment, Inputs, InputSample, InputTensor
from probe.records.outputs import Accuracy, Head, HeadSample, SiteStatistics
from probe.records.sites import AttentionKind, Modality, Role, Site
from probe.records.step import Finding, StepRecord
from probe.records.training import Conditioning, LossAudit, Optimisation, Part

__all__ = [
    "Accuracy",
    "Attention",
    "AttentionKind",
    "AudioSegment",
    "Branches",
    "Conditioning",
    "Finding",
    "Head",
    "HeadSample",
    "HeadwiseAttention",
    "InputSample",
    "InputTensor",
    "Inputs",
    "LossAudit",
    "Modality",
    "Optimisation",
    "Part",
    "Role",
    "Site",
    "SiteStatistics",
    "StepRecord",
]
