"""Where in an input the content of each clip lies, which sample the clip belongs to, and what must be left alone (padding, targets).

Nothing here waits for the device. Temporaries: bool masks of the size of the frames, and for features without a mask, clip by clip, two
tensors of a clip.

Shapes: B batch, C clips, R rows (mel bins, codebooks, 1 for a waveform), T frames (or samples), S tokens, F frames of codes, N frames of
all clips joined, K codebooks.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from probe.capture.microbatch import MicroBatch
from probe.counterfactual.conditions import Condition
from probe.sites.batch import AUDIO_CODE_MASKS, AUDIO_CODES, FEATURE_MASKS, samples_in
from probe.sites.facts import ModelFacts
from probe.sites.modality import AUDIO, REFERENCE, token_modality
from probe.sites.reference import AudioRoles, laid_over, stands_for_given, unlabelled_runs

_PREDICTED_PLACEHOLDERS = ("audio_out_token_idx", "audio_latent_token_id")


@dataclass(frozen=True, slots=True)
class Content:
    """One input, seen as clips of R rows over T frames.

    Attributes:
        tensor: The input.
        count: Clips, C.
        owner_C: The sample that each clip belongs to, int64 on the tensor's device; of clips whose samples nobody can tell, numbers of
            their own that no sample has.
        time: The dimension of the tensor that counts frames.
        frames_CT: Which frames of each clip are its content, bool; ``None`` for all.
        joined: The clips stand one after the other in one tensor (K, N), each with ``frames_CT`` of its own.
        borders: Codes that are no sound; where they stand is left alone.
    """

    tensor: Tensor
    count: int
    owner_C: Tensor
    time: int = -1
    frames_CT: Tensor | None = None
    joined: bool = False
    borders: tuple[int, ...] = ()

    def clips(self, like: Tensor) -> Tensor:
        """View a contiguous tensor of the input's shape as (C, R, T); of clips that are joined, all share its memory."""
        if self.joined:
            return like.unsqueeze(0).expand(self.count, -1, -1)
        moved = like.movedim(self.time, -1)
        return moved.reshape(moved.shape[0], -1, moved.shape[-1])

    def clip(self, which: Tensor) -> tuple[Tensor, Tensor]:
        """Return one clip (R, T) and where in it its content is, bool (R or 1, T).

        Args:
            which: Its number, int64 (1,) on the device, so that nobody has to wait for a number that is only known there.
        """
        values_RT = self.clips(self.tensor).index_select(0, which)[0]
        frames_CT = self.frames_CT
        valid_RT = torch.ones_like(values_RT[:1], dtype=torch.bool) if frames_CT is None else frames_CT.index_select(0, which)
        for code in self.borders:
            valid_RT = valid_RT & (values_RT != code)
        return values_RT, valid_RT


def content_of(
    condition: Condition, inputs: Mapping[str, Any], *, facts: ModelFacts, roles: AudioRoles, sounding: bool = False
) -> Content | str:
    """Return where the content of a condition lies, or the reason why nobody can tell.

    Args:
        condition: One that was found among ``inputs``.
        inputs: What the model was given, by name.
        facts: Of the model.
        roles: What its audio may be.
        sounding: Of features without a mask, leave the silence that ends a clip out of its content. Such a model takes every frame
            alike, so another sample's clip may come whole; but a clip reversed in time should not begin with its padding.
    """
    tensor = inputs[condition.name]
    if condition.kind == "codes":
        return _codes(condition.name, tensor, inputs, facts, roles)
    mask_CT = _feature_mask(tensor, inputs)
    time = _time_axis(tensor, None if mask_CT is None else mask_CT.shape[1])
    count = tensor.shape[0]
    if mask_CT is not None:
        length_C = mask_CT.sum(1)
    else:
        length_C = torch.full((count,), tensor.shape[time], device=tensor.device)
        if sounding and condition.kind == "features" and tensor.dim() > 2:
            mask_CT = _sounding(tensor.movedim(time, -1))
    return Content(tensor, count, _owners(inputs, facts, length_C), time, mask_CT)


def _feature_mask(tensor: Tensor, inputs: Mapping[str, Any]) -> Tensor | None:
    """Return the mask (C, T) among the inputs that lies over the frames of the features; masks of other lengths are of something else.

    Beside token ids, ``attention_mask`` is theirs.
    """
    plain = () if "input_ids" in inputs else ("attention_mask",)
    for name in (*FEATURE_MASKS, "audio_attention_mask", *plain):
        mask = inputs.get(name)
        if isinstance(mask, Tensor) and mask.dim() == 2 and mask.shape[0] == tensor.shape[0] and mask.shape[1] in tensor.shape[1:]:
            return mask.to(tensor.device, non_blocking=True) != 0
    return None


def _time_axis(tensor: Tensor, frames: int | None) -> int:
    """Return the dimension of time: the last of those that a mask is as long as, else of (C, a, b) the longer, else the last."""
    if frames is not None:
        return max(axis for axis in range(1, tensor.dim()) if tensor.shape[axis] == frames)
    return 1 if tensor.dim() == 3 and tensor.shape[1] > tensor.shape[2] else tensor.dim() - 1


def _sounding(clips: Tensor) -> Tensor:
    """Return which frames of (C, ..., T) stand before the silence that ends the clip, (C, T) bool.

    A frame with one value in all mel bins is silence: the floor of a log-mel. Zeros are passed over, because SpecAugment may have written
    them into the input, over whole bins and whole frames.
    """
    position_T = torch.arange(1, clips.shape[-1] + 1, device=clips.device)
    ends: list[Tensor] = []
    for clip in clips:
        rows_RT = clip.flatten(0, -2)
        lowest_T = torch.where(rows_RT == 0, torch.inf, rows_RT).amin(0)
        highest_T = torch.where(rows_RT == 0, -torch.inf, rows_RT).amax(0)
        ends.append(((lowest_T < highest_T) * position_T).amax())
    return position_T <= torch.stack(ends)[:, None]


