"""What became of the predictions when the audio that a step was conditioned on was taken away or exchanged."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from probe.records.sites import Modality

Intervention = Literal["swap", "silence", "reverse"]
Use = Literal["used", "weak", "ignored", "leaked"]


@dataclass(frozen=True, slots=True)
class Effect:
    """One intervention and the labelled tokens of one modality, over the samples of one micro-batch of every rank that it reached.

    A sample without audio, or without another's to take, is not reached by it and not counted (see
    :func:`probe.counterfactual.reach.reached_samples`), unless the samples cannot be told apart.
    ``loss`` is as it is, ``delta_loss`` how much more it is under the intervention, both in nats per labelled token.
    ``delta_loss_error`` is the standard error of ``delta_loss`` over samples (``None`` with fewer than two). ``win_rate``: share of
    samples whose own loss is lower as it is (a tie counts half). ``divergence``: KL(as it is ‖ intervened) of the predicted
    distributions in nats per token, over ``divergence_tokens`` sampled labelled positions.
    """

    intervention: Intervention
    modality: Modality
    samples: int
    tokens: int
    loss: float | None = None
    delta_loss: float | None = None
    delta_loss_error: float | None = None
    win_rate: float | None = None
    divergence: float | None = None
    divergence_tokens: int = 0


@dataclass(frozen=True, slots=True)
class SampleEffect:
    """One sample of this rank: its loss as it is, and under each intervention, in nats per labelled token.

    ``None`` where an intervention was not made, or did not reach this sample.
    ``group`` is what the user's column or the language token says of it, "" if nothing does.
    """

    index: int
    modality: Modality
    group: str = ""
    tokens: int = 0
    loss: float | None = None
    swap: float | None = None
    silence: float | None = None
    reverse: float | None = None


@dataclass(frozen=True, slots=True)
class Counterfactual:
    """The counterfactual passes of one step: the last micro-batch again, without gradients, with its audio as it is and changed.

    ``inputs`` names what was changed; ``effects`` are over all ranks, ``samples`` of this one. ``cost_ms`` is the time that all passes
    took on this rank.
    """

    inputs: tuple[str, ...]
    effects: tuple[Effect, ...] = ()
    samples: tuple[SampleEffect, ...] = ()
    cost_ms: float | None = None


@dataclass(frozen=True, slots=True)
class Verdict:
    """Whether the model uses the audio it is given, pooled over the last counterfactual passes.

    ``evidence`` holds the numbers that decided and the thresholds they were held against, by name; ``because`` is the same in one
    sentence. ``passes`` is the number of counterfactual steps that were pooled.
    """

    use: Use
    modality: Modality
    passes: int
    because: str
    evidence: dict[str, float]
