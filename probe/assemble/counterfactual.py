"""What the counterfactual passes of a step showed: effects over all ranks, this rank's samples, and the ``probe/reference/…`` metrics."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import get_args

from probe.assemble.draft import Draft, ratio
from probe.capture.cells import CellValues
from probe.counterfactual.effects import INTERVENTIONS, effect_cell
from probe.counterfactual.passes import JOINED
from probe.counterfactual.watcher import FACTS, GROUP, LANGUAGE, NAME, WAITING, PassFacts, table_key
from probe.records import Counterfactual, Effect, Intervention, Modality, SampleEffect

_DIVERGENCES: tuple[Intervention, ...] = ("swap", "silence")
_HEADLINE = ("delta_loss_swap", "delta_loss_silence", "win_rate")
_NO_LABEL = "no labelled token of a sample that it reached has a finite loss both as it is and under it"
_NO_PASS = "no pass was made in this step"


def counterfactual(draft: Draft) -> Counterfactual | None:
    """Return what the passes showed, and enter the metrics; ``None`` if no rank made any in this step."""
    known: PassFacts | None = draft.host.facts.get(FACTS)
    heads = {site.modality for site in draft.run.sites.of("lm_head")}
    modalities = [modality for modality in get_args(Modality) if modality in heads]
    effects = {} if NAME in draft.blind else {(effect.modality, effect.intervention): effect for effect in _effects(draft, modalities)}
    main: Modality = "audio" if "audio" in modalities else "text"
    for name in _HEADLINE:
        _measure(draft, effects, main, name, at="probe/reference")
    if effects or not draft.host.facts.get(WAITING):
        for modality in modalities:
            for name in _names():
                _measure(draft, effects, modality, name, at=f"probe/reference/{modality}")
        cost = None if known is None or NAME in draft.blind else known.cost.milliseconds()
        draft.measure("probe/reference/cost_ms", cost, _why(draft, main, "swap"))
    if not effects:
        return None
    if known is None:
        why = draft.host.reasons.get(NAME, _NO_PASS)
        draft.reasons[NAME] = f"this rank has no samples to show: {why}"
        return Counterfactual((), tuple(effects.values()))
    samples = tuple(sample for modality in known.made for sample in _samples(draft, known, modality))
    return Counterfactual(known.inputs, tuple(effects.values()), samples, draft.metrics.get("probe/reference/cost_ms"))


def _names() -> list[str]:
    return [*(f"delta_loss_{what}" for what in INTERVENTIONS), "win_rate", *(f"divergence_{what}" for what in _DIVERGENCES)]


def _measure(draft: Draft, effects: dict[tuple[Modality, Intervention], Effect], modality: Modality, name: str, *, at: str) -> None:
    """Enter one metric of a modality, or the reason why there is none."""
    column, _, said = name.rpartition("_")
    what: Intervention = next((each for each in INTERVENTIONS if each == said), "swap")
    effect = effects.get((modality, what))
    if effect is None:
        value, why = None, _why(draft, modality, what)
    elif name == "win_rate":
        value, why = effect.win_rate, _why_no_share(draft, modality, effect)
    elif column == "divergence":
        value, why = effect.divergence, draft.host.reasons.get(f"{NAME}/{modality}/divergence", _NO_LABEL)
    else:
        value, why = effect.delta_loss, _NO_LABEL
    draft.measure(f"{at}/{name}", value, why)


def _why(draft: Draft, modality: Modality, what: Intervention) -> str:
    """Return why an intervention has no numbers: the narrowest reason that is known."""
    if NAME in draft.blind:
        return draft.blind[NAME]
    keys = (f"{NAME}/{modality}/{what}", f"{NAME}/{what}", f"{NAME}/{modality}", NAME)
    missing = draft.run.sites.missing.get("lm_head", f"the model has no {modality} head")
    has_head = any(site.modality == modality for site in draft.run.sites.of("lm_head"))
    return next((draft.host.reasons[key] for key in keys if key in draft.host.reasons), _NO_PASS if has_head else missing)


def _why_no_share(draft: Draft, modality: Modality, effect: Effect) -> str:
    if not effect.tokens:
        return _NO_LABEL
    return draft.host.reasons.get(f"{NAME}/{modality}/samples", JOINED)


def _effects(draft: Draft, modalities: list[Modality]) -> Iterator[Effect]:
    for modality in modalities:
        for what in INTERVENTIONS:
            values = draft.host.cells.get(effect_cell(modality, what))
            if values is not None and values.counts["passes"]:
                yield _effect(modality, what, values)


def _effect(modality: Modality, what: Intervention, values: CellValues) -> Effect:
    sums, told_apart = values.sums, not values.counts["samples_unknown"]
    return Effect(
        intervention=what,
        modality=modality,
        samples=round(sums["samples"]),
        tokens=round(sums["tokens"]),
        loss=ratio(sums["loss"], sums["tokens"]),
        delta_loss=ratio(sums["changed"] - sums["loss"], sums["tokens"]),
        delta_loss_error=_standard_error(sums) if told_apart else None,
        win_rate=ratio(sums["wins"], sums["samples"]) if told_apart else None,
        divergence=ratio(sums["divergence"], sums["divergence_tokens"]),
        divergence_tokens=round(sums["divergence_tokens"]),
    )


def _standard_error(sums: dict[str, float]) -> float | None:
    """Return the standard error of Σd / Σn over samples; ``None`` with fewer than two.

    Source: the ratio estimator's linearised variance, n / (n - 1) · Σ (d - R n)² / (Σ n)² (Cochran, Sampling Techniques, 3rd ed., 1977,
    section 2.11, samples taken as drawn from an unlimited population).
    """
    samples, tokens = sums["samples"], sums["tokens"]
    if samples < 2 or not tokens:
        return None
    mean = (sums["changed"] - sums["loss"]) / tokens
    spread = max(0.0, sums["delta_squared"] - 2 * mean * sums["delta_tokens"] + mean**2 * sums["tokens_squared"])
    return math.sqrt(samples / (samples - 1) * spread) / tokens


def _samples(draft: Draft, known: PassFacts, modality: Modality) -> Iterator[SampleEffect]:
    """Yield the samples of this rank that have a label of this modality."""
    told_apart = f"{NAME}/{modality}/samples" not in draft.host.reasons
    for index, row in enumerate(draft.host.local.get(table_key(modality), ())):
        loss, tokens, *rest = (float(value) for value in row)
        changed = {what: ratio(rest[2 * i], rest[2 * i + 1]) for i, what in enumerate(known.made[modality])}
        if tokens:
            group = _group(draft, known, index) if told_apart else ""
            yield SampleEffect(index, modality, group, round(tokens), loss / tokens, **changed)


def _group(draft: Draft, known: PassFacts, index: int) -> str:
    """Return the group of one sample: from the user's column, or the language that the first of its labels names."""
    if index < len(known.groups):
        return known.groups[index]
    column, labels = draft.host.local.get(GROUP), draft.host.local.get(LANGUAGE)
    if column is not None and index < len(column):
        return f"{column[index]:g}"
    if labels is None or index >= len(labels):
        return ""
    return next((draft.run.languages[int(label)] for label in labels[index] if int(label) in draft.run.languages), "")
