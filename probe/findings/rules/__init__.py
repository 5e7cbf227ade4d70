"""The rules, one file a concern; ``RULES`` is all of them, in the order in which their findings are shown."""

from __future__ import annotations

from probe.findings.rule import Rule
from probe.findings.rules import attention, audio, clips, conditioning, heads, inputs, labels, reference

RULES: tuple[Rule, ...] = (
    *inputs.RULES,
    *labels.RULES,
    *audio.RULES,
    *clips.RULES,
    *conditioning.RULES,
    *reference.RULES,
    *heads.RULES,
    *attention.RULES,
)
