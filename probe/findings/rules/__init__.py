"""The rules, one file a concern; ``RULES`` is all of them, in the order in which their findings are shown."""

from __future__ import annotations

from probe.findings.rule import Rule
from probe.findings.rules.activations import RULES as ACTIVATIONS
from probe.findings.rules.attention import RULES as ATTENTION
from probe.findings.rules.audio import RULES as AUDIO
from probe.findings.rules.clips import RULES as CLIPS
from probe.findings.rules.conditioning import RULES as CONDITIONING
from probe.findings.rules.gradient_size import RULES as GRADIENT_SIZE
from probe.findings.rules.gradients import RULES as GRADIENTS
from probe.findings.rules.heads import RULES as HEADS
from probe.findings.rules.inputs import RULES as INPUTS
from probe.findings.rules.labels import RULES as LABELS
from probe.findings.rules.loss import RULES as LOSS
from probe.findings.rules.modes import RULES as MODES
from probe.findings.rules.reference import RULES as REFERENCE
from probe.findings.rules.setup import RULES as SETUP
from probe.findings.rules.updates import RULES as UPDATES

_OF_SETUP = (*SETUP, *MODES)
_OF_INPUTS = (*INPUTS, *LABELS, *AUDIO, *CLIPS)
_OF_TRAINING = (*LOSS, *GRADIENTS, *GRADIENT_SIZE, *UPDATES)
_OF_FORWARD = (*ACTIVATIONS, *CONDITIONING, *REFERENCE, *HEADS, *ATTENTION)

RULES: tuple[Rule, ...] = (*_OF_SETUP, *_OF_INPUTS, *_OF_TRAINING, *_OF_FORWARD)
