"""Masks of tokens that are audio, wherever a model hands them round: which argument is one, what it covers, which modules take one.

Only names and shapes are looked at: nothing here touches a device.

Shapes: B batch, S tokens.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from probe.records import Site
from probe.sites.names import ModuleNames

Cover = Literal["all", "given", "predicted"]

_SAID = re.compile(r"(?=.*(?:audio|speech))(?=.*mask)")
# Masks over frames, codes or ids of the audio itself, masks of what attends to what, and masks of the labels.
_OF_SOMETHING_ELSE = re.compile(r"attention|feature|frame|mel|latent|label|encoder|value|cache|pad|ids_mask|(?<!discrete_)codes_mask")
_GIVEN = re.compile(r"(?:^|_)(?:in|prompt|reference|ref)(?:_|$)")
_PREDICTED = re.compile(r"(?:^|_)(?:out|output|target|generated)(?:_|$)")
_TOKEN_KINDS = (torch.bool, torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


def names_audio_mask(name: str) -> bool:
    """Tell whether an argument is, by its name, a mask of the tokens that are audio (``audio_token_mask``, ``audio_out_mask``, …).

    Masks over frames, features or codes (``audio_attention_mask``, ``audio_input_ids_mask``, ``audio_mel_mask``) are none.
    """
    return bool(_SAID.search(name)) and not _OF_SOMETHING_ELSE.search(name)


def cover_of(name: str) -> Cover:
    """Say which audio a mask covers by its name: all, what the model is given (``_in_``), or what it predicts (``_out_``)."""
    if _PREDICTED.search(name):
        return "predicted"
    return "given" if _GIVEN.search(name) else "all"


def audio_masks(arguments: Mapping[str, Any], shape: tuple[int, ...] | None = None) -> dict[str, Tensor]:
    """Return the masks of audio tokens among the arguments: bool or integer, 2-D, all of one shape (``shape``, or the first one's)."""
    found: dict[str, Tensor] = {}
    for name, value in arguments.items():
        if not isinstance(value, Tensor) or value.dim() != 2 or value.dtype not in _TOKEN_KINDS or not names_audio_mask(name):
            continue
        shape = tuple(value.shape) if shape is None else shape
        if tuple(value.shape) == shape:
            found[name] = value
    return found


def cover_everything(masks: Iterable[str], *, audio_is_given: bool) -> bool:
    """Tell whether masks of these names cover all audio among the tokens, so that what they leave out is text.

    A mask of predicted audio alone does only where no audio is given to the model in another way (``audio_is_given``): in Higgs Audio's
    own code the layers' ``audio_out_mask`` covers discrete codes, and frames of the encoder stand outside it. One of the codes of given
    audio alone (``audio_in_discrete_codes_mask``) never does.
    """
    covers = {cover_of(name) for name in masks if not name.endswith("discrete_codes_mask")}
    if "all" in covers:
        return True
    return "predicted" in covers and ("given" in covers or not audio_is_given)


def mask_takers(names: ModuleNames, sites: Iterable[Site]) -> tuple[str, ...]:
    """Name the modules whose arguments tell which token is audio: of each attention layer over both, the innermost round it (or it).

    A module counts when its ``forward`` names such a mask. The root is left out: what it is given is known anyway.
    """
    takers: dict[str, None] = {}
    for site in sites:
        name = site.name if site.role == "attention" and site.kind == "joint" else ""
        while name and not (name in names.by_name and _takes_mask(names.by_name[name])):
            name = name.rpartition(".")[0]
        if name:
            takers[name] = None
    return tuple(takers)


def _takes_mask(module: nn.Module) -> bool:
    try:
        parameters = inspect.signature(module.forward).parameters
    except (TypeError, ValueError):
        return False
    return any(names_audio_mask(name) for name in parameters)
