"""Which token is which modality: text, audio, reference audio or padding, from what the model was given or what it returned.

Every function returns an int8 tensor of codes on the model's device, or ``None`` where the data does not tell. Nothing here waits for
the device; temporaries are of the size of the tokens (of one float a frame for audio features).

Shapes: B batch, C clips, T audio frames, S tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from probe.capture.microbatch import MicroBatch, named_output
from probe.sites.audio_masks import Cover, audio_masks, cover_everything, cover_of
from probe.sites.batch import FEATURE_MASKS
from probe.sites.reference import INPUT_ONLY, AudioRoles, stands_for_given, unlabelled_runs

if TYPE_CHECKING:
    from probe.sites.facts import ModelFacts

UNKNOWN = -1
"""A token, not padding, of which nobody says whether it is text or audio."""
PADDING = 0
TEXT = 1
AUDIO = 2
REFERENCE = 3
"""Audio that a model which predicts audio is given and does not predict; whatever asks for audio at all asks for ``>= AUDIO``."""

_OUTPUT_AUDIO_MASKS = ("audio_in_mask", "audio_in_discrete_codes_mask", "audio_out_mask")
_SEGMENT_STARTS = ("audio_in_ids_start", "audio_out_ids_start")
_FEATURES = ("input_features", "audio_features")
_IGNORED_LABEL = -100


def token_modality(micro: MicroBatch, facts: ModelFacts, roles: AudioRoles = INPUT_ONLY) -> Tensor | None:
    """Return the modality of the tokens that the root was given, (B, S) int8.

    From the placeholder ids that the config names and from masks of audio tokens among the inputs. For an encoder-decoder model these are
    the decoder's tokens: ``decoder_attention_mask`` says what is padding, else the run of -100 that ends a row of ``labels`` (an ignored
    label before the end, such as a prompt's, is a token like any other).

    ``None`` with neither ids nor masks that cover all audio, and where one id stands for a whole segment of audio: then the attention
    layers see other, longer rows.
    """
    if facts.encoder_decoder:
        return _decoder_modality(micro)
    inputs = micro.inputs
    if any(name in inputs for name in _SEGMENT_STARTS):
        return None
    ids_BS = _tensor(micro, "input_ids", 2)
    shape_BS = tuple(ids_BS.shape) if ids_BS is not None else _tokens_shape(inputs)
    masks = {name: mask for name in audio_masks(inputs, shape_BS) if (mask := _tensor(micro, name, 2)) is not None}
    if ids_BS is None and not cover_everything(masks, audio_is_given=_audio_is_given(inputs, facts)):
        return None
    parts: list[tuple[Cover, Tensor]] = [(cover_of(name), mask != 0) for name, mask in masks.items()]
    if ids_BS is not None:
        parts += [("given" if token in roles.given else "all", ids_BS == token) for token in facts.audio_placeholders]
    like = ids_BS if ids_BS is not None else next(iter(masks.values()))
    return _hide(_painted(like, parts, inputs, roles), _tensor(micro, "attention_mask", 2))


def tokens_tell_audio(micro: MicroBatch, facts: ModelFacts) -> bool:
    """Tell whether :func:`token_modality` knew what to look for: ids of audio placeholders, or a mask. Else all it says is what is padding.

    Looks at names and shapes only.
    """
    inputs = micro.inputs
    ids_BS = inputs.get("input_ids")
    shape_BS = tuple(ids_BS.shape) if isinstance(ids_BS, Tensor) else _tokens_shape(inputs)
    return bool(facts.audio_placeholders) or bool(audio_masks(inputs, shape_BS))


def layer_modality(arguments: Mapping[str, Any], micro: MicroBatch, facts: ModelFacts, roles: AudioRoles = INPUT_ONLY) -> Tensor | None:
    """Return the modality of a decoder layer's tokens as its own arguments tell it, (B, S) int8.

    ``None`` without a mask of audio tokens, or where masks are left out that would cover the rest of the audio. Padding is read off the
    layer's ``attention_mask``, where it got one, else off the root's.
    """
    masks = audio_masks(arguments)
    if not cover_everything(masks, audio_is_given=_audio_is_given(micro.inputs, facts)):
        return None
    parts: list[tuple[Cover, Tensor]] = [(cover_of(name), mask != 0) for name, mask in masks.items()]
    codes_BS = _painted(next(iter(masks.values())), parts, micro.inputs, roles)
    mask = arguments.get("attention_mask")
    real_BS = _real_tokens(mask.detach()) if isinstance(mask, Tensor) else None
    return _hide(codes_BS, real_BS if real_BS is not None else _tensor(micro, "attention_mask", 2))


def output_modality(micro: MicroBatch, roles: AudioRoles = INPUT_ONLY) -> Tensor | None:
    """Return the modality of the tokens after the model itself expanded its input, (B, L') int8, from the root's output.

    For models that put encoder frames and audio codes in the place of placeholders inside ``forward`` and return
    ``expanded_input_ids`` with bool masks of what became audio. ``None`` for other outputs.
    """
    ids_BS = named_output(micro.output, "expanded_input_ids")
    if not isinstance(ids_BS, Tensor) or ids_BS.dim() != 2:
        return None
    masks = audio_masks({name: named_output(micro.output, name) for name in _OUTPUT_AUDIO_MASKS}, tuple(ids_BS.shape))
    parts: list[tuple[Cover, Tensor]] = [(cover_of(name), mask != 0) for name, mask in masks.items()]
    mask_BS = named_output(micro.output, "attention_mask")
    return _hide(_painted(ids_BS, parts, micro.inputs, roles), mask_BS if isinstance(mask_BS, Tensor) else None)


def _painted(like_BS: Tensor, parts: Sequence[tuple[Cover, Tensor]], inputs: Mapping[str, Any], roles: AudioRoles) -> Tensor:
    """Return codes without padding: TEXT, AUDIO where a part is true, and of that REFERENCE what the model is only given."""
    codes_BS = torch.full_like(like_BS, TEXT, dtype=torch.int8)
    given_BS = torch.zeros_like(like_BS, dtype=torch.bool)
    audio_BS = torch.zeros_like(like_BS, dtype=torch.bool)
    for cover, part_BS in parts:
        audio_BS |= part_BS
        if cover == "given":
            given_BS |= part_BS
    codes_BS.masked_fill_(audio_BS, AUDIO)
    if roles.predicts:
        unlabelled_BS = unlabelled_runs(audio_BS & ~given_BS, inputs, roles)
        codes_BS.masked_fill_(given_BS if unlabelled_BS is None else given_BS | unlabelled_BS, REFERENCE)
    return codes_BS


def _audio_is_given(inputs: Mapping[str, Any], facts: ModelFacts) -> bool:
    """Tell whether audio may come in otherwise than as what the model predicts: features for an encoder, or a placeholder of its own."""
    return any(name in inputs for name in _FEATURES) or any(stands_for_given(name) for name, _ in facts.audio_tokens)


def _tokens_shape(inputs: Mapping[str, Any]) -> tuple[int, ...] | None:
    """Return (B, S) of the tokens where there are no ids: from their embeddings, else from the labels."""
    for name in ("inputs_embeds", "labels"):
        value = inputs.get(name)
        if isinstance(value, Tensor) and value.dim() > 1:
            return tuple(value.shape[:2])
    return None


def _decoder_modality(micro: MicroBatch) -> Tensor | None:
    ids_BS = _tensor(micro, "decoder_input_ids", 2)
    labels_BS = _tensor(micro, "labels", 2)
    mask_BS = _tensor(micro, "decoder_attention_mask", 2)
    known_BS = ids_BS if ids_BS is not None else labels_BS
    if known_BS is None:
        return None
    codes_BS = torch.full_like(known_BS, TEXT, dtype=torch.int8)
    if mask_BS is not None and mask_BS.shape == codes_BS.shape:
        return _hide(codes_BS, mask_BS)
    return _hide(codes_BS, None if labels_BS is None else _before_end(labels_BS != _IGNORED_LABEL))


def _real_tokens(mask: Tensor) -> Tensor | None:
    """Return the (B, S) tokens that are not padding, from a layer's mask: 2-D over keys, or 4-D (B, 1, S, S) bool or added.

    A padded token does not see itself. Where a fully masked row was opened for a kernel that cannot bear one (left padding), it sees
    itself and the very last key, which does not see it back.
    """
    if mask.dim() == 2:
        return mask
    if mask.dim() != 4 or mask.shape[2] != mask.shape[3] or mask.shape[2] == 0:
        return None
    if mask.dtype != torch.bool and not mask.is_floating_point():
        return None
    sees_itself_BS, last_key_BS, last_row_BS = (
        part if part.dtype == torch.bool else part > torch.finfo(part.dtype).min / 2
        for part in (mask[:, 0].diagonal(dim1=1, dim2=2), mask[:, 0, :, -1], mask[:, 0, -1])
    )
    return sees_itself_BS & (last_row_BS | ~last_key_BS)


def sounding_frames(micro: MicroBatch) -> Tensor | None:
    """Return which frames of the audio features are not padding, (C, T) bool; ``None`` without features or a mask of them.

    From the feature mask among the inputs; else from the features (C, mel, T) themselves: all but the frames, constant over the mel
    bins, that end a clip. Whisper's extractor pads a clip with silence, whose log-mel is the clip's own floor in every bin; so a clip
    that is constant throughout is all padding.

    Call it before the root's forward runs: SpecAugment overwrites mel bins of ``input_features`` in place. Reads the features once;
    temporaries of C * T floats.
    """
    features_CMT = next((value for name in _FEATURES if (value := _tensor(micro, name, 3)) is not None), None)
    if features_CMT is not None and (features_CMT.numel() == 0 or not features_CMT.is_floating_point()):
        features_CMT = None
    for name in FEATURE_MASKS:
        mask_CT = _tensor(micro, name, 2)
        if mask_CT is not None:
            return mask_CT != 0
    if features_CMT is None:
        return None
    mask_CT = _tensor(micro, "attention_mask", 2)
    if mask_CT is not None and mask_CT.shape == (features_CMT.shape[0], features_CMT.shape[2]):
        return mask_CT != 0
    lowest_CT, highest_CT = features_CMT.detach().aminmax(dim=1)
    return _before_end(lowest_CT != highest_CT)


def fold_frames(sounding_CT: Tensor, *, frames: int, clips: int) -> Tensor | None:
    """Return AUDIO or PADDING for each frame of the encoder, (C, ``frames``) int8.

    One frame of the encoder covers ``T / frames`` frames of the features (convolution stride, pooling) and is padding when all of
    these are. ``None`` when ``clips`` is not C or T is no multiple of ``frames``.
    """
    samples, length = sounding_CT.shape
    if samples != clips or frames < 1 or length < frames or length % frames:
        return None
    return sounding_CT.reshape(samples, frames, length // frames).any(-1).to(torch.int8) * AUDIO


def _before_end(real_BS: Tensor) -> Tensor:
    """Return True up to the last True of each row: only what follows it is the padding that ends the row."""
    if real_BS.shape[1] == 0:
        return real_BS
    position_S = torch.arange(1, real_BS.shape[1] + 1, device=real_BS.device)
    return position_S <= (real_BS * position_S).amax(1, keepdim=True)


def _hide(codes_BS: Tensor, mask_BS: Tensor | None) -> Tensor:
    """Write PADDING where a mask of the same shape is 0; a mask of another shape says nothing about these tokens."""
    if mask_BS is None or mask_BS.shape != codes_BS.shape:
        return codes_BS
    return codes_BS.masked_fill_(mask_BS == 0, PADDING)


def _tensor(micro: MicroBatch, name: str, dimensions: int) -> Tensor | None:
    """Return an input by name if it is a tensor of so many dimensions, on the device of the forward's arguments.

    A batch object that is no mapping may still lie on the host when only ``training_step`` saw it; that copy does not wait.
    """
    value = micro.inputs.get(name)
    if not isinstance(value, Tensor) or value.dim() != dimensions:
        return None
    device = next((other.device for other in micro.kwargs.values() if isinstance(other, Tensor)), value.device)
    return value if value.device == device else value.to(device, non_blocking=True)
