"""The metrics and reasons of a record while it is being put together, and what is known of the whole run."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from probe.assemble.text import Decoder
from probe.foreign.trainer_loss import LossSettings
from probe.measure.audio_checks import LogMelScale
from probe.merge.packing import HostStep
from probe.sites.discovery import SiteMap
from probe.sites.facts import ModelFacts
from probe.sites.parts import UnitFacts
from probe.sites.reduction import Reduction
from probe.sites.tokenizers import TokenizerFacts


@dataclass(frozen=True, slots=True)
class RunContext:
    """What does not change from step to step: the sites, the model's facts, its units of parameters, the ranks, how ids become text.

    Attributes:
        reasons: What was not measured in the whole run, and why.
        frames_per_second: Rate of the audio features' frames, where a feature extractor tells it.
        loss_settings: What the Trainer does with the loss; ``None`` without a Trainer.
        reduction: How the model's class puts its loss together.
        tokenizer: How many ids the tokenizer has, and which were added to it; ``None`` without one.
        log_mel_scale: What the model's feature extractor can give, where that is known.
        languages: The language that each language token names, by id.
    """

    sites: SiteMap
    facts: ModelFacts
    units: tuple[UnitFacts, ...]
    world: int
    decoder: Decoder
    reasons: Mapping[str, str] = field(default_factory=dict)
    frames_per_second: float | None = None
    loss_settings: LossSettings | None = None
    reduction: Reduction | None = None
    languages: Mapping[int, str] = field(default_factory=dict)
    tokenizer: TokenizerFacts | None = None
    log_mel_scale: LogMelScale | None = None


@dataclass(slots=True)
class Draft:
    """Metrics and reasons gathered so far for one step.

    ``blind`` says, by observer, why it saw nothing (an error switched it off, or the model is compiled and left alone): then a count
    of 0 is no measurement, and "was not called" would be untrue.
    """

    host: HostStep
    run: RunContext
    metrics: dict[str, float] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)
    blind: Mapping[str, str] = field(default_factory=dict)

    def measure(self, name: str, value: float | None, why: str) -> float | None:
        """Enter a metric, or the reason why there is none. NaN and infinities are never entered: they are named.

        Returns:
            The value if it was entered, else ``None``.
        """
        if value is None:
            self.reasons.setdefault(name, why)
            return None
        if not math.isfinite(value):
            self.reasons.setdefault(name, f"not a finite number: {value}")
            return None
        self.metrics[name] = float(value)
        return float(value)

    def count(self, cell: str, column: str) -> float:
        """Return a count; 0 if the run has no such cell."""
        values = self.host.cells.get(cell)
        return values.counts[column] if values else 0.0


def ratio(numerator: float, denominator: float) -> float | None:
    """Return numerator / denominator, or ``None`` if there is nothing to divide by."""
    return numerator / denominator if denominator else None
