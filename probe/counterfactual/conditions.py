"""Which inputs of a batch the model is conditioned on: features of an audio encoder, reference audio codes, or what the user named.

Only names, dtypes and shapes are looked at: nothing here touches a device.

Shapes: B batch, C clips, T audio frames, F frames of codes, N frames of all clips joined, K codebooks.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from probe.sites.batch import AUDIO_CODES, AUDIO_FEATURES, TEXT_LABELS, audio_codes, audio_features
from probe.sites.facts import ModelFacts
from probe.sites.labels import AUDIO_LABELS
from probe.sites.reference import AudioRoles, labels_of_audio

GIVEN_CODES = "audio_in_ids"
"""Codes that are given to the model by their very name, (K, N)."""
TARGET_CODES = "audio_out_ids"
_TARGETS = (TARGET_CODES, *AUDIO_LABELS, *TEXT_LABELS)


@dataclass(frozen=True, slots=True)
class Condition:
    """One input by which the model hears audio.

    Attributes:
        name: The name of the input.
        kind: ``features``: real numbers over time, (C, mel, T), (C, T, mel) or more dimensions (of 2 dimensions, no time is known: a
            speaker embedding that the user named). ``waveform``: (C, samples) or (C, 1, samples). ``codes``: whole numbers, (B, F, K),
            (B, K, F), (B, F), or those of all clips joined, (K, N), with ``<name>_start``.
    """

    name: str
    kind: Literal["features", "waveform", "codes"]


def find_conditions(
    inputs: Mapping[str, Any], *, facts: ModelFacts, roles: AudioRoles, named: Collection[str] = ()
) -> tuple[Condition, ...] | str:
    """Find what the model is conditioned on; a str is the reason why there is nothing.

    What the user ``named`` counts, and nothing else then. Otherwise the audio features, together with codes that are given by their name
    (``audio_in_ids``: the same reference, heard twice); else the codes that hold a reference beside what is to be predicted, of which
    :func:`probe.counterfactual.content.content_of` leaves the target alone. Never targets: ``audio_out_ids`` and labels are refused
    even when named; a waveform that goes into a model which predicts audio may be turned into its labels (CSM) and has to be named.
    """
    if named:
        return _named(inputs, named)
    reasons: list[str] = []
    features = _features(inputs, roles)
    given = [Condition(name, "codes") for name in _codes(inputs, facts) if name == GIVEN_CODES]
    if isinstance(features, Condition):
        return (features, *given)
    reasons.append(features)
    if given:
        return tuple(given)
    codes = [name for name in _codes(inputs, facts) if name != TARGET_CODES]
    if codes and not roles.predicts:
        return tuple(Condition(name, "codes") for name in codes)
    if codes and not roles.given and labels_of_audio(inputs, roles) is None:
        reasons.append(f"no audio labels among the inputs tell which of {codes[0]!r} is reference and which is target")
    elif codes:
        return (Condition(codes[0], "codes"),)
    elif facts.codebooks:
        reasons.append(f"no codes of given audio (looked for {', '.join(name for name in AUDIO_CODES if name != TARGET_CODES)})")
    return "; ".join(reasons)


def _features(inputs: Mapping[str, Any], roles: AudioRoles) -> Condition | str:
    found = audio_features(inputs)
    if found is None:
        return f"no audio features among the inputs (looked for {', '.join(AUDIO_FEATURES)})"
    name, tensor = found
    if tensor.numel() == 0:
        return f"{name!r} holds no clip, {tuple(tensor.shape)}"
    kind = kind_of(tensor)
    if kind == "waveform" and roles.predicts:
        return f"{name!r} is a waveform in front of a model that predicts audio, and may hold the target (name it if it does not)"
    return Condition(name, kind)


def kind_of(tensor: Tensor) -> Literal["features", "waveform", "codes"]:
    """Say what a tensor of audio is by its dtype and shape; real numbers of 2 dimensions are taken for a waveform."""
    if not tensor.is_floating_point():
        return "codes"
    return "waveform" if tensor.dim() == 2 or (tensor.dim() == 3 and tensor.shape[1] == 1) else "features"


def _codes(inputs: Mapping[str, Any], facts: ModelFacts) -> Iterator[str]:
    for name, tensor, _ in audio_codes(inputs, codebooks=facts.codebooks):
        if tensor.numel():
            yield name


def _named(inputs: Mapping[str, Any], named: Collection[str]) -> tuple[Condition, ...] | str:
    conditions: list[Condition] = []
    for name in named:
        tensor = inputs.get(name)
        if name in _TARGETS:
            return f"{name!r} was named as a condition, but is what the model is to predict"
        if not isinstance(tensor, Tensor):
            return f"{name!r} was named as a condition and is no tensor among the inputs ({', '.join(map(str, inputs))})"
        if tensor.dim() < 2 or tensor.is_complex() or not tensor.numel():
            return f"{name!r} was named as a condition; its shape {tuple(tensor.shape)} is none of audio"
        kind = kind_of(tensor)
        # A row of real numbers a sample need not be a waveform: it may be an embedding of the speaker.
        conditions.append(Condition(name, "features" if kind == "waveform" and tensor.dim() == 2 and name not in AUDIO_FEATURES else kind))
    return tuple(conditions)
