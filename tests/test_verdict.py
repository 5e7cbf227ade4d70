"""The verdict from hand-made counterfactual passes."""

from __future__ import annotations

import math
import random
from dataclasses import replace
from typing import Any

import pytest

from probe.findings.verdict import EARLY, ENOUGH_SAMPLES, ERRORS, LEAK, MATTERS, NOTHING, pooled_verdict
from probe.records import BatchChecks, Counterfactual, Effect, Intervention, Modality, StepRecord, Verdict
from records_factory import speech_record, whisper_record

pytestmark = pytest.mark.pure  # of torch and probe alone: the same with every transformers

LATE = 4 * EARLY


def effect(intervention: Intervention, delta: float | None, error: float | None = 0.002, **changes: Any) -> Effect:
    given: dict[str, Any] = {"modality": "audio", "samples": 8, "tokens": 160, "loss": 1.0, "divergence": 0.4, "divergence_tokens": 64}
    return Effect(intervention, **{**given, "delta_loss": delta, "delta_loss_error": error, **changes})


def passes(*steps: int, modality: Modality = "audio", checks: BatchChecks | None = None, **deltas: float) -> list[StepRecord]:
    """One record a step, with one effect an intervention named in ``deltas``."""
    names: tuple[Intervention, ...] = ("swap", "silence", "reverse")
    effects = tuple(effect(name, deltas[name], modality=modality) for name in names if name in deltas)
    return [whisper_record(step, counterfactual=Counterfactual(("input_features",), effects), checks=checks) for step in steps]


def verdict(records: list[StepRecord]) -> Verdict:
    found = pooled_verdict(records)
    assert isinstance(found, Verdict), found
    return found


def late(**given: Any) -> list[StepRecord]:
    return passes(LATE, LATE + 100, LATE + 200, **given)


def test_a_costly_exchange_is_use() -> None:
    """Another sample's audio that costs what matters, for certain, is use, with its numbers and the bounds as evidence."""
    found = verdict(late(swap=0.4, silence=1.5, reverse=0.01))
    assert (found.use, found.modality, found.passes) == ("used", "audio", 3)
    assert found.evidence["delta_loss_swap"] == pytest.approx(0.4)
    assert found.evidence["delta_loss_silence"] == pytest.approx(1.5)
    assert found.evidence["bound_matters"] == MATTERS
    assert found.evidence["divergence_swap"] == pytest.approx(0.4)
    assert "0.400" in found.because


@pytest.mark.parametrize("swap", [MATTERS - 1e-4, NOTHING + 0.01])
def test_less_than_matters_is_weak(swap: float) -> None:
    """A certain effect just below the bound is weak, at the bound it is use."""
    assert verdict(late(swap=swap, silence=0.2, reverse=0.0)).use == "weak"
    assert verdict(late(swap=MATTERS, silence=0.2, reverse=0.0)).use == "used"


def test_nothing_costs_anything_is_ignored() -> None:
    """Neither another's audio nor silence costs anything: ignored; up to the bounds, which the standard errors count against."""
    assert verdict(late(swap=0.001, silence=0.001, reverse=0.0)).use == "ignored"
    assert verdict(late(swap=-0.001, silence=0.03, reverse=-0.01)).use == "ignored"
    pooled_error = 0.002 / math.sqrt(3)
    assert verdict(late(swap=NOTHING - ERRORS * pooled_error - 1e-6, silence=0.0, reverse=0.0)).use == "ignored"
    assert verdict(late(swap=NOTHING - ERRORS * pooled_error + 1e-6, silence=0.0, reverse=0.0)).use == "weak"


def test_one_voice_in_the_batch_is_not_ignored() -> None:
    """Where exchange costs nothing but silence does, the batches may be of one voice."""
    found = verdict(late(swap=0.001, silence=0.9, reverse=0.0))
    assert found.use == "weak"
    assert "one voice" in found.because
    assert verdict(late(swap=0.001, silence=0.0, reverse=0.9)).use == "weak"