def _codes(name: str, codes: Tensor, inputs: Mapping[str, Any], facts: ModelFacts, roles: AudioRoles) -> Content | str:
    starts_C = inputs.get(f"{name}_start")
    if isinstance(starts_C, Tensor) and codes.dim() == 2:
        return _joined(codes, starts_C.to(codes.device, non_blocking=True), inputs, facts)
    if codes.dim() == 2 and facts.codebooks > 1 and codes.shape[0] == facts.codebooks:
        return f"{name!r} holds the codes of all clips, and no {name}_start says where each begins"
    time = 2 if codes.dim() == 3 and codes.shape[2] != facts.codebooks == codes.shape[1] else 1
    batch, frames = codes.shape[0], codes.shape[time]
    mask_BF = inputs.get(AUDIO_CODE_MASKS.get(name, f"{name}_mask"))
    if isinstance(mask_BF, Tensor) and mask_BF.shape == (batch, frames):
        real_BF = mask_BF.to(codes.device, non_blocking=True) != 0
    elif batch == 1:
        real_BF = torch.ones(1, frames, dtype=torch.bool, device=codes.device)
    else:
        return f"no mask says which frames of {name!r}, {tuple(codes.shape)}, only fill up the shorter samples"
    reference_BF = _reference(name, real_BF, inputs, facts, roles) if roles.predicts and name in AUDIO_CODES else real_BF
    if isinstance(reference_BF, str):
        return reference_BF
    return Content(codes, batch, torch.arange(batch, device=codes.device), time, reference_BF, borders=facts.border_codes)


def _reference(name: str, real_BF: Tensor, inputs: Mapping[str, Any], facts: ModelFacts, roles: AudioRoles) -> Tensor | str:
    """Return which frames of codes are reference, (B, F) bool: those whose placeholders are, the k-th frame being the k-th's."""
    codes_BS = token_modality(MicroBatch(0, kwargs=dict(inputs)), facts, roles)
    if codes_BS is None:
        return f"no token ids tell which frames of {name!r} are reference and which are target"
    codes_BS = codes_BS.to(real_BF.device, non_blocking=True)
    slots_BS = codes_BS >= AUDIO
    if not roles.given and unlabelled_runs(slots_BS, inputs, roles) is None:
        return f"the audio labels do not lie over the positions of audio: which frames of {name!r} are reference is not known"
    return laid_over(real_BF, (codes_BS == REFERENCE).reshape(-1), slots_BS.reshape(-1))


def _joined(codes_KN: Tensor, starts_C: Tensor, inputs: Mapping[str, Any], facts: ModelFacts) -> Content:
    position_N = torch.arange(codes_KN.shape[1], device=codes_KN.device)
    segment_N = torch.searchsorted(starts_C.contiguous(), position_N.to(starts_C.dtype), right=True) - 1
    count = starts_C.shape[0]
    frames_CN = segment_N == torch.arange(count, device=codes_KN.device)[:, None]
    owner_C = _owners(inputs, facts, frames_CN.sum(1))
    return Content(codes_KN, count, owner_C, frames_CT=frames_CN, joined=True, borders=facts.border_codes)


def _owners(inputs: Mapping[str, Any], facts: ModelFacts, length_C: Tensor) -> Tensor:
    """Return which sample each clip belongs to, int64 (C,), from the placeholders of given audio in ``input_ids`` (B, S).

    One clip a sample where there are as many clips as samples and every sample has placeholders. Otherwise clips and placeholders come in
    the same order: one placeholder a clip where there are as many, else a clip's share of all placeholders is its share of all frames
    (``length_C``), up to the rounding of strides and poolings, and the sample that holds the middle of that share owns it. Where no
    placeholder tells, every clip is a sample of its own: the one of its number if there are as many, else one numbered from B on.
    """
    device = length_C.device
    number_C = torch.arange(length_C.shape[0], device=device)
    ids_BS = inputs.get("input_ids")
    tokens = _given_placeholders(facts)
    samples = samples_in(inputs)
    alone_C = number_C if samples == length_C.shape[0] else number_C + samples
    if not isinstance(ids_BS, Tensor) or ids_BS.dim() != 2 or not tokens or facts.encoder_decoder:
        return alone_C
    ids_BS = ids_BS.to(device, non_blocking=True)
    held_B = torch.stack([(ids_BS == token).sum(1) for token in tokens]).sum(0)
    until_B = held_B.cumsum(0)
    total = until_B[-1]
    share_C = (length_C.cumsum(0) - length_C / 2) * total / length_C.sum().clamp(min=1)
    middle_C = torch.where(total == length_C.shape[0], number_C + 0.5, share_C)
    owner_C = torch.searchsorted(until_B.to(middle_C.dtype), middle_C, right=True).clamp(max=ids_BS.shape[0] - 1)
    alone = total == 0
    if length_C.shape[0] == ids_BS.shape[0]:
        alone = alone | (held_B > 0).all()
    return torch.where(alone, alone_C, owner_C)


def _given_placeholders(facts: ModelFacts) -> tuple[int, ...]:
    """Return the ids whose positions given audio takes: those that say so, else all but those of predicted audio."""
    given = tuple(token for name, token in facts.audio_tokens if stands_for_given(name))
    predicted = {token for name, token in facts.audio_tokens if name in _PREDICTED_PLACEHOLDERS}
    return given or tuple(token for token in facts.audio_placeholders if token not in predicted)
