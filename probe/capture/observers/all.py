"""All that watch a step, in the order in which they see it: the one list that a new concern is added to."""

from __future__ import annotations

from collections.abc import Collection

from torch import nn

from probe.capture.breaker import Breaker
from probe.capture.observer import Observer
from probe.capture.observers.activation_gradients import ActivationGradientWatcher
from probe.capture.observers.adapters import AdapterWatcher
from probe.capture.observers.attention import AttentionWatcher
from probe.capture.observers.audio_checks import AudioChecker
from probe.capture.observers.batch_checks import BatchChecker
from probe.capture.observers.branches import BranchWatcher
from probe.capture.observers.gradients import GradientWatcher
from probe.capture.observers.head_unseen import HeadEvaluator
from probe.capture.observers.heads import HeadWatcher
from probe.capture.observers.inputs import InputWatcher
from probe.capture.observers.loss import LossWatcher
from probe.capture.observers.modality import ModalityWatcher
from probe.capture.observers.reference_gradient import ReferenceGradientWatcher
from probe.capture.observers.statistics import StatisticsWatcher
from probe.capture.observers.updates import UpdateWatcher
from probe.measure.audio_checks import LogMelScale
from probe.settings import Settings
from probe.sites.adapter_weights import adapter_outputs
from probe.sites.discovery import Discovery
from probe.sites.parts import divide
from probe.sites.tokenizers import TokenizerFacts


def all_observers(
    model: nn.Module,
    found: Discovery,
    settings: Settings,
    breaker: Breaker,
    *,
    keep: Collection[str],
    tokenizer: TokenizerFacts | None,
    log_mel_scale: LogMelScale | None,
) -> list[Observer]:
    """Return all observers but those of the modes and of the counterfactual passes, which whoever runs them keeps by name.

    Args:
        model: The root.
        found: Its sites.
        settings: What the user set.
        breaker: Where an error of an observer goes.
        keep: Names, roles or patterns of sites whose tensors are kept.
        tokenizer: What is known of the tokenizer, if anything.
        log_mel_scale: How the features were made, if that is known.
    """
    sites = found.sites.sites
    division = divide(model, sites)
    return [
        InputWatcher(found.facts, keep_text=settings.keep_text),
        StatisticsWatcher(sites, keep=keep),
        HeadWatcher(sites, found.facts, evaluator=HeadEvaluator(found.modules, found.feeders, found.facts), keep_text=settings.keep_text),
        ModalityWatcher(sites, found.facts, mask_takers=found.mask_takers),
        BatchChecker(sites, found.facts, tokenizer),
        AudioChecker(sites, found.facts, found.modules, log_mel_scale),
        AttentionWatcher(sites, breaker, rows=settings.attention_rows),
        BranchWatcher(sites),
        ActivationGradientWatcher(sites, breaker),
        ReferenceGradientWatcher(found.entrance, sites, breaker),
        GradientWatcher(division),
        UpdateWatcher(division),
        AdapterWatcher(adapter_outputs(model)),
        LossWatcher(),
    ]
