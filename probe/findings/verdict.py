"""The verdict on conditioning: does the model use the audio that it is given, pooled over counterfactual passes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from probe.records import Effect, Intervention, Modality, StepRecord, Use, Verdict

LEAST_PASSES = 3
"""One pass is one micro-batch: its samples may be alike, and what happened to be exchanged in it may have been too."""
ENOUGH_SAMPLES = 32
"""As many of the newest passes are pooled as bring so many samples, no more: a model's use of its audio changes while it learns."""
ERRORS = 3.0
"""Standard errors that count as certain: 1 in 400 by chance with many samples, 1 in 17 with two samples in each of three passes."""
NOTHING = 0.02
"""Nats a token below which another sample's audio changes nothing: 2 % of the perplexity."""
MATTERS = 0.05
"""Nats a token from which on the audio matters: 5 % of the perplexity. Silence and reversed audio may cost up to this for being strange."""
LEAK = 1 / 3
"""Share of what another's audio costs from which on too much is taken from the order of the frames for a voice."""
EARLY = 300
"""Steps in which a model may not yet have learnt to listen; of the example cloner the healthy ones took about 100."""
SAME, COMPARED = 0.9, 4
"""Share of references that are their targets from which on it is no accident, and how many have to have been compared."""
_EXACTLY = 1e-9

_CHANGES: dict[Intervention, str] = {"swap": "with another sample's audio", "silence": "with silence", "reverse": "with reversed audio"}


@dataclass(frozen=True, slots=True)
class Pooled:
    """The effect of one intervention over several passes, weighted by tokens; nats a token."""

    delta: float
    error: float
    passes: int
    exactly_nothing: bool

    @property
    def low(self) -> float:
        """The least that it may be."""
        return self.delta - ERRORS * self.error

    @property
    def high(self) -> float:
        """The most that it may be."""
        return self.delta + ERRORS * self.error

    def within(self, bound: float) -> bool:
        """Whether it is certainly nearer to 0 than ``bound``."""
        return -bound < self.low and self.high < bound

    def __str__(self) -> str:
        return f"{self.delta:.3f} ± {self.error:.3f}"


Effects = dict[Intervention, Pooled]


def pooled_verdict(records: Sequence[StepRecord]) -> Verdict | str:
    """Return the verdict over the newest counterfactual passes in ``records``, or why there is none yet.

    On audio tokens if the model predicts audio, else on text. Pure; see docs/verdict.md for what is decided how, and why so.

    Args:
        records: Of one run, oldest first.
    """
    modality: Modality = "audio" if any(_predicts_audio(record) for record in records) else "text"
    same = _reference_is_target(records, modality)
    if same is not None:
        return same
    passes = [record for record in records if record.counterfactual is not None]
    if not passes:
        return (records[-1].not_measured.get("counterfactual", "") if records else "") or "no counterfactual pass so far"
    newest = {name: _newest(passes, name, modality) for name in _CHANGES}
    effects = {name: _pooled(found) for name, found in newest.items() if len(found) >= LEAST_PASSES}
    if not effects:
        return f"counterfactual passes so far: {len(passes)}, and a verdict takes {LEAST_PASSES} that were measured on {modality} tokens"
    decide = _by_exchange if "swap" in effects else _without_exchange
    decided = decide(effects, modality, passes[-1].step)
    if isinstance(decided, str):
        return decided
    use, because = decided
    if use == "used" and modality == "audio" and not _codes_compared(records) and _needs_order(effects):
        share = effects["reverse"].delta / effects["swap"].delta
        use, because = "leaked", f"{_said(effects)}: {share:.0%} of what its own reference gives lies in the order of the frames"
    return Verdict(use, modality, max(pooled.passes for pooled in effects.values()), because, _evidence(effects, newest["swap"]))


def _by_exchange(effects: Effects, modality: Modality, step: int) -> tuple[Use, str] | str:
    """Decide from what another sample's audio costs, and where that is nothing from what silence and reversed audio cost."""
    swap, others = effects["swap"], {name: pooled for name, pooled in effects.items() if name != "swap"}
    seen = _said(effects)
    if swap.delta >= MATTERS and swap.low > 0:
        return "used", f"{seen}: at least {MATTERS} is use"
    if swap.within(NOTHING):
        if not others:
            return f"{seen}: nothing else was measured, and a batch of one voice would look like this, too"
        if all(pooled.within(MATTERS) for pooled in others.values()):
            return _ignored(effects, step)
        loud = [pooled for pooled in others.values() if abs(pooled.delta) >= MATTERS and not pooled.low <= 0 <= pooled.high]
        return ("weak", f"{seen}: the batches are of one voice, or only the presence of audio counts") if loud else _uncertain(seen)
    if swap.low > 0:
        return "weak", f"{seen}: certain, but less than {MATTERS}"
    return ("weak", f"{seen}: it is better off with another's audio") if swap.high < 0 else _uncertain(seen)


def _without_exchange(effects: Effects, modality: Modality, step: int) -> tuple[Use, str] | str:
    """Decide in batches of one, where nothing can be exchanged: silence may cost something only because it is strange."""
    seen = _said(effects)
    if all(pooled.within(NOTHING) for pooled in effects.values()):
        return _ignored(effects, step)
    reverse = effects.get("reverse")
    if modality == "text" and reverse is not None and reverse.delta >= MATTERS and reverse.low > 0:
        return "used", f"{seen}: the order of the frames counts"
    return f"{seen}: in batches of one there is no other sample's audio to tell whether it is this audio that counts"


