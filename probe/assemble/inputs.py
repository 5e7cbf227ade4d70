"""What went into the model: the input tables of a record and the ``probe/input/…`` metrics."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby

import numpy as np

from probe.assemble.draft import Draft, ratio
from probe.capture.observers.inputs import CELL, CODES
from probe.measure.clips import COLUMNS as CLIP_COLUMNS
from probe.measure.statistics import COLUMNS_MAXIMA, COLUMNS_SUMS, finish
from probe.records import AudioSegment, Inputs, InputSample, InputTensor
from probe.sites.batch import AUDIO_FEATURES

_METRICS = ("samples", "padding_share", "labels_masked_share", "ids_outside_vocabulary", "audio_clips", "audio_clips_constant")


def inputs(draft: Draft) -> Inputs | None:
    """Return the input tables, and enter the metrics over all micro-batches and ranks; ``None`` if no input was looked at."""
    if "inputs" in draft.blind:
        for name in _METRICS:
            draft.measure(f"probe/input/{name}", None, draft.blind["inputs"])
        return None
    values = draft.host.cells[CELL.name]
    counts, sums = values.counts, values.sums
    draft.measure("probe/input/samples", counts["samples"] or None, "no training forward of the model was seen in this step")
    padding = draft.measure(
        "probe/input/padding_share",
        ratio(sums["padding"], counts["tokens"]),
        "no attention_mask of the shape of input_ids among the inputs",
    )
    masked = draft.measure(
        "probe/input/labels_masked_share", ratio(sums["labels_masked"], counts["label_positions"]), "no text labels (B, S) among the inputs"
    )
    unknown = draft.run.facts.vocabulary is None
    no_ids = "the model has no input embedding whose rows could be counted" if unknown else "no input_ids among the inputs"
    outside = draft.measure("probe/input/ids_outside_vocabulary", sums["ids_outside"] if counts["ids"] and not unknown else None, no_ids)
    clips = counts["clips"] if any(name in draft.host.facts.get("inputs", {}) for name in AUDIO_FEATURES) or counts["clips"] else None
    none = f"no audio features among the inputs (looked for {', '.join(AUDIO_FEATURES)})"
    if counts["batches_without_clips"]:
        empty = int(counts["batches_without_clips"])
        draft.reasons["inputs/audio"] = f"{empty} micro-batches brought audio features with 0 clips (shape[0] == 0)"
    draft.measure("probe/input/audio_clips", clips, none)
    constant = draft.measure("probe/input/audio_clips_constant", sums["clips_constant"] if clips is not None else None, none)
    return Inputs(
        micro_batches=int(draft.count("step", "micro_batches")),
        samples=int(counts["samples"]),
        tensors=tuple(_tensors(draft)),
        shown=tuple(_samples(draft)),
        audio=(*_token_segments(draft), *_clips(draft)),
        padding_share=padding,
        labels_masked_share=masked,
        ids_outside_vocabulary=None if outside is None else int(outside),
        audio_clips=None if clips is None else int(clips),
        audio_clips_constant=None if constant is None else int(constant),
    )


def audio_codes(draft: Draft) -> int | None:
    """Return the number of positions that hold discrete audio codes, or ``None`` if no input holds codes."""
    values = draft.host.cells[CODES.name]
    return int(values.sums["positions"]) if values.counts["batches"] else None


def _tensors(draft: Draft) -> Iterator[InputTensor]:
    for name, (shape, dtype, device, scalar) in draft.host.facts.get("inputs", {}).items():
        packed = draft.host.local.get(f"input:{name}")
        if packed is None:  # a plain number; or a tensor whose statistics were over budget, which is named
            value = None if scalar is None else float(scalar)
            yield InputTensor(name, shape, dtype, device, minimum=value, maximum=value)
            continue
        elements = int(np.prod(shape))
        split = len(COLUMNS_SUMS)
        found = finish(elements, dict(zip(COLUMNS_SUMS, packed[:split])), dict(zip(COLUMNS_MAXIMA, packed[split:])))
        note = "empty" if elements == 0 else f"{found.nonfinite} non-finite values" if found.nonfinite else ""
        is_float = "float" in dtype
        if is_float and elements > 1 and found.minimum is not None and found.minimum == found.maximum:
            note = "constant"
        first = tuple(int(v) for v in draft.host.local.get(f"first:{name}", ()))
        yield InputTensor(name, shape, dtype, device, found.minimum, found.maximum, found.mean if is_float else None, first, note)


def _samples(draft: Draft) -> Iterator[InputSample]:
    ids, labels = draft.host.local.get("ids"), draft.host.local.get("labels")
    decoder = draft.run.decoder
    for i in range(max(len(table) if table is not None else 0 for table in (ids, labels))):
        mine = tuple(int(v) for v in ids[i]) if ids is not None and i < len(ids) else ()
        wanted = tuple(int(v) for v in labels[i] if v != -100) if labels is not None and i < len(labels) else ()
        yield InputSample(i, mine, decoder.text(mine) if mine else None, wanted, decoder.text(wanted) if wanted else None)
    if decoder.reason and (ids is not None or labels is not None):
        draft.reasons["inputs/text"] = decoder.reason


def _token_segments(draft: Draft) -> Iterator[AudioSegment]:
    """Yield the runs of audio placeholders in the samples that are shown."""
    placeholders = set(draft.run.facts.audio_placeholders)
    for sample, ids in enumerate(draft.host.local.get("ids", ())):
        position = 0
        for is_audio, run in groupby(ids, key=lambda value: int(value) in placeholders):
            length = len(list(run))
            if is_audio:
                yield AudioSegment(sample, position, length, "tokens")
            position += length


def _clips(draft: Draft) -> Iterator[AudioSegment]:
    """Yield the first audio clips of the first micro-batch: how long they sound."""
    rate = draft.run.frames_per_second
    for sample, row in enumerate(draft.host.local.get("clips", ())):
        yield _clip(sample, dict(zip(CLIP_COLUMNS, row)), rate)


def _clip(sample: int, clip: dict[str, float], rate: float | None) -> AudioSegment:
    frames, sounding = int(clip["frames"]), int(clip["sounding"])
    note = "empty" if frames == 0 else "constant" if clip["constant"] else f"of {frames} frames" if sounding < frames else ""
    return AudioSegment(sample, 0, sounding, "frames", None if rate is None else sounding / rate, note)


def placeholder_counts(draft: Draft) -> Sequence[tuple[str, int]]:
    """Return how often each special audio token of the config stands in ``input_ids``, over all micro-batches and ranks."""
    values = draft.host.cells["audio_tokens"]
    return [(name, int(count)) for name, count in values.sums.items()] if values.counts["batches"] else []
