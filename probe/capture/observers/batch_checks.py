"""Watches whether a batch is sound: rows against each other, ids against the tokenizer, labels against ids, reference against target."""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from probe.capture.buffer import StepBuffer
from probe.capture.cells import Cell
from probe.capture.microbatch import MicroBatch
from probe.capture.observer import Call, Watcher
from probe.measure.code_agreement import COLUMNS as AGREEMENT
from probe.measure.code_agreement import reference_agreement
from probe.measure.fingerprint import LARGEST, equal_rows, fingerprint, hash_rows, together
from probe.measure.label_checks import COLUMNS as LABEL_COLUMNS
from probe.measure.label_checks import IGNORED, Beside, check_labels, common_prefix
from probe.records import Site
from probe.sites.batch import audio_codes, audio_features, samples_in, text_labels
from probe.sites.code_frames import code_frames
from probe.sites.facts import ModelFacts
from probe.sites.labels import leaves_out_padding
from probe.sites.reference import audio_roles, labels_of_audio, stands_for_given
from probe.sites.tokenizers import TokenizerFacts, runs_of

FINGERPRINT = "fingerprint"
ROWS = Cell("rows", counts=("rows", "batches"), sums=("duplicated", "duplicated_clips"))
IDS = Cell("ids_of_tokenizer", counts=("batches",), sums=("outside", "added"))
LABELS = Cell("label_checks", counts=("batches", "masks", "over_ids"), sums=LABEL_COLUMNS, maxima=("common_prefix",))
AUDIO_LABELS = Cell("audio_labels", counts=("batches",), sums=("labels",))
REFERENCE = Cell("reference_codes", counts=("batches",), sums=AGREEMENT)

_NO_CONTENT = ("_start", "_starts")  # where segments of joined codes begin: says nothing of a row
_FRAMES_MASK = "audio_input_ids_mask"
_SHIFTED = "shift_labels"


