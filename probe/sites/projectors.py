"""Finding the projector: the module that takes the audio encoder's output to the width of the language model."""

from __future__ import annotations

import re
from collections.abc import Iterable

from probe.records import Site
from probe.sites.names import ModuleNames, is_below

_NAMES = frozenset(
    {
        "multi_modal_projector",
        "multimodal_projector",
        "audio_projector",
        "speech_projector",
        "projector",
        "audio_encoder_proj",
        "audio_projection",
        "audio_proj",
        "adapter",
        "audio_adapter",
        "embed_audio",
        "semantic_connector",
        "down_proj_for_speech",
    }
)
_IN_TOWER = ("adapter", "projector", "proj2", "proj")
_AUDIO = re.compile(r"audio|speech")
_LAYER = re.compile(r"(?:^|\.)\d+(?:\.|$)")


def find_projectors(names: ModuleNames, encoders: Iterable[str]) -> tuple[Site, ...]:
    """Find the projector of the given audio encoders, beside them by name, or as the last step inside them.

    Nothing is found without an audio encoder: a projector of the same name may serve images.
    """
    encoders = tuple(encoders)
    if not encoders:
        return ()
    beside = [name for name in names.by_name if _is_beside(name, encoders)]
    beside = [name for name in beside if not any(is_below(name, other) for other in beside)]
    said_audio = [name for name in beside if _AUDIO.search(name)]
    if beside:
        return tuple(Site(name, "projector", f"name: {name.rpartition('.')[2]}") for name in (said_audio or beside))
    inside = (next((f"{encoder}.{key}" for key in _IN_TOWER if f"{encoder}.{key}" in names.by_name), None) for encoder in encoders)
    return tuple(Site(name, "projector", f"name: {name.rpartition('.')[2]} inside the encoder") for name in inside if name is not None)


def why_no_projector(encoders: Iterable[str], *, encoder_decoder: bool) -> str:
    """Say why no projector was found."""
    if not tuple(encoders):
        return "no audio encoder whose output a projector could take"
    if encoder_decoder:
        return "encoder-decoder: cross-attention reads the encoder directly"
    return "no module beside or inside the audio encoder has a projector's name (multi_modal_projector, projector, adapter, …)"


def _is_beside(name: str, encoders: tuple[str, ...]) -> bool:
    return name.rpartition(".")[2] in _NAMES and not _LAYER.search(name) and not any(is_below(name, encoder) for encoder in encoders)
