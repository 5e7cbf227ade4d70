"""Where reference and target codes lie in a batch of discrete audio: frames with their sample, their segment and whether they are learnt.

Two layouts are known: codes of a row side by side, (B, F, K), laid over the placeholders of ``input_ids`` in order (HiggsAudioV2 in
transformers); and codes of the whole batch side by side, (K, n), in segments, one for each placeholder (Higgs Audio's own code).
Nothing waits for the device.

Shapes: B batch, S tokens, F frames of a sample, N of all samples, K codebooks.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from probe.measure.code_agreement import CodeFrames
from probe.sites.facts import ModelFacts
from probe.sites.reference import AudioRoles, labels_of_audio, stands_for_given

_CODES, _MASK = "audio_input_ids", "audio_input_ids_mask"
_GIVEN, _OUT, _OUT_LABELS = "audio_in_ids", "audio_out_ids", "label_audio_ids"
_IGNORED = -100


def code_frames(inputs: Mapping[str, Any], facts: ModelFacts, roles: AudioRoles) -> CodeFrames | None:
    """Return the frames of discrete audio codes with what is known of each; ``None`` without codes, labels or placeholders to go by.

    Args:
        inputs: The model's, all tensors on one device.
        facts: Of the model: its placeholders.
        roles: Of its audio.
    """
    ids_BS = inputs.get("input_ids")
    if not roles.predicts or not facts.audio_placeholders or not isinstance(ids_BS, Tensor) or ids_BS.dim() != 2:
        return None
    codes = inputs.get(_CODES)
    if isinstance(codes, Tensor) and codes.dim() == 3:
        return _rows(codes, ids_BS, inputs, facts, roles)
    return _joined(ids_BS, inputs, facts)


def _rows(codes_BFK: Tensor, ids_BS: Tensor, inputs: Mapping[str, Any], facts: ModelFacts, roles: AudioRoles) -> CodeFrames | None:
    labels = labels_of_audio(inputs, roles)
    if labels is None or labels[1].shape[:2] != codes_BFK.shape[:2] or codes_BFK.shape[0] != ids_BS.shape[0]:
        return None
    samples, width, books = codes_BFK.shape
    mask = inputs.get(_MASK)
    if mask is not None and tuple(mask.shape) != (samples, width):
        return None
    valid_N = torch.ones_like(codes_BFK[..., 0], dtype=torch.bool).view(-1) if mask is None else mask.reshape(-1) != 0
    slots_BS = _any_of(ids_BS, facts.audio_placeholders)
    # The k-th frame of the batch stands at its k-th placeholder, whose run is its segment.
    segment_N = _of_slots(slots_BS, _runs(slots_BS), valid_N.cumsum(0) - 1, none=-1)
    labelled_N = (labels[1] != _IGNORED).flatten(2).any(-1).view(-1) if labels[1].dim() > 2 else (labels[1] != _IGNORED).view(-1)
    return CodeFrames(
        codes_NK=codes_BFK.reshape(-1, books),
        segment_N=segment_N.clamp(min=0),
        sample_N=torch.arange(samples, device=ids_BS.device).repeat_interleave(width),
        labelled_N=labelled_N,
        valid_N=valid_N & (segment_N >= 0),
        samples=samples,
    )


def _joined(ids_BS: Tensor, inputs: Mapping[str, Any], facts: ModelFacts) -> CodeFrames | None:
    given, out, labels = (inputs.get(name) for name in (_GIVEN, _OUT, _OUT_LABELS))
    starts = [inputs.get(f"{name}_start") for name in (_GIVEN, _OUT)]
    if not all(isinstance(each, Tensor) for each in (given, out, labels, *starts)):
        return None
    assert isinstance(given, Tensor) and isinstance(out, Tensor) and isinstance(labels, Tensor)
    if labels.shape != out.shape or out.dim() != 2 or given.shape[0] != out.shape[0]:
        return None
    given_ids = [token for name, token in facts.audio_tokens if stands_for_given(name)]
    out_ids = [token for token in facts.audio_placeholders if token not in given_ids]
    parts = [_segments(codes, start, _any_of(ids_BS, ids)) for codes, start, ids in zip((given, out), starts, (given_ids, out_ids))]
    segments = [parts[0][0], parts[1][0] + given.shape[1]]
    labelled_N = torch.cat([labels.new_zeros(given.shape[1], dtype=torch.bool), (labels != _IGNORED).any(0)])
    sample_N = torch.cat([samples for _, samples in parts])
    return CodeFrames(
        codes_NK=torch.cat([given, out], 1).T,
        segment_N=torch.cat(segments),
        sample_N=sample_N.clamp(max=ids_BS.shape[0] - 1),
        labelled_N=labelled_N,
        valid_N=sample_N < ids_BS.shape[0],
        samples=ids_BS.shape[0],
    )


def _segments(codes_Kn: Tensor, starts: Any, slots_BS: Tensor) -> tuple[Tensor, Tensor]:
    """Return segment and sample of each column; the j-th segment belongs to the sample of the j-th slot, B where there is no such slot."""
    count, (samples, width) = codes_Kn.shape[1], slots_BS.shape
    marks = torch.zeros(count + 1, dtype=torch.int64, device=codes_Kn.device).scatter_add_(
        0, starts.long().clamp(0, count), starts.long() * 0 + 1
    )
    segment_n = (marks[:count].cumsum(0) - 1).clamp(min=0)
    owner_N = torch.arange(samples, device=slots_BS.device).repeat_interleave(width)
    return segment_n, _of_slots(slots_BS, owner_N, segment_n, none=samples)


def _of_slots(slots_BS: Tensor, values_N: Tensor, rank_n: Tensor, *, none: int) -> Tensor:
    """Return for each rank k the value of the k-th slot of the batch, row by row; ``none`` where there are no more slots."""
    slots_N, count = slots_BS.reshape(-1), slots_BS.numel()
    place_N = torch.where(slots_N, slots_N.cumsum(0) - 1, count + 1)  # what is no slot is written to a place that is never read
    table = torch.full((count + 2,), none, dtype=torch.int64, device=slots_BS.device).scatter_(0, place_N, values_N)
    return table.gather(0, rank_n.clamp(0, count))


def _runs(slots_BS: Tensor) -> Tensor:
    """Number the runs of consecutive slots of a row, over the batch from 0 on: int64 (B*S,); what is no slot has any number."""
    before_BS = torch.zeros_like(slots_BS)
    before_BS[:, 1:] = slots_BS[:, :-1]
    return (slots_BS & ~before_BS).reshape(-1).cumsum(0) - 1


def _any_of(ids_BS: Tensor, tokens: Iterable[int]) -> Tensor:
    found_BS = torch.zeros_like(ids_BS, dtype=torch.bool)
    for token in tokens:
        found_BS |= ids_BS == token
    return found_BS
