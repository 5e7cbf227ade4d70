"""What ``InputLoggerCallback`` shows: every input by name, the audio segments, and the text that the ids stand for."""

from __future__ import annotations

from probe.records import AudioSegment, Inputs, InputSample, InputTensor, StepRecord
from probe.sections.blocks import Block, Column, Fact, Facts, Section, Table
from probe.sections.numbers import counted, dtype, fixed, ids, interval, number, passage, shape, share
from probe.sections.reasons import INPUT, Reasons

_SHOWN_SEGMENTS = 6
_SHOWN_SAMPLES = 2
_FIRST_VALUES = 6
_FIRST_IDS = 24
_CHARACTERS = 480


def section(record: StepRecord) -> Section:
    """Return the section "Input" of a record."""
    reasons = Reasons(record, INPUT)
    inputs = record.inputs
    if inputs is None:
        return Section(INPUT, record.step, (_missing("Inputs", reasons, "inputs", "input", "probe/input"), *reasons.rest()))
    blocks: list[Block] = [_shares(inputs, record.ranks, reasons), _tensors(inputs.tensors, reasons)]
    blocks += _segments(inputs, reasons)
    blocks += _samples(inputs.shown, reasons)
    return Section(INPUT, record.step, (*blocks, *reasons.rest()))


def _shares(inputs: Inputs, ranks: int, reasons: Reasons) -> Facts:
    over = f"{counted(inputs.samples, 'sample')} in {counted(inputs.micro_batches, 'micro-batch')}"
    outside = inputs.ids_outside_vocabulary
    outside_fact = reasons.fact(
        "Ids outside vocabulary",
        None if outside is None else counted(outside, "token"),
        "probe/input/ids_outside_vocabulary",
        "inputs/ids_outside_vocabulary",
    )
    if outside:
        outside_fact = Fact(outside_fact.label, outside_fact.value, "warning")
    return Facts(
        (
            Fact("Step", f"{over}, {counted(ranks, 'rank')}" if ranks > 1 else over),
            reasons.fact("Padding", _of(inputs.padding_share, "token positions"), "probe/input/padding_share", "inputs/padding_share"),
            reasons.fact(
                "Labels masked",
                _of(inputs.labels_masked_share, "label positions are -100"),
                "probe/input/labels_masked_share",
                "inputs/labels_masked_share",
                "inputs/labels",
            ),
            outside_fact,
        )
    )


def _missing(label: str, reasons: Reasons, *keys: str) -> Facts:
    return Facts((Fact(label, reasons.missing(*keys), "missing"),))


def _of(value: float | None, what: str) -> str | None:
    return None if value is None else f"{share(value)} of {what}"


def _tensors(tensors: tuple[InputTensor, ...], reasons: Reasons) -> Block:
    if not tensors:
        return _missing("Tensors", reasons, "inputs/tensors")
    devices = sorted({tensor.device for tensor in tensors})
    one_device = len(devices) == 1
    columns = (
        Column("name"),
        Column("shape"),
        Column("dtype"),
        *(() if one_device else (Column("device"),)),
        Column("range", True),
        Column("mean", True),
        Column("first values, notes", flexible=True),
    )
    rows = tuple(
        (
            tensor.name,
            shape(tensor.shape),
            dtype(tensor.dtype),
            *(() if one_device else (tensor.device,)),
            interval(tensor.minimum, tensor.maximum),
            number(tensor.mean),
            _content(tensor),
        )
        for tensor in tensors
    )
    where = devices[0] if one_device else "several devices"
    return Table(f"{counted(len(tensors), 'input')} on {where}, first micro-batch", columns, rows)


def _content(tensor: InputTensor) -> str:
    values = ids(tensor.first_values, _FIRST_VALUES)
    return "; ".join(part for part in (tensor.note, values) if part)


def _segments(inputs: Inputs, reasons: Reasons) -> tuple[Block, ...]:
    clips, constant = inputs.audio_clips, inputs.audio_clips_constant
    words = None if clips is None else counted(clips, "clip")
    fact = reasons.fact("Audio", words, "probe/input/audio_clips", "inputs/audio_clips", "inputs/audio", "audio_encoder")
    if constant and words is not None:
        fact = Fact(fact.label, f"{words}, {constant:,} of them constant (silent or empty)", "warning")
    facts = Facts((fact,))
    if not inputs.audio:
        missing = reasons.known("inputs/audio_segments")
        return (facts, _missing("Audio segments", reasons, "inputs/audio_segments")) if missing else (facts,)
    by_unit = ([segment for segment in inputs.audio if segment.unit == unit] for unit in ("tokens", "frames"))
    shown = [segment for segments in by_unit for segment in segments[:_SHOWN_SEGMENTS]]
    left = len(inputs.audio) - len(shown)
    columns = (
        Column("sample", True),
        Column("from", True),
        Column("length", True),
        Column("unit"),
        Column("seconds", True),
        Column("note"),
    )
    footer = f"and {left:,} more in the record" if left else ""
    return facts, Table(
        f"{counted(len(inputs.audio), 'audio segment')}, first micro-batch", columns, tuple(map(_segment, shown)), footer=footer
    )


def _segment(segment: AudioSegment) -> tuple[str, ...]:
    return (str(segment.sample), f"{segment.start:,}", f"{segment.length:,}", segment.unit, fixed(segment.seconds, 2), segment.note)


def _samples(samples: tuple[InputSample, ...], reasons: Reasons) -> tuple[Block, ...]:
    if not samples:
        return (_missing("Text", reasons, "inputs/text", "inputs/shown", "tokenizer"),)
    rows: list[Fact] = []
    for sample in samples[:_SHOWN_SAMPLES]:
        rows += _line(f"Sample {sample.index} input", sample.ids, sample.text)
        rows += _line(f"Sample {sample.index} labels", sample.label_ids, sample.label_text)
    undecoded = any(found and text is None for sample in samples for found, text in _pairs(sample))
    if undecoded or not rows:
        rows.append(Fact("Text", reasons.missing("inputs/text", "inputs/shown", "tokenizer"), "missing"))
    return (Facts(tuple(rows), "Samples, special tokens visible"),)


def _pairs(sample: InputSample) -> tuple[tuple[tuple[int, ...], str | None], ...]:
    return (sample.ids, sample.text), (sample.label_ids, sample.label_text)


def _line(label: str, token_ids: tuple[int, ...], text: str | None) -> list[Fact]:
    """Return the text of some ids, else the ids themselves; nothing where there are none."""
    if text is not None:
        return [Fact(label, passage(text, _CHARACTERS))]
    return [Fact(label, f"ids {ids(token_ids, _FIRST_IDS)}")] if token_ids else []
