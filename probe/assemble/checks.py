"""What the batches of a step were checked for: the table of checks of a record."""

from __future__ import annotations

from probe.assemble.draft import Draft
from probe.capture.observers.audio_checks import CLIPS, FRAMES, MEL_BINS
from probe.capture.observers.batch_checks import AUDIO_LABELS, FINGERPRINT, IDS, LABELS, REFERENCE, ROWS, never_learnt
from probe.records import AudioChecks, BatchChecks, LabelChecks
from probe.sites.audio_inputs import every_frame_counts

_UNKNOWN_SCALE = (
    "not known what this model's feature extractor can give: no Whisper front end, and no WhisperFeatureExtractor among tokenizer="
)


def checks(draft: Draft) -> BatchChecks | None:
    """Return the checks of a step over all micro-batches and ranks; ``None`` if no batch was looked at."""
    rows = draft.host.cells[ROWS.name]
    if "checks" in draft.blind or not rows.counts["batches"]:
        return None
    ids, codes = draft.host.cells[IDS.name], draft.host.cells[REFERENCE.name]
    known, compared = bool(ids.counts["batches"]), bool(codes.counts["batches"])
    labels = draft.host.cells[AUDIO_LABELS.name]
    tokenizer = draft.run.tokenizer
    added_known = known and tokenizer is not None and tokenizer.added is not None
    fingerprint = draft.host.local.get(FINGERPRINT)
    return BatchChecks(
        rows=int(rows.counts["rows"]),
        duplicated_rows=int(rows.sums["duplicated"]),
        fingerprint=None if fingerprint is None else int(fingerprint[0]),
        ids_outside_tokenizer=int(ids.sums["outside"]) if known else None,
        added_ids=int(ids.sums["added"]) if added_known else None,
        labels=_labels(draft),
        audio=_audio(draft),
        audio_labels=int(labels.sums["labels"]) if labels.counts["batches"] else None,
        reference_compared=int(codes.sums["compared"]) if compared else None,
        reference_matches=int(codes.sums["matches"]) if compared else None,
    )


def _labels(draft: Draft) -> LabelChecks | None:
    values = draft.host.cells[LABELS.name]
    if not values.counts["batches"]:
        return None
    sums = {name: int(value) for name, value in values.sums.items()}
    masks, over_ids = bool(values.counts["masks"]), bool(values.counts["over_ids"])
    facts, prefix = draft.run.facts, values.maxima["common_prefix"]
    return LabelChecks(
        labelled=sums["labelled"],
        on_padding=sums["on_padding"] if masks else None,
        padding_runs=None if facts.padding_token is None else sums["padding_runs"],
        on_placeholders=sums["on_placeholders"] if over_ids and never_learnt(facts, draft.run.sites.sites) else None,
        outside_vocabulary=None if facts.vocabulary is None else sums["outside_vocabulary"],
        compared=sums["compared"],
        same=sums["same"],
        next=sums["next"],
        previous=sums["previous"],
        common_prefix=int(prefix) if prefix >= 0 else None,
    )


def _audio(draft: Draft) -> AudioChecks | None:
    clips, frames = draft.host.cells[CLIPS.name], draft.host.cells[FRAMES.name]
    if "audio_checks" in draft.blind or not clips.counts["batches"]:
        return None
    sums, count = {name: int(value) for name, value in clips.sums.items()}, int(clips.counts["clips"])
    waveform, scale = bool(clips.counts["waveforms"]), draft.run.log_mel_scale
    if scale is None:
        draft.reasons.setdefault("inputs/audio_scale", _UNKNOWN_SCALE)
    low, high = clips.minimum("minimum_negated"), clips.maxima["maximum"]
    placeholders = int(frames.sums["placeholders"]) if frames.counts["batches"] else None
    return AudioChecks(
        kind="waveform" if waveform else "log-mel",
        clips=count,
        nonfinite=sums["nonfinite"],
        constant=sums["constant"],
        silent=sums["silent"],
        clipped=sums["clipped"] if waveform else None,
        off_scale=None if waveform or scale is None else sums["off_scale"],
        band_limited=None if waveform or scale is None or scale.upper_bin is None else sums["band_limited"],
        minimum=low if low <= high else None,
        maximum=high if low <= high else None,
        mel_bins=draft.host.facts.get(MEL_BINS),
        placeholders=placeholders,
        frames=int(frames.counts["rows"]) if placeholders is not None else None,
        valid_frames=_valid_frames(draft, placeholders, count),
        duplicated=int(draft.host.cells[ROWS.name].sums["duplicated_clips"]),
    )


def _valid_frames(draft: Draft, placeholders: int | None, clips: int) -> int | None:
    """Return how many frames the placeholders stand for.

    One placeholder a clip is how older models ask for room that they make themselves: then their number says nothing.
    """
    frames = draft.host.cells[FRAMES.name].counts
    if placeholders is None or placeholders == clips:
        return None
    if every_frame_counts(draft.run.facts.model_type):
        return int(frames["rows"])
    return int(draft.host.cells[FRAMES.name].sums["valid"]) if frames["masked"] == frames["batches"] else None
