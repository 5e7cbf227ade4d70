"""Rules about the way of the audio into the model: is the encoder called, does its output vary, does it come through the projector."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from probe.findings.rule import History, Rule, Symptom
from probe.findings.rules.audio import given_placeholders
from probe.findings.rules.streaks import newest
from probe.records import Part, SiteStatistics, StepRecord

COLLAPSED = 1e-4
"""Spread by size below which an output counts as constant. Rounding in float32 leaves 1e-7 of equal values; in a freshly initialised small
Whisper encoder, where clips differ least of all, it is some 1e-3."""

DEAD = 1e-6
"""Size of the projector's output by the size of the encoder's. A freshly initialised linear layer gives 0.1 and more."""

UNSEEN_RECORDS = 8
"""Sampled steps without any audio after which it is said that the encoder is not used. In data of which half is text, eight in a row come
once in 256 times even with one sample a step."""


def encoder_not_called(history: History) -> list[Symptom] | None:
    """Judge the calls of the encoder against the audio among the inputs."""
    record = history.last
    conditioning = record.conditioning
    if conditioning is None or not conditioning.encoder or "statistics" in record.not_measured:
        return None
    if conditioning.encoder_calls:
        return []
    site = conditioning.encoder
    if _brings_audio(record):
        calls = newest(history, 2, lambda one: _calls(one) if _brings_audio(one) else None)
        if not calls or any(calls):
            return []
        message = "the batches bring audio, and the encoder was not called in the forward of 2 such sampled steps in a row"
        return [Symptom(message, site, {"calls": 0.0})]
    calls = newest(history, UNSEEN_RECORDS, _calls)
    if not calls or any(calls):
        return []
    message = f"no audio came in, and the encoder was not called, in {UNSEEN_RECORDS} sampled steps in a row"
    return [Symptom(message, site, {"calls": 0.0, "records": float(UNSEEN_RECORDS)}, "warning")]


def encoder_frozen(history: History) -> list[Symptom] | None:
    """Judge whether anything in the encoder trains."""
    part = _part(history.last, "audio_encoder")
    if part is None:
        return None
    if part.trainable_share > 0:
        return []
    conditioning = history.last.conditioning
    message = f"none of the encoder's {part.parameters:,} parameters trains (adapters in it aside)"
    return [Symptom(message, "" if conditioning is None else conditioning.encoder, {"trainable_share": 0.0})]


def encoder_collapsed_over_time(history: History) -> list[Symptom] | None:
    """Judge how much the encoder's output varies over the frames of a clip."""
    return _collapsed(history, "time_std", "over the frames of a clip", lambda record: True)


def encoder_collapsed_over_batch(history: History) -> list[Symptom] | None:
    """Judge how much the encoder's output varies over the clips of a batch, where these differ."""
    found = _collapsed(history, "batch_std", "over the clips of a batch", _clips_may_differ)
    if not found or _clips_differ(history.last):
        return found
    return [Symptom(symptom.message, symptom.site, symptom.evidence, "warning") for symptom in found]


def projector_dead(history: History) -> list[Symptom] | None:
    """Judge whether what the encoder says comes out of the projector."""
    if _through(history.last) is None:
        return None
    pairs = newest(history, 2, _through)
    if not pairs or not all(_dead(*pair) for pair in pairs):
        return []
    encoder, projector = pairs[-1]
    evidence = {"projector_rms": projector.rms or 0.0, "encoder_rms": encoder.rms or 0.0}
    if _cannot_recover(_part(history.last, "projector")):
        return [Symptom(_dead(encoder, projector), projector.site, evidence)]
    # A projector that starts at zero on purpose grows with its first updates; one that is still nothing after several does not.
    updated = newest(history, 3, lambda record: _through(record) if _updates(record) else None)
    if updated and all(_dead(*pair) for pair in updated):
        return [Symptom(_dead(encoder, projector), projector.site, evidence, "warning")]
    return []


def _collapsed(
    history: History, what: Literal["time_std", "batch_std"], words: str, judged: Callable[[StepRecord], bool]
) -> list[Symptom] | None:
    """Return a symptom for every encoder whose output varies by less than ``COLLAPSED`` of its size, in 2 records in a row."""
    found: list[Symptom] = []
    told = False
    for site in [row.site for row in history.last.statistics if row.role == "audio_encoder"]:
        ratios = newest(history, 2, lambda record, site=site: _ratio(record, site, what) if judged(record) else None)  # type: ignore[misc]
        told = told or ratios is not None
        if ratios and max(ratios) < COLLAPSED:
            message = f"the encoder's output varies {words} by {ratios[-1]:.1e} of its size (bound: {COLLAPSED:.0e}, twice in a row)"
            found.append(Symptom(message, site, {f"{what}_by_rms": ratios[-1], "bound": COLLAPSED}))
    return found if told else None


def _ratio(record: StepRecord, site: str, what: str) -> float | None:
    row = next((row for row in record.statistics if row.site == site), None)
    value = None if row is None else getattr(row, what)
    if row is None or value is None or row.rms is None:
        return None
    return float(value) / row.rms if row.rms else 0.0


def _clips_may_differ(record: StepRecord) -> bool:
    """Say whether nothing is known of the step's clips that makes them alike."""
    checks = record.checks
    if checks is None or checks.audio is None:
        return True
    alike = (checks.duplicated_rows, checks.audio.duplicated, checks.audio.constant, checks.audio.silent, checks.audio.nonfinite)
    return not any(alike)


def _clips_differ(record: StepRecord) -> bool:
    """Say whether the step's clips are known to be different ones (one clip may well stand in several rows, with other questions)."""
    checks = record.checks
    return checks is not None and checks.audio is not None and checks.audio.duplicated == 0


