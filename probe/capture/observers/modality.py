"""Watches for what tells which token is text, audio, reference audio or padding, and answers for any attention call of any layer.

Shapes: B batch, C clips, T audio frames, S tokens (queries), K keys.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from probe.capture.buffer import StepBuffer
from probe.capture.microbatch import MicroBatch
from probe.capture.observer import Call, Watcher
from probe.records import Site
from probe.sites.facts import ModelFacts
from probe.sites.modality import fold_frames, output_modality, sounding_frames, token_modality

_KNOWN = "modality"


@dataclass(slots=True)
class _Known:
    """What a micro-batch has told so far: codes of the root's tokens (B, S) int8, and which feature frames sound (C, T) bool."""

    facts: ModelFacts
    tokens: Tensor | None
    frames: Tensor | None


class ModalityWatcher(Watcher):
    """Reads at the root's start what its inputs tell. Stands before every observer that asks; keeps (B, S) int8 a micro-batch."""

    name = "modality"

    def __init__(self, sites: Sequence[Site], facts: ModelFacts) -> None:
        """Watch the root, if there is an attention layer among the sites to watch it for."""
        self._needed = any(site.role == "attention" for site in sites)
        self._facts = facts

    def sites(self) -> Sequence[str]:
        """Return the root."""
        return ("",) if self._needed else ()

    def enter(self, call: Call, buffer: StepBuffer) -> None:
        """Read the root's inputs. Frames now, not when the encoder has run: SpecAugment overwrites the features in place."""
        micro = call.micro
        micro.scratch[_KNOWN] = _Known(self._facts, token_modality(micro, self._facts), sounding_frames(micro))


def modalities(call: Call, shape: tuple[int, int, int, int]) -> tuple[Tensor | None, Tensor | None]:
    """Return the modality of queries (B, S) and keys (B, K) of one attention call, int8 codes of :mod:`probe.sites.modality`.

    ``None`` where it is not known, or not yet: see :func:`late_modality`. No sync; a temporary of the size of the frames' mask.

    Args:
        call: The call of the attention layer's site.
        shape: (B, H, S, K) of its attention matrix.
    """
    known: _Known | None = call.micro.scratch.get(_KNOWN)
    if known is None:
        return None, None
    samples, _, queries, keys = shape
    if call.site.kind == "encoder":
        return _of_frames(known, samples, queries), _of_frames(known, samples, keys)
    if call.site.kind == "cross":
        return _of_tokens(known, samples, queries), _of_frames(known, samples, keys)
    return _of_tokens(known, samples, queries), _of_tokens(known, samples, keys)


def late_modality(micro: MicroBatch, site: Site) -> Tensor | None:
    """Return the modality (B, S) int8 of a layer's tokens as the root's output tells it; ``None`` if it does not.

    Ask while the hooks of the root's return run: ``micro.output`` is there only then. Only layers of kind ``joint`` have tokens that
    the model itself may have laid out anew. No sync.
    """
    return output_modality(micro) if site.kind == "joint" else None


def _of_tokens(known: _Known, samples: int, length: int) -> Tensor | None:
    return known.tokens if known.tokens is not None and tuple(known.tokens.shape) == (samples, length) else None


def _of_frames(known: _Known, samples: int, length: int) -> Tensor | None:
    return None if known.frames is None else fold_frames(known.frames, frames=length, clips=samples)
