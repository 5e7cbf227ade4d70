"""Finding every attention layer, and what it attends over: audio, tokens, tokens to audio, or both in one sequence."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from torch import nn

from probe.foreign.recorders import AttentionRecorder, attention_recorders
from probe.records import AttentionKind, Site
from probe.sites.configs import config_of, field_of
from probe.sites.encoders import codec_names, is_audio_encoder, own_encoder
from probe.sites.facts import ModelFacts
from probe.sites.names import ModuleNames, class_name, is_below, is_pretrained

NO_ATTENTION = "no module owns query and key projections, and no class name ends in Attention"
_PAIRS = (("q_proj", "k_proj"), ("q", "k"), ("query", "key"), ("to_q", "to_k"), ("to_q", "to_kv"), ("linear_q", "linear_k"))
_MORE_PAIRS = (("q_lin", "k_lin"), ("wq", "wk"), ("Wq", "Wk"), ("query_proj", "key_proj"), ("q_linear", "k_linear"))
_JOINED = ("qkv_proj", "c_attn", "query_key_value", "qkv", "Wqkv", "wqkv", "in_proj_qkv")
_CLASS = re.compile(r"(?:Attention|FlashAttention2|MultiHeadAttention\d*)$")
_CROSS_PARTS = frozenset(
    {"encoder_attn", "enc_attn", "cross_attn", "crossattention", "cross_attention", "EncDecAttention", "multihead_attn"},
)
_IMAGE_INPUTS = frozenset({"pixel_values", "pixel_values_videos"})
_TOWER_CONFIGS = ("vision_config", "image_config", "token2wav_config", "code2wav_config", "vocoder_config")


@dataclass(frozen=True, slots=True)
class AttentionFinder:
    """The attention layers of one model: which modules they are, and the rule for their kind.

    Attributes:
        names: The model's modules.
        found: Name of each attention layer to the rule that found it, in tree order.
        cross: Those that the model's own map names as cross-attention.
        audio: Names of audio encoders and projectors. What is inside them, or inside ``towers``, attends over what is encoded there.
        towers: Names of other encoders: the text encoder of an encoder-decoder model, audio codecs, vision towers.
        facts: What the model says of itself.
    """

    names: ModuleNames
    found: dict[str, str]
    cross: frozenset[str]
    audio: tuple[str, ...]
    towers: tuple[str, ...]
    facts: ModelFacts

    def site(self, name: str, found_by: str) -> Site:
        """Make the site of one attention layer, found or chosen."""
        return Site(name, "attention", found_by, kind=self.kind(name))

    def kind(self, name: str) -> AttentionKind:
        """Say what a layer attends over; of a layer inside an encoder that is what the encoder encodes."""
        if self._is_cross(name):
            return "cross"
        if self._is_inside(name):
            return "encoder"
        return "joint" if not self.facts.encoder_decoder and self._audio_in_sequence() else "decoder"

    def _is_cross(self, name: str) -> bool:
        module = self.names.by_name[name]
        said = name in self.cross or getattr(module, "is_cross_attention", False) is True
        return said or not _CROSS_PARTS.isdisjoint(name.split(".")) or "CrossAttention" in class_name(module)

    def _audio_in_sequence(self) -> bool:
        """Say whether audio stands among the tokens. A decoder that reads an encoder by cross-attention only has none there."""
        if self.facts.audio_placeholders or self.facts.codebooks:
            return True
        return bool(self.audio) and not any(self._is_cross(name) and not self._is_inside(name) for name in self.found)

    def _is_inside(self, name: str) -> bool:
        return any(name == other or is_below(name, other) for other in (*self.audio, *self.towers))


def find_attention(names: ModuleNames, core: nn.Module, facts: ModelFacts, audio: Iterable[str]) -> AttentionFinder:
    """Find every attention layer, given the names of audio encoders and projectors.

    Of attention modules inside one another, the innermost that owns the projections counts: that is where scores are computed.
    """
    recorded = _recorded(names, core)
    owners = {name for name, module in names.by_name.items() if name and owns_projections(module)}
    named = {name for name, module in names.by_name.items() if name and _CLASS.search(class_name(module))}
    found: dict[str, str] = {}
    for name in names.by_name:
        if name in owners:
            inside, outside = owners, set[str]()
        elif name in recorded or name in named:
            inside, outside = owners | named | recorded.keys(), owners
        else:
            continue
        if not any(is_below(other, name) for other in inside) and not any(is_below(name, other) for other in outside):
            found[name] = _found_by(name, recorded, owners)
    cross = frozenset(name for name in found if _named_as_cross(name, recorded))
    itself = [""] if names.find(core) == "" and is_audio_encoder(core) else []
    return AttentionFinder(names, found, cross, (*audio, *itself), _other_towers(names, core, facts), facts)


def owns_projections(module: nn.Module) -> bool:
    """Say whether a module owns query and key projections, apart or joined into one."""
    children = module._modules
    apart = any(children.get(query) is not None and children.get(key) is not None for query, key in (*_PAIRS, *_MORE_PAIRS))
    return apart or any(children.get(name) is not None for name in _JOINED) or isinstance(module, nn.MultiheadAttention)


def _recorded(names: ModuleNames, core: nn.Module) -> dict[str, bool]:
    """Ask each pretrained model's own map; the map of the innermost model round a module counts. Value: only a cross-attention."""
    found: dict[str, bool] = {}
    models = [*names.by_name.items(), (names.find(core) or "", core)]
    owners = {name: attention_recorders(module) for name, module in models if is_pretrained(module)}
    for name, module in names.by_name.items():
        owner = _owner(name, owners)
        if owner is None or name == owner:
            continue
        hits = [entry for entry in owners[owner] if entry.matches(module, name[len(owner) :].lstrip("."))]
        if hits:
            found[name] = all(entry.cross for entry in hits)
    return found


def _owner(name: str, owners: dict[str, tuple[AttentionRecorder, ...]]) -> str | None:
    while name:
        name = name.rpartition(".")[0]
        if name in owners:
            return name
    return None


def _found_by(name: str, recorded: dict[str, bool], owners: set[str]) -> str:
    if name in recorded or any(is_below(name, other) for other in recorded):
        return "the model's own map of attention layers"
    return "structure: owns query and key projections" if name in owners else "class name ends in Attention"


def _named_as_cross(name: str, recorded: dict[str, bool]) -> bool:
    """Say whether the model's map names the layer, or the one round it (T5), as cross-attention."""
    return any(cross and (name == other or is_below(name, other)) for other, cross in recorded.items())


def _other_towers(names: ModuleNames, core: nn.Module, facts: ModelFacts) -> tuple[str, ...]:
    """Name what encodes or renders besides audio encoders: the encoder of an encoder-decoder model, codecs, vision towers, vocoders."""
    configs = [config_of(core), field_of(config_of(core), "thinker_config")]
    types = {type(part) for config in configs for field in _TOWER_CONFIGS if (part := field_of(config, field)) is not None} - {dict}
    towers = list(codec_names(names))
    for name, module in names.by_name.items():
        if name and is_pretrained(module) and not {"language_model", "text_model"} & module._modules.keys():
            sees = getattr(module, "main_input_name", None) in _IMAGE_INPUTS
            towers.extend([name] if sees or type(config_of(module)) in types else [])
    encoder = own_encoder(core) if facts.encoder_decoder else None
    encoder_name = None if encoder is None else names.find(encoder)
    return tuple([*towers, encoder_name] if encoder_name else towers)
