"""Which token is which modality: text, audio, reference audio or padding, from what the model was given or what it returned.

Every function returns an int8 tensor of codes on the model's device, or ``None`` where the data does not tell. Nothing here waits for
the device; temporaries are of the size of the tokens (of one float a frame for audio features).

Shapes: B batch, C clips, T audio frames, S tokens.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from probe.capture.microbatch import MicroBatch, named_output

if TYPE_CHECKING:
    from probe.sites.facts import ModelFacts

PADDING = 0
TEXT = 1
AUDIO = 2
REFERENCE = 3
"""Audio that a model which predicts audio is given and does not predict; whatever asks for audio at all asks for ``>= AUDIO``."""

_OUTPUT_AUDIO_MASKS = ("audio_in_mask", "audio_out_mask", "audio_in_discrete_codes_mask")
_FEATURES = ("input_features", "audio_features")
_FEATURE_MASKS = ("feature_attention_mask", "input_features_mask", "audio_feature_attention_mask")
_IGNORED_LABEL = -100


def token_modality(micro: MicroBatch, facts: ModelFacts) -> Tensor | None:
    """Return the modality of the tokens that the root was given, (B, S) int8; ``None`` without token ids.

    For an encoder-decoder model these are the decoder's tokens: ``decoder_attention_mask`` says what is padding, else the run of
    -100 that ends a row of ``labels`` (an ignored label before the end, such as a prompt's, is a token like any other).
    """
    if facts.encoder_decoder:
        return _decoder_modality(micro)
    ids_BS = _tensor(micro, "input_ids", 2)
    if ids_BS is None:
        return None
    codes_BS = torch.full_like(ids_BS, TEXT, dtype=torch.int8)
    for placeholder in facts.audio_placeholders:
        codes_BS.masked_fill_(ids_BS == placeholder, AUDIO)
    return _hide(codes_BS, _tensor(micro, "attention_mask", 2))


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


def output_modality(micro: MicroBatch) -> Tensor | None:
    """Return the modality of the tokens after the model itself expanded its input, (B, L') int8, from the root's output.

    For models that put encoder frames and audio codes in the place of placeholders inside ``forward`` and return
    ``expanded_input_ids`` with bool masks of what became audio. ``None`` for other outputs.
    """
    ids_BS = named_output(micro.output, "expanded_input_ids")
    if not isinstance(ids_BS, Tensor) or ids_BS.dim() != 2:
        return None
    codes_BS = torch.full_like(ids_BS, TEXT, dtype=torch.int8)
    for name in _OUTPUT_AUDIO_MASKS:
        mask_BS = named_output(micro.output, name)
        if isinstance(mask_BS, Tensor) and mask_BS.shape == codes_BS.shape:
            codes_BS.masked_fill_(mask_BS.bool(), AUDIO)
    mask_BS = named_output(micro.output, "attention_mask")
    return _hide(codes_BS, mask_BS if isinstance(mask_BS, Tensor) else None)


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
    for name in _FEATURE_MASKS:
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