def test_exchange_alone_does_not_tell_ignored() -> None:
    """Without silence and reversed audio an exchange that costs nothing tells nothing."""
    assert "one voice" in str(pooled_verdict(late(swap=0.0001)))


def test_the_order_of_frames_gives_a_leak_away() -> None:
    """Of a model that predicts audio, reversed audio that costs a third of what another's does is a leak; text needs the order."""
    assert verdict(late(swap=2.0, silence=4.0, reverse=1.2)).use == "leaked"
    assert "60%" in verdict(late(swap=2.0, silence=4.0, reverse=1.2)).because
    assert verdict(late(swap=2.0, silence=4.0, reverse=LEAK * 2.0)).use == "used"
    assert verdict(late(swap=2.0, silence=4.0, reverse=1.2, modality="text")).use == "used"
    assert verdict(late(swap=0.06, silence=4.0, reverse=MATTERS - 0.001)).use == "used"


def test_a_leak_is_certain_or_not_said() -> None:
    """The order has to cost more than its share beyond the errors of both numbers."""
    edge = LEAK * 1.0 + ERRORS * math.hypot(0.002, LEAK * 0.002) / math.sqrt(3)
    assert verdict(late(swap=1.0, silence=1.0, reverse=edge + 1e-5)).use == "leaked"
    assert verdict(late(swap=1.0, silence=1.0, reverse=edge - 1e-5)).use == "used"


def test_compared_codes_go_before_the_order_of_frames() -> None:
    """Where the codes of references are known not to be their targets', the order of the frames accuses nobody."""
    apart = BatchChecks(8, reference_compared=8, reference_matches=0)
    assert verdict(late(swap=2.0, silence=4.0, reverse=1.9, checks=apart)).use == "used"
    unknown = BatchChecks(8)
    assert verdict(late(swap=2.0, silence=4.0, reverse=1.9, checks=unknown)).use == "leaked"


def test_matching_codes_are_a_leak() -> None:
    """References whose codes are the targets' codes are a leak, with or without passes; few compared or few alike are not."""
    checks = BatchChecks(4, reference_compared=4, reference_matches=4)
    assert verdict([whisper_record(5, checks=checks)]).use == "leaked"
    assert verdict(late(swap=0.4, silence=0.5, reverse=0.0, checks=checks)).use == "leaked"
    assert isinstance(pooled_verdict([whisper_record(5, checks=BatchChecks(3, reference_compared=3, reference_matches=3))]), str)
    few = BatchChecks(40, reference_compared=40, reference_matches=35)
    assert verdict(late(swap=0.4, silence=0.5, reverse=0.0, checks=few)).use == "used"


def test_fewer_than_three_passes_give_a_reason() -> None:
    """No verdict before three passes; without any, the reason is the record's own."""
    assert "so far: 2" in str(pooled_verdict(late(swap=0.4, silence=1.0)[:2]))
    assert pooled_verdict([whisper_record(5, not_measured={"counterfactual": "no condition found"})]) == "no condition found"
    assert isinstance(pooled_verdict([]), str)
    assert "measured on text tokens" in str(pooled_verdict(passes(1, 2, 3)))


def test_an_intervention_counts_from_three_passes_on() -> None:
    """Silence that was measured in two passes decides nothing; that the newest batch was of one sample leaves three older exchanges."""
    records = [*passes(LATE, swap=0.0), *passes(LATE + 1, LATE + 2, swap=0.0, silence=1.0)]
    assert isinstance(pooled_verdict(records), str)
    assert verdict([*late(swap=0.4, silence=1.0, reverse=0.0), *passes(LATE + 300, silence=1.0, reverse=0.0)]).use == "used"


