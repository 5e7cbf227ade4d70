"""Finding dual-FFN decoder layers: those with one feed-forward branch for text tokens and one for audio tokens."""

from __future__ import annotations

from probe.records import Site
from probe.sites.names import ModuleNames

NO_BRANCHES = "no decoder layer owns both mlp and audio_mlp: text and audio tokens share one feed-forward"


def find_branches(names: ModuleNames) -> tuple[Site, ...]:
    """Find the branches ``mlp`` (text) and ``audio_mlp`` (audio) of every layer that owns both."""
    found: list[Site] = []
    for name, module in names.by_name.items():
        if module._modules.get("mlp") is not None and module._modules.get("audio_mlp") is not None:
            prefix = f"{name}." if name else ""
            found_by = "structure: a layer with both mlp and audio_mlp"
            found.append(Site(f"{prefix}mlp", "feed_forward", found_by, modality="text"))
            found.append(Site(f"{prefix}audio_mlp", "feed_forward", found_by, modality="audio"))
    return tuple(found)