def _through(record: StepRecord) -> tuple[SiteStatistics, SiteStatistics] | None:
    """Return encoder and projector if both were called and their sizes are known; the encoder's is not 0."""
    encoder = next((row for row in record.statistics if row.role == "audio_encoder" and row.rms), None)
    projector = next((row for row in record.statistics if row.role == "projector" and row.rms is not None), None)
    return None if encoder is None or projector is None else (encoder, projector)


def _dead(encoder: SiteStatistics, projector: SiteStatistics) -> str:
    """Return what is dead about a projector's output, or ""."""
    size, before = projector.rms or 0.0, encoder.rms or 0.0
    if size < DEAD * before:
        return (
            f"the projector's output has an rms of {size:.1e}, and the encoder's of {before:.1e} (bound: {DEAD:.0e} of it, twice in a row)"
        )
    varies = min(spread for spread in (projector.std, projector.time_std, size) if spread is not None)
    fed = encoder.time_std is None or encoder.time_std >= COLLAPSED * before
    if varies < COLLAPSED * size and fed:
        return f"the projector's output varies by {varies / size:.1e} of its size (bound: {COLLAPSED:.0e}, twice in a row)"
    return ""


def _cannot_recover(part: Part | None) -> bool:
    """Say whether a part is known to be left as it is: it does not train, or no gradient reaches it."""
    if part is None:
        return False
    return part.trainable_share == 0 or part.gradient_norm == 0.0 or (part.tensors > 0 and part.without_gradient == part.tensors)


def _updates(record: StepRecord) -> bool:
    """Say whether the step's learning rate is above 0, or not known."""
    rates = record.optimisation.learning_rates if record.optimisation is not None else ()
    return not rates or max(rates) > 0


def _brings_audio(record: StepRecord) -> bool:
    """Say whether there are audio clips among the inputs, or placeholders for given audio in the text."""
    clips = record.checks.audio.clips if record.checks is not None and record.checks.audio is not None else 0
    counted = (record.inputs.audio_clips or 0) if record.inputs is not None else 0
    return bool(clips or counted or given_placeholders(record))


def _calls(record: StepRecord) -> int | None:
    return None if record.conditioning is None else record.conditioning.encoder_calls


def _part(record: StepRecord, name: str) -> Part | None:
    return next((part for part in record.parts if part.name == name), None)


RULES = (
    Rule(
        code="encoder-not-called",
        severity="critical",
        meaning="The audio encoder takes no part in the forward, although the batch brings audio: the model is trained as if there "
        "were none.",
        advice="Follow the features from the collator into model.forward: is the argument's name the one that forward takes "
        "(input_features, input_values, audio_features)? Does a flag or a missing placeholder skip the encoder? With "
        "remove_unused_columns=True the Trainer drops columns that forward does not name.",
        threshold="No call in 2 sampled steps in a row whose batches bring clips, or placeholders for given audio. A warning without "
        "audio among the inputs, in 8 sampled steps in a row (data that is half text has that once in 256 times at one sample a step).",
        check=encoder_not_called,
    ),
    Rule(
        code="encoder-frozen",
        severity="info",
        meaning="The audio encoder does not train. Often that is meant: a good encoder is kept, and projector and language model learn "
        "to read it.",
        advice="If it is not meant: set requires_grad_(True) on the encoder before the Trainer is built, and look for "
        "model.freeze_encoder() or freeze_feature_encoder().",
        threshold="No parameter of the encoder requires a gradient.",
        check=encoder_frozen,
    ),
    Rule(
        code="encoder-collapsed-over-time",
        severity="critical",
        meaning="Every frame of a clip comes out of the encoder alike. Of what is said when, nothing is left.",
        advice="Look at the features that go in (audio-constant?), at the weights of conv1 and of the final layer norm for zeros, and "
        "whether the checkpoint was loaded (from_pretrained warns of newly initialised weights).",
        threshold="Standard deviation over time below 1e-4 of the rms, in 2 sampled steps in a row. Rounding in float32 leaves 1e-7 of "
        "equal frames; positional embeddings alone give more than 0.1.",
        check=encoder_collapsed_over_time,
    ),
    Rule(
        code="encoder-collapsed-over-batch",
        severity="critical",
        meaning="Different clips come out of the encoder alike: the model cannot tell one recording, or one speaker, from another.",
        advice="Compare the encoder's output of two clips by hand. If they are equal, look for features that are overwritten after the "
        "collator, for a dead first convolution, and for a layer norm whose weight is 0.",
        threshold="Standard deviation over the clips below 1e-4 of the rms, in 2 sampled steps in a row whose clips are neither copies "
        "nor silent. In a freshly initialised small Whisper encoder, where positions outweigh content, it is some 1e-3. A warning "
        "where it is not known that the clips differ.",
        check=encoder_collapsed_over_batch,
    ),
    Rule(
        code="projector-dead",
        severity="critical",
        meaning="What the encoder says does not come through the projector: its output is nothing, or the same whatever goes in.",
        advice="Look at the projector's weights (all zero? loaded from the checkpoint?), at a gate or scale behind it, and at a ReLU "
        "whose inputs are all negative. A projector that starts at zero needs a learning rate above 0 and a gradient.",
        threshold="Rms below 1e-6 of the encoder's (a fresh linear layer gives 0.1), or spread below 1e-4 of its own rms while its "
        "input varies, in 2 sampled steps in a row. Where a gradient still reaches it, it may be about to grow: then a warning, after "
        "3 sampled steps with a learning rate above 0.",
        check=projector_dead,
    ),
)
