"""Watches for what tells which token is text, audio, reference audio or padding, and answers for any attention call of any layer.

Shapes: B batch, C clips, T audio frames, S tokens (queries), K keys.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor

from probe.capture.arguments import by_name
from probe.capture.buffer import StepBuffer
from probe.capture.microbatch import MicroBatch
from probe.capture.observer import Call, Watcher
from probe.records import Site
from probe.sites.audio_masks import audio_masks
from probe.sites.facts import ModelFacts
from probe.sites.modality import (
    TEXT,
    UNKNOWN,
    fold_frames,
    layer_modality,
    output_modality,
    sounding_frames,
    token_modality,
    tokens_tell_audio,
)
from probe.sites.reference import AudioRoles, audio_roles, labels_of_audio

TO_REFERENCE = ("probe/attention/text_to_reference", "probe/attention/audio_to_reference")
_PAIRS = ("text_to_text", "text_to_audio", "audio_to_text", "audio_to_audio")
MASSES = (*(f"probe/attention/{pair}" for pair in _PAIRS), *TO_REFERENCE)
_KNOWN = "modality"
_CROSS = "the decoder reads the audio through cross-attention"
_ALL_INPUT = "the model predicts no audio: all its audio is input, see text_to_audio"
_NO_LABELS = "no audio labels among the inputs tell reference from target"
_NO_AUDIO_NAMED = "the config names no audio token, and no mask among the inputs tells which tokens are audio"
_ALL_TARGET = "no run of audio in this step is without labels"


@dataclass(slots=True)
class _Known:
    """What a micro-batch has told so far.

    Attributes:
        roles: What the model's audio may be.
        tokens: Codes of the tokens as the root was given them, (B, S) int8; where audio stands among them and nobody says where, UNKNOWN.
        frames: Which feature frames sound, (C, T) bool.
        layers: Codes of the tokens as a decoder layer's arguments tell them, (B, S) int8.
        late: Codes of the tokens as the root's output tells them, in a list of one once it was asked.
        folded: Codes of the encoder's frames by clips and frames, as they were asked for: of all layers the same.
    """

    roles: AudioRoles
    tokens: Tensor | None
    frames: Tensor | None
    layers: Tensor | None = None
    late: list[Tensor | None] | None = None
    folded: dict[tuple[int, int], Tensor | None] = field(default_factory=dict)

    def late_told(self) -> bool:
        """Tell whether the root's output was asked and told the modality of its tokens."""
        return any(codes is not None for codes in self.late or ())

    def told(self) -> bool:
        """Tell whether the modality of any tokens is known."""
        return self.tokens is not None or self.layers is not None or self.late_told()

    def of_tokens(self, samples: int, length: int) -> Tensor | None:
        """Return the codes of (``samples``, ``length``) tokens, if those that are known have that shape."""
        return next((codes for codes in (self.layers, self.tokens) if codes is not None and tuple(codes.shape) == (samples, length)), None)

    def of_frames(self, samples: int, length: int) -> Tensor | None:
        """Return the codes of (``samples``, ``length``) frames of the encoder, if the feature frames fold to that."""
        if self.frames is not None and (samples, length) not in self.folded:
            self.folded[samples, length] = fold_frames(self.frames, frames=length, clips=samples)
        return self.folded.get((samples, length))


class ModalityWatcher(Watcher):
    """Reads what the root's inputs tell and, where they do not, what decoder layers are told. Stands before every observer that asks.

    Holds (B, S) int8 and (C, T) bool while a forward of the root runs, nothing after it.
    """

    name = "modality"

    def __init__(self, sites: Sequence[Site], facts: ModelFacts, *, mask_takers: Sequence[str] = ()) -> None:
        """Watch the root and the modules that are given masks of audio tokens, if there is an attention layer to watch them for."""
        self._attention = [site for site in sites if site.role == "attention"]
        self._facts = facts
        self._roles = audio_roles(facts, sites)
        self._takers = tuple(mask_takers)

    def sites(self) -> Sequence[str]:
        """Return the root and the modules that are given masks."""
        return ("", *self._takers) if self._attention else ()

    def enter(self, call: Call, buffer: StepBuffer) -> None:
        """Read the root's inputs, or a layer's arguments if the root's tell nothing of tokens of that number."""
        micro = call.micro
        if call.site.name == "":
            # Frames now, not when the encoder has run: SpecAugment overwrites the features in place.
            tokens, frames = token_modality(micro, self._facts, self._roles), sounding_frames(micro)
            if tokens is not None and self._audio_is_hidden(micro):
                tokens = tokens.masked_fill(tokens == TEXT, UNKNOWN)
            micro.scratch[_KNOWN] = _Known(self._roles, tokens, frames)
            return
        known: _Known | None = micro.scratch.get(_KNOWN)
        if known is None or known.layers is not None:
            return
        arguments = by_name(call.module.forward, call.args, call.kwargs)
        mask = next(iter(audio_masks(arguments).values()), None)
        if mask is not None and (known.tokens is None or mask.shape != known.tokens.shape or self._audio_is_hidden(micro)):
            known.layers = layer_modality(arguments, micro, self._facts, self._roles)

    def leave(self, call: Call, buffer: StepBuffer) -> None:
        """At the root, say why there may be no reference, and let go: observers that stand behind this one have asked by now."""
        known: _Known | None = call.micro.scratch.pop(_KNOWN, None) if call.site.name == "" else None
        if known is None:
            return
        if known.layers is None and not known.late_told() and self._audio_is_hidden(call.micro):
            for metric in MASSES:
                buffer.totals.omit(metric, _NO_AUDIO_NAMED)
        why = self._why_no_reference(known, call.micro)
        for metric in TO_REFERENCE if why else ():
            buffer.totals.omit(metric, why)

    def _audio_is_hidden(self, micro: MicroBatch) -> bool:
        """Tell whether audio stands among the root's tokens at places that its inputs do not tell."""
        return any(site.kind == "joint" for site in self._attention) and not tokens_tell_audio(micro, self._facts)

    def _why_no_reference(self, known: _Known, micro: MicroBatch) -> str:
        """Return the reason to show if no mass on reference audio comes out of this step; "" where the attention layers say better.

        They do where nothing has told the modality of their tokens.
        """
        kinds = {site.kind for site in self._attention}
        if self._facts.encoder_decoder and "cross" in kinds:
            return _CROSS
        if "joint" not in kinds:
            return ""
        if not self._roles.predicts:
            return _ALL_INPUT
        if not known.told():
            return ""
        return _ALL_TARGET if self._roles.given or labels_of_audio(micro.inputs, self._roles) else _NO_LABELS


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
        return known.of_frames(samples, queries), known.of_frames(samples, keys)
    if call.site.kind == "cross":
        return known.of_tokens(samples, queries), known.of_frames(samples, keys)
    return known.of_tokens(samples, queries), known.of_tokens(samples, keys)


def late_modality(micro: MicroBatch, site: Site) -> Tensor | None:
    """Return the modality (B, S) int8 of a layer's tokens as the root's output tells it, or a later layer did; ``None`` if none does.

    Ask while the hooks of the root's return run: ``micro.output`` is there only then. Only layers of kind ``joint`` have tokens that
    the model itself may have laid out anew. No sync; the answer is worked out once a micro-batch.
    """
    known: _Known | None = micro.scratch.get(_KNOWN)
    if known is None or site.kind != "joint":
        return None
    if known.late is None:
        found = output_modality(micro, known.roles)
        known.late = [known.layers if found is None else found]
    return known.late[0]