def test_early_in_training_nothing_is_called_ignored() -> None:
    """In its first steps a model may not have learnt to listen; only predictions that are the same to the last digit tell at once."""
    early = passes(EARLY - 3, EARLY - 2, EARLY - 1, swap=1e-6, silence=1e-4, reverse=0.0)
    assert "may not have learnt" in str(pooled_verdict(early))
    assert verdict(passes(EARLY - 2, EARLY - 1, EARLY, swap=1e-6, silence=1e-4, reverse=0.0)).use == "ignored"
    nothing = tuple(effect(name, 0.0, 0.0, divergence=0.0) for name in ("swap", "silence"))
    dead = [whisper_record(step, counterfactual=Counterfactual(("input_features",), nothing)) for step in (1, 2, 3)]
    assert verdict(dead).use == "ignored"
    assert "last digit" in verdict(dead).because
    moved = tuple(effect(name, 0.0, 0.0, divergence=1e-6) for name in ("swap", "silence"))
    alive = [whisper_record(step, counterfactual=Counterfactual(("input_features",), moved)) for step in (1, 2, 3)]
    assert isinstance(pooled_verdict(alive), str)


def test_a_large_error_gives_no_verdict() -> None:
    """An effect that may be nothing or may matter is not certain yet, whatever its mean."""
    for swap in (0.01, 0.03, 0.4, -0.03):
        effects = tuple(effect(name, value, 0.4) for name, value in (("swap", swap), ("silence", 0.0)))
        records = [whisper_record(step, counterfactual=Counterfactual(("x",), effects)) for step in (LATE, LATE + 1, LATE + 2)]
        assert "not certain" in str(pooled_verdict(records)), swap


def test_silence_that_is_not_certain_keeps_ignored_back() -> None:
    """Exchange that costs nothing, and silence of which that is not known, are no verdict."""
    effects = (effect("swap", 0.0), effect("silence", 0.06, 0.4))
    records = [whisper_record(step, counterfactual=Counterfactual(("x",), effects)) for step in (LATE, LATE + 1, LATE + 2)]
    assert "not certain" in str(pooled_verdict(records))
    assert "not certain" in str(pooled_verdict(late(swap=0.0, silence=MATTERS - 0.001, reverse=0.0)))


def test_better_off_with_anothers_audio_is_weak() -> None:
    """A model that predicts better under another's audio does not use its own, and does not ignore it."""
    assert verdict(late(swap=-0.3, silence=0.2, reverse=0.0)).use == "weak"


def test_batches_of_one_are_judged_by_silence_and_order() -> None:
    """Without exchange: ignored if nothing changes, used if text needs the order, else it cannot be told."""
    assert verdict(late(silence=0.001, reverse=0.001)).use == "ignored"
    assert verdict(late(silence=2.0, reverse=1.0, modality="text")).use == "used"
    assert "batches of one" in str(pooled_verdict(late(silence=2.0, reverse=1.0)))
    assert "batches of one" in str(pooled_verdict(late(silence=2.0, reverse=0.0, modality="text")))
    assert isinstance(pooled_verdict(passes(1, 2, 3, silence=0.001, reverse=0.001)), str)
    effects = (effect("silence", 2.0, modality="text"), effect("reverse", 0.3, 0.4, modality="text"))
    assert "batches of one" in str(
        pooled_verdict([whisper_record(step, counterfactual=Counterfactual(("x",), effects)) for step in (LATE, LATE + 1, LATE + 2)])
    )


def test_audio_tokens_decide_where_audio_is_predicted() -> None:
    """Text that does not depend on the reference says nothing against a model that predicts audio."""
    both = tuple(
        effect(name, value, modality=modality)
        for modality, values in (("text", (0.0, 0.0)), ("audio", (0.4, 1.0)))
        for name, value in zip(("swap", "silence"), values, strict=True)
    )
    records = [whisper_record(step, counterfactual=Counterfactual(("x",), both)) for step in (LATE, LATE + 1, LATE + 2)]
    assert (verdict(records).use, verdict(records).modality) == ("used", "audio")
    unscored = late(swap=0.0, silence=0.0, modality="text", checks=BatchChecks(2, audio_labels=40))
    assert "audio tokens" in str(pooled_verdict(unscored))
    heads = speech_record().heads
    assert "audio tokens" in str(pooled_verdict([replace(record, heads=heads) for record in late(swap=0.0, silence=0.0, modality="text")]))
    assert verdict(late(swap=0.0, silence=0.0, modality="text", checks=BatchChecks(2, audio_labels=0))).use == "ignored"


