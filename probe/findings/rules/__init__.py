"""The rules, one file a concern; ``RULES`` is all of them, in the order in which their findings are shown."""

from __future__ import annotations

from probe.findings.rule import Rule
from probe.findings.rules.attention import RULES as ATTENTION
from probe.findings.rules.audio import RULES as AUDIO
from probe.findings.rules.clips import RULES as CLIPS
from probe.findings.rules.conditioning import RULES as CONDITIONING
from probe.findings.rules.heads import RULES as HEADS
from probe.findings.rules.inputs import RULES as INPUTS
from probe.findings.rules.labels import RULES as LABELS
from probe.findings.rules.reference import RULES as REFERENCE

RULES: tuple[Rule, ...] = (*INPUTS, *LABELS, *AUDIO, *CLIPS, *CONDITIONING, *REFERENCE, *HEADS, *ATTENTION)