def _ignored(effects: Effects, step: int) -> tuple[Use, str] | str:
    seen = _said(effects)
    if all(pooled.exactly_nothing for pooled in effects.values()):
        return "ignored", "the predictions are the same to the last digit, whatever the audio: it does not reach them"
    if step < EARLY:
        return f"{seen}: nothing so far, but in the first {EARLY} steps a model may not have learnt to listen yet"
    return "ignored", f"{seen}: less than {NOTHING} is nothing"


def _uncertain(seen: str) -> str:
    return f"{seen}: not certain yet, more passes or larger batches will tell"


def _needs_order(effects: Effects) -> bool:
    """Whether reversed audio matters, and certainly costs more than ``LEAK`` of what another's costs."""
    swap, reverse = effects.get("swap"), effects.get("reverse")
    if swap is None or reverse is None or reverse.delta < MATTERS:
        return False
    return reverse.delta - LEAK * swap.delta > ERRORS * math.hypot(reverse.error, LEAK * swap.error)


def _said(effects: Effects) -> str:
    return f"extra nats a token: {', '.join(f'{_CHANGES[name]} {pooled}' for name, pooled in effects.items())}"


def _predicts_audio(record: StepRecord) -> bool:
    told = record.counterfactual is not None and any(effect.modality == "audio" for effect in record.counterfactual.effects)
    labels = record.checks is not None and bool(record.checks.audio_labels)
    return told or labels or any(head.modality == "audio" for head in record.heads)


def _reference_is_target(records: Sequence[StepRecord], modality: Modality) -> Verdict | None:
    """Decide from the codes of references and targets, where both are codes."""
    checks = [record.checks for record in records if record.checks is not None]
    compared = sum(check.reference_compared or 0 for check in checks)
    matches = sum(check.reference_matches or 0 for check in checks)
    if compared < COMPARED or matches < SAME * compared:
        return None
    because = f"in {matches} of {compared} samples the codes of the reference are those of the target"
    evidence = {"reference_matches": float(matches), "reference_compared": float(compared), "bound_same": SAME}
    return Verdict("leaked", modality, sum(record.counterfactual is not None for record in records), because, evidence)


def _codes_compared(records: Sequence[StepRecord]) -> bool:
    """Whether references could be compared with their targets code by code: then the order of the frames has nothing to add."""
    return any(record.checks is not None and bool(record.checks.reference_compared) for record in records)


def _newest(passes: Sequence[StepRecord], intervention: Intervention, modality: Modality) -> list[Effect]:
    """Return the newest measured effects of an intervention, oldest first: three, and as many more as bring ``ENOUGH_SAMPLES``."""
    found: list[Effect] = []
    samples = 0
    for record in reversed(passes):
        effects = () if record.counterfactual is None else record.counterfactual.effects
        for effect in effects if len(found) < LEAST_PASSES or samples < ENOUGH_SAMPLES else ():
            if effect.intervention == intervention and effect.modality == modality and _is_measured(effect):
                found.insert(0, effect)
                samples += effect.samples
    return found


def _is_measured(effect: Effect) -> bool:
    return effect.tokens > 0 and effect.delta_loss is not None and math.isfinite(effect.delta_loss)


def _pooled(effects: Sequence[Effect]) -> Pooled:
    """Pool the measured effects of one intervention.

    The error is that over the samples of each pass; if a pass has none (one sample), that over the passes.
    """
    deltas, weights = [effect.delta_loss or 0.0 for effect in effects], [effect.tokens for effect in effects]
    total = sum(weights)
    delta = sum(weight * each for weight, each in zip(weights, deltas)) / total
    known = [effect.delta_loss_error for effect in effects if effect.delta_loss_error is not None]
    if len(known) == len(effects):
        spread = [weight * error for weight, error in zip(weights, known)]
    else:
        several = math.sqrt(len(deltas) / (len(deltas) - 1))
        spread = [weight * (each - delta) * several for weight, each in zip(weights, deltas)]
    exactly = all(abs(value or 0.0) <= _EXACTLY for effect in effects for value in (effect.delta_loss, effect.divergence))
    return Pooled(delta, math.hypot(*spread) / total, len(effects), exactly)


def _evidence(effects: Effects, swaps: Sequence[Effect]) -> dict[str, float]:
    """Return the numbers that decided, and the bounds."""
    numbers: dict[str, float] = {}
    for name, pooled in effects.items():
        numbers[f"delta_loss_{name}"] = pooled.delta
        numbers[f"delta_loss_{name}_error"] = pooled.error
    wins = [(effect.win_rate, effect.samples) for effect in swaps if effect.win_rate is not None and effect.samples]
    if wins:
        numbers["win_rate"] = sum(rate * samples for rate, samples in wins) / sum(samples for _, samples in wins)
    apart = [
        (effect.divergence, effect.divergence_tokens) for effect in swaps if effect.divergence is not None and effect.divergence_tokens
    ]
    if apart:
        numbers["divergence_swap"] = sum(value * tokens for value, tokens in apart) / sum(tokens for _, tokens in apart)
    return {**numbers, "bound_nothing": NOTHING, "bound_matters": MATTERS, "bound_leak": LEAK, "bound_errors": ERRORS}