def test_pooling_is_the_mean_over_tokens() -> None:
    """Effect and error are those of the samples of all passes together, weighted by tokens."""
    rng = random.Random(3)
    drawn = [(rng.uniform(0.5, 1.5), rng.uniform(0.01, 0.05), rng.randint(50, 300)) for _ in range(4)]
    records = [
        whisper_record(step, counterfactual=Counterfactual(("x",), (effect("swap", delta, error, tokens=tokens),)))
        for step, (delta, error, tokens) in enumerate(drawn, LATE)
    ]
    total = sum(tokens for *_, tokens in drawn)
    evidence = verdict(records).evidence
    assert evidence["delta_loss_swap"] == pytest.approx(sum(delta * tokens for delta, _, tokens in drawn) / total)
    assert evidence["delta_loss_swap_error"] == pytest.approx(math.sqrt(sum((e * n / total) ** 2 for _, e, n in drawn)))


def test_the_error_of_batches_of_one_is_that_over_passes() -> None:
    """Where a pass has no error of its own, the spread of the passes is the error: that of a mean of equally long passes."""
    deltas = (0.2, 0.5, 0.8, 0.3)
    records = [
        whisper_record(step, counterfactual=Counterfactual(("x",), (effect("swap", delta, None, samples=1),)))
        for step, delta in enumerate(deltas, LATE)
    ]
    mean = sum(deltas) / 4
    expected = math.sqrt(sum((delta - mean) ** 2 for delta in deltas) / 3 / 4)
    found = pooled_verdict(records)
    assert f"± {expected:.3f}" in (found if isinstance(found, str) else found.because)


def test_only_the_newest_passes_count() -> None:
    """What a model did long ago does not weigh on what it does now: no more passes than bring enough samples, but three."""
    count = ENOUGH_SAMPLES // 8
    old, new = range(LATE, LATE + 20), range(LATE + 20, LATE + 20 + count)
    found = verdict([*passes(*old, swap=0.0, silence=0.0), *passes(*new, swap=0.4, silence=1.0)])
    assert (found.passes, found.evidence["delta_loss_swap"]) == (count, pytest.approx(0.4))
    many = [
        whisper_record(step, counterfactual=Counterfactual(("x",), (effect("swap", delta, samples=500),)))
        for step, delta in enumerate((9.0, 0.4, 0.4, 0.4), LATE)
    ]
    assert (verdict(many).passes, verdict(many).evidence["delta_loss_swap"]) == (3, pytest.approx(0.4))


def test_unmeasured_and_non_finite_effects_are_left_out() -> None:
    """An effect without tokens, without a number or with one that is none does not enter."""
    odd = [
        whisper_record(LATE + 900 + index, counterfactual=Counterfactual(("x",), (each,)))
        for index, each in enumerate((effect("swap", None), effect("swap", math.nan), effect("swap", 9.0, tokens=0)))
    ]
    found = verdict([*late(swap=0.4, silence=1.0), *odd])
    assert (found.passes, found.evidence["delta_loss_swap"]) == (3, pytest.approx(0.4))


def test_the_win_rate_is_evidence() -> None:
    """Win rates are pooled over samples."""
    records = [
        whisper_record(step, counterfactual=Counterfactual(("x",), (effect("swap", 0.4, win_rate=rate, samples=samples),)))
        for step, rate, samples in ((LATE, 1.0, 8), (LATE + 1, 0.5, 4), (LATE + 2, 0.75, 4))
    ]
    assert verdict(records).evidence["win_rate"] == pytest.approx((8 + 2 + 3) / 16)
