"""A module of the model with a role, and the words that sites and numbers are sorted by."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Role = Literal["model", "audio_encoder", "projector", "attention", "lm_head", "feed_forward", "custom"]
AttentionKind = Literal["encoder", "decoder", "cross", "joint"]
Modality = Literal["text", "audio"]


@dataclass(frozen=True, slots=True)
class Site:
    """A module of the model with a role.

    Attributes:
        name: Dotted module name below the trained model, without the prefixes that wrappers add ("" is the root).
        role: What the module is to the probe.
        found_by: The rule that found it, in words a person understands.
        kind: For an attention layer: "encoder" (audio over audio), "decoder" (tokens over tokens, text only or with a separate
            encoder), "cross" (tokens over audio), "joint" (text and audio in one sequence).
        modality: For an LM head or a feed-forward branch: which tokens it serves.
        codebooks: For an audio LM head: how many codebooks its last dimension holds side by side; 0 for a text head.
    """

    name: str
    role: Role
    found_by: str
    kind: AttentionKind | None = None
    modality: Modality | None = None
    codebooks: int = 0