class BatchChecker(Watcher):
    """Checks the inputs of every micro-batch at the root, before the model may change them in place.

    A few dozen tensor operations a micro-batch, over tokens, labels and codes; features are read once for their hashes.
    """

    name = "checks"

    def __init__(self, sites: Sequence[Site], facts: ModelFacts, tokenizer: TokenizerFacts | None) -> None:
        """Check for a model with these heads and facts, and a tokenizer if one is known."""
        self._facts = facts
        self._roles = audio_roles(facts, sites)
        self._tokenizer = tokenizer
        self._placeholders = never_learnt(facts, sites)

    def cells(self) -> Sequence[Cell]:
        """Return the cells of all checks."""
        return (ROWS, IDS, LABELS, AUDIO_LABELS, REFERENCE)

    def sites(self) -> Sequence[str]:
        """Return the root."""
        return ("",)

    def enter(self, call: Call, buffer: StepBuffer) -> None:
        """Check one micro-batch."""
        inputs = on_one_device(call.micro)
        self._check_rows(inputs, buffer, first=call.micro.index == 0)
        self._check_ids(inputs, buffer)
        self._check_labels(inputs, buffer)
        self._count_audio_labels(inputs, buffer)
        frames = code_frames(inputs, self._facts, self._roles)
        if frames is not None:
            buffer.totals.add(REFERENCE.name, counts=(1,), sums=reference_agreement(frames))

    def _check_rows(self, inputs: Mapping[str, Any], buffer: StepBuffer, *, first: bool) -> None:
        """Hash every input row by row.

        Features of clips that are not one a row cannot be laid to rows: then there are at most as many equal rows as equal clips. Of
        joined codes alone nothing can be said.
        """
        rows, features = samples_in(inputs), audio_features(inputs)
        aligned: dict[str, Tensor] = {}
        apart: dict[str, Tensor] = {}
        for name, value in inputs.items():
            if isinstance(value, Tensor) and value.numel() and value.dim() and not name.endswith(_NO_CONTENT):
                kind = aligned if value.shape[0] == rows else apart
                kind[name] = hash_rows(value, salt=zlib.crc32(name.encode()))
        buffer.totals.add(ROWS.name, counts=(rows, 1))
        if not aligned:
            return
        rows_B = together(torch.stack(list(aligned.values())))
        clips = None if features is None else {**aligned, **apart}.get(features[0])
        equal_clips = torch.zeros_like(rows_B[0]) if clips is None else equal_rows(clips)
        hidden = features is None and any(name in apart for name, _, _ in audio_codes(inputs, codebooks=self._facts.codebooks))
        equal = torch.zeros_like(equal_clips) if hidden else equal_rows(rows_B)
        if clips is not None and features is not None and features[0] in apart:
            equal = torch.minimum(equal, equal_clips)
        buffer.totals.add(ROWS.name, sums=torch.stack([equal, equal_clips]).double())
        if first:
            whole = torch.stack([fingerprint(hashes) for hashes in (rows_B, *apart.values())]).sum()
            buffer.put(FINGERPRINT, (whole & LARGEST).reshape(1))

    def _check_ids(self, inputs: Mapping[str, Any], buffer: StepBuffer) -> None:
        """Hold token ids against the tokenizer: ``input_ids``, and where the decoder's are made from them the labels."""
        if self._tokenizer is None:
            return
        labels = text_labels(inputs) if self._facts.encoder_decoder and not self._only_audio() else None
        for ids in (inputs.get("input_ids"), labels[1] if labels else None):
            if not isinstance(ids, Tensor) or ids.is_floating_point():
                continue
            known = self._facts.vocabulary
            outside = ids >= self._tokenizer.size
            outside = outside & (ids < known) if known is not None else outside
            added = torch.zeros((), dtype=torch.int64, device=ids.device)
            for begin, end in runs_of(self._tokenizer.added or ()):
                added = added + ((ids >= begin) & (ids < end)).sum()
            buffer.totals.add(IDS.name, counts=(1,), sums=torch.stack([outside.sum(), added]).double())

    def _check_labels(self, inputs: Mapping[str, Any], buffer: StepBuffer) -> None:
        found = text_labels(inputs)
        if found is None or self._only_audio():
            return
        name, labels_BS = found
        labels_BS = labels_BS.detach().long()
        decoder = "decoder_" if self._facts.encoder_decoder else ""
        mask_BS, ids_BS = (_of_shape(inputs.get(f"{decoder}{what}"), labels_BS) for what in ("attention_mask", "input_ids"))
        if mask_BS is not None and leaves_out_padding(self._facts):
            labels_BS = labels_BS.masked_fill(mask_BS == 0, IGNORED)
        ids_BS = None if name == _SHIFTED else ids_BS
        beside = Beside(ids_BS, mask_BS, self._placeholders, self._facts.padding_token, self._facts.vocabulary)
        counts = (1, int(mask_BS is not None), int(ids_BS is not None))
        prefix = common_prefix(labels_BS).reshape(1)
        buffer.totals.add(LABELS.name, counts=counts, sums=check_labels(labels_BS, beside), maxima=prefix)

    def _count_audio_labels(self, inputs: Mapping[str, Any], buffer: StepBuffer) -> None:
        found = labels_of_audio(inputs, self._roles) if self._roles.predicts else None
        if found is None:
            return
        on, mask = found[1] != IGNORED, inputs.get(_FRAMES_MASK)
        if isinstance(mask, Tensor) and mask.shape == on.shape[:2]:
            on = on & (mask != 0).view(*mask.shape, *(1,) * (on.dim() - 2))
        buffer.totals.add(AUDIO_LABELS.name, counts=(1,), sums=on.sum().double().reshape(1))

    def _only_audio(self) -> bool:
        """Tell whether the plain ``labels`` are labels of audio, because no head predicts text."""
        return "labels" in self._roles.labels


def never_learnt(facts: ModelFacts, sites: Sequence[Site]) -> tuple[int, ...]:
    """Return the placeholders at which no text label belongs: those of audio that the model is given.

    Of a model that predicts audio, placeholders of the predicted audio may be learnt; where the config does not tell them apart, none
    is returned. Nor is for an encoder-decoder, whose tokens stand for no audio.
    """
    if facts.encoder_decoder:
        return ()
    given = tuple(token for name, token in facts.audio_tokens if stands_for_given(name))
    return given if given or audio_roles(facts, sites).predicts else facts.audio_placeholders


def on_one_device(micro: MicroBatch) -> dict[str, Any]:
    """Return a micro-batch's inputs by name, tensors on the device of the forward's arguments; copies to it do not wait."""
    device = next((value.device for value in micro.kwargs.values() if isinstance(value, Tensor)), None)
    if device is None:
        return micro.inputs
    return {
        name: value.to(device, non_blocking=True) if isinstance(value, Tensor) and value.device != device else value
        for name, value in micro.inputs.items()
    }


def _of_shape(value: Any, like: Tensor) -> Tensor | None:
    return value if isinstance(value, Tensor) and value.shape == like.shape else None
