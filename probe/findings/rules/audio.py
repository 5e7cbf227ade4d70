"""Rules about audio and the model that is to hear it: is there any, has it the right mel bins, are there as many placeholders as frames."""

from __future__ import annotations

from probe.findings.rule import History, Rule, Symptom
from probe.findings.rules.model_kind import is_encoder_decoder
from probe.findings.rules.streaks import newest
from probe.records import AudioChecks, StepRecord

EMPTY_RECORDS = 8
"""Sampled steps whose features are all empty. In data of which half is text, eight in a row come once in 256 times at one sample a step."""

_GIVEN = ("audio_token_id", "audio_token_index", "audio_in_token_idx", "audio_prompt_token_id")
_SEGMENT_STARTS = ("audio_in_ids_start", "audio_out_ids_start")


def audio_empty(history: History) -> list[Symptom] | None:
    """Judge whether audio features without any clip or frame came with a text that speaks of audio."""
    checks = _checks(history.last)
    if checks is None or not _has_encoder(history.last):
        return None
    placeholders = given_placeholders(history.last)
    if not _empty(checks):
        return []
    if not placeholders and not is_encoder_decoder(history):
        return _never_any(history)  # a text-only batch: a model of this kind gets features of no clip then
    told = f"{placeholders:,} audio placeholders stand in input_ids" if placeholders else "an encoder-decoder has nothing else to go by"
    held = "hold no clip" if not checks.clips else f"of {checks.clips:,} clips gave no frame"
    return [
        Symptom(f"the audio features {held}, and {told}", evidence={"clips": float(checks.clips), "placeholders": float(placeholders or 0)})
    ]


def _never_any(history: History) -> list[Symptom]:
    """Return a symptom if the features were empty for so long that the data can hardly be half text."""
    empty = newest(history, EMPTY_RECORDS, lambda record: _empty(checks) if (checks := _checks(record)) is not None else None)
    if not empty or not all(empty):
        return []
    message = f"the audio features held no clip in {EMPTY_RECORDS} sampled steps in a row, and no placeholder asks for one"
    return [Symptom(message, evidence={"clips": 0.0, "records": float(EMPTY_RECORDS)}, severity="warning")]


def mel_count_wrong(history: History) -> list[Symptom] | None:
    """Judge the features' mel bins against those that the encoder takes."""
    checks, setup = _checks(history.last), history.setup
    if checks is None or checks.mel_bins is None or setup is None or setup.mel_bins is None:
        return None
    if checks.mel_bins == setup.mel_bins:
        return []
    message = f"the features have {checks.mel_bins} mel bins, and the encoder takes {setup.mel_bins}"
    return [Symptom(message, evidence={"mel_bins": float(checks.mel_bins), "encoder": float(setup.mel_bins)})]


def audio_tokens_mismatch(history: History) -> list[Symptom] | None:
    """Judge the number of audio placeholders against the frames that are to fill them."""
    counted = newest(history, 2, lambda record: None if is_encoder_decoder(history) else _counted(record))
    if counted is None:
        return None
    told = [_mismatch(*each) for each in counted]
    if not told or not all(told):
        return []
    checks, placeholders, _ = counted[-1]
    numbers = {"placeholders": placeholders, "frames": checks.frames, "valid_frames": checks.valid_frames, "clips": checks.clips}
    return [Symptom(told[-1], evidence={name: float(number) for name, number in numbers.items() if number is not None})]


def given_placeholders(record: StepRecord) -> int | None:
    """Return how many placeholders of ``input_ids`` stand for audio that the model is given; ``None`` where the config names none."""
    tokens = () if record.conditioning is None else record.conditioning.tokens
    counts = [count for name, count in tokens if name in _GIVEN]
    return sum(counts) if counts else None


def _empty(checks: AudioChecks) -> bool:
    return not checks.clips or checks.frames == 0


def _counted(record: StepRecord) -> tuple[AudioChecks, int, bool] | None:
    """Return the checks, the placeholders, and whether there is one a clip; ``None`` where there is nothing to compare."""
    checks, placeholders = _checks(record), given_placeholders(record)
    if checks is None or placeholders is None or not checks.frames or not _has_encoder(record):
        return None
    names = {tensor.name for tensor in record.inputs.tensors} if record.inputs is not None else set()
    return checks, placeholders, any(name in names for name in _SEGMENT_STARTS)


def _mismatch(checks: AudioChecks, placeholders: int, one_a_clip: bool) -> str:
    """Return what does not fit, or ""."""
    if placeholders == checks.clips:
        return ""  # one a clip: the model makes room for the frames itself
    if placeholders == 0:
        return f"the encoder gave {checks.frames:,} frames, and no audio placeholder stands in input_ids for them"
    if one_a_clip:
        return f"{placeholders:,} audio placeholders in input_ids for {checks.clips:,} clips: this model takes one a clip"
    if checks.valid_frames is not None and placeholders != checks.valid_frames:
        return (
            f"{placeholders:,} audio placeholders in input_ids, and {checks.valid_frames:,} frames to fill them with (they must be as many)"
        )
    if checks.frames is not None and placeholders > checks.frames:
        return f"{placeholders:,} audio placeholders in input_ids, and only {checks.frames:,} frames to fill them with"
    return ""


def _has_encoder(record: StepRecord) -> bool:
    return record.conditioning is not None and bool(record.conditioning.encoder)


def _checks(record: StepRecord) -> AudioChecks | None:
    return None if record.checks is None else record.checks.audio


RULES = (
    Rule(
        code="audio-empty",
        severity="critical",
        meaning="The audio features of the batch are empty (a dimension is 0), although the text says that there is audio. The model "
        "is trained without what it is to listen to.",
        advice="Print the shape of the features in the collator. Look for a filter that drops every clip (too long, too short), and "
        "for a flag of the collator that leaves the reference out.",
        threshold="None: no clip, or no frame, in all micro-batches of a step, while placeholders of given audio stand in input_ids "
        "(or the model is an encoder-decoder). Text-only batches are not meant: without placeholders a warning, after 8 sampled steps "
        "in a row of empty features.",
        check=audio_empty,
    ),
    Rule(
        code="mel-count-wrong",
        severity="critical",
        meaning="The features have another number of mel bins than the encoder takes (80 for Whisper up to large-v2, 128 from large-v3 "
        "on), or their dimensions are swapped.",
        advice="Make the features with the feature extractor of the very checkpoint (feature_size is its mel count); they are (batch, "
        "mel, frames).",
        threshold="They must be equal.",
        check=mel_count_wrong,
    ),
    Rule(
        code="audio-tokens-mismatch",
        severity="critical",
        meaning="The text holds another number of audio placeholders than the encoder gives frames. What is over is dropped, or "
        "embeddings land at the wrong places; with no placeholder at all the audio never reaches the language model.",
        advice="Let the model's processor write the text and count the placeholders; do not write the audio token by hand, and "
        "truncate neither text nor audio behind it (max_length cuts placeholders off).",
        threshold="In 2 sampled steps with audio in a row: more placeholders than frames, or another number than valid frames where "
        "the model's own length rule is known, or none. One placeholder a clip is right where a model makes room for the frames itself.",
        check=audio_tokens_mismatch,
    ),
)
