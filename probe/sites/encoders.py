"""Finding audio encoders: by their mel front end, by what the model and its config say, by the input that they take."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

from torch import nn

from probe.records import Site
from probe.sites.configs import config_of, field_of
from probe.sites.names import ModuleNames, child_of, class_name, is_below, is_pretrained

AUDIO_INPUTS = frozenset({"input_features", "input_values"})
_AUDIO_CONFIGS = ("audio_config", "encoder_config", "speech_config", "speech_encoder_config", "audio_encoder_config")
_AUDIO_PARTS = (*_AUDIO_CONFIGS, "audio_encoder", "thinker_config")
_TASK = re.compile(r"For[A-Z]")
_Rule = Callable[[ModuleNames, nn.Module], Iterator[tuple[str, str]]]


def find_encoders(names: ModuleNames, core: nn.Module) -> tuple[Site, ...]:
    """Find every audio encoder below the root. Of modules inside one another, what an earlier rule found stays."""
    found: dict[str, str] = {}
    codecs = codec_names(names)
    for rule in _RULES:
        for name, found_by in rule(names, core):
            apart = not any(name == other or is_below(name, other) or is_below(other, name) for other in (*found, *codecs))
            if name and apart:
                found[name] = found_by
    return tuple(Site(name, "audio_encoder", found_by) for name, found_by in found.items())


def why_no_encoder(names: ModuleNames, core: nn.Module, codebooks: int) -> str:
    """Say why no audio encoder was found."""
    if names.find(core) == "" and is_audio_encoder(core):
        return "the trained model is itself the audio encoder: see the site of the whole model"
    config = config_of(core)
    parts = [name for name in _AUDIO_PARTS if field_of(config, name) is not None]
    told = f"no module is built from the config's {' or '.join(parts)}" if parts else "the config has no audio part"
    reason = f"no module with a mel front end (conv1 and conv2), and {told if config is not None else 'the model has no config'}"
    if codebooks:
        reason += f"; audio goes in and out as discrete codes ({codebooks} codebooks)"
    codecs = codec_names(names)
    return f"{reason}; {', '.join(codecs)} is an audio codec, not an encoder of features" if codecs else reason


def is_audio_encoder(module: nn.Module) -> bool:
    """Say whether a module taken by itself encodes audio features: a mel front end, or a pretrained encoder with audio as its input."""
    return is_whisper_like(module) or (_takes_audio(module) and not _TASK.search(class_name(module)) and not _has_more(module))


def is_whisper_like(module: nn.Module) -> bool:
    """Say whether the module owns two 1-d convolutions ``conv1``, ``conv2`` and a list of ``layers``."""
    convolutions = (child_of(module, "conv1"), child_of(module, "conv2"))
    return all(isinstance(conv, nn.Conv1d) for conv in convolutions) and isinstance(child_of(module, "layers"), nn.ModuleList)


def codec_names(names: ModuleNames) -> tuple[str, ...]:
    """Return the audio codecs: the outermost pretrained models that own a quantizer."""
    found: list[str] = []
    for name, module in names.by_name.items():
        quantizes = any("quantizer" in key for key in module._modules)
        if name and is_pretrained(module) and quantizes and not any(is_below(name, other) for other in found):
            found.append(name)
    return tuple(found)


def is_text_encoder(module: nn.Module) -> bool:
    """Say whether the module embeds token ids itself: it owns an embedding with as many rows as its config has words."""
    rows = field_of(config_of(module), "vocab_size")
    return rows is not None and any(isinstance(child, nn.Embedding) and child.num_embeddings == rows for child in module.children())


def own_encoder(core: nn.Module, **arguments: Any) -> nn.Module | None:
    """Return what the model's own ``get_encoder`` returns (some return themselves); ``None`` if it raises or there is none."""
    get_encoder: Any = getattr(core, "get_encoder", None)
    try:
        encoder = get_encoder(**arguments)
    except Exception:  # code of any model: no such method, no such argument, not implemented
        return None
    return encoder if isinstance(encoder, nn.Module) else None


def _by_front_end(names: ModuleNames, _core: nn.Module) -> Iterator[tuple[str, str]]:
    for name, module in names.by_name.items():
        if is_whisper_like(module):
            yield name, "structure: conv1 and conv2 in front of a list of layers"


def _by_get_encoder(names: ModuleNames, core: nn.Module) -> Iterator[tuple[str, str]]:
    """Ask the model. ``get_encoder`` returns the model itself where it has none; an encoder of text is none of ours."""
    asked: list[tuple[str, Any]] = [('get_encoder(modality="audio")', {"modality": "audio"})]
    if getattr(core, "main_input_name", None) in AUDIO_INPUTS and field_of(config_of(core), "is_encoder_decoder"):
        asked.append(("get_encoder()", {}))
    for said, arguments in asked:
        encoder = own_encoder(core, **arguments)
        name = None if encoder is None else names.find(encoder)
        if name and encoder is not None and encoder is not core and not is_text_encoder(encoder) and not _has_more(encoder):
            yield name, f"the model's own {said}"


def _by_config(names: ModuleNames, core: nn.Module) -> Iterator[tuple[str, str]]:
    """Find the module that was built from the config's audio part (the same object in 5.x, in some models of 4.x a copy)."""
    config = config_of(core)
    owners = [config, field_of(config, "thinker_config")]
    parts = [(part, field) for owner in owners for field in _AUDIO_CONFIGS if (part := field_of(owner, field)) is not None]
    for part, field in parts:
        for name, module in _pretrained(names, core):
            own = config_of(module)
            if (own is part or type(own) is type(part)) and own is not config and not is_text_encoder(module):
                yield name, f"built from the config's {field}"


def _by_input(names: ModuleNames, core: nn.Module) -> Iterator[tuple[str, str]]:
    for name, module in _pretrained(names, core):
        decodes = "decoder" in name.rpartition(".")[2] or _has_more(module)
        if _takes_audio(module) and not decodes and not is_text_encoder(module):
            yield name, f"a pretrained model of its own whose main input is {module.main_input_name}"


def _pretrained(names: ModuleNames, core: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    return ((name, module) for name, module in names.by_name.items() if name and module is not core and is_pretrained(module))


def _takes_audio(module: nn.Module) -> bool:
    return is_pretrained(module) and getattr(module, "main_input_name", None) in AUDIO_INPUTS


def _has_more(module: nn.Module) -> bool:
    """Say whether the module is more than an encoder: it owns a decoder or a language model too."""
    return any(key in ("decoder", "language_model", "text_decoder", "lm_head") for key in module._modules)


_RULES: tuple[_Rule, ...] = (_by_front_end, _by_get_encoder, _by_config, _by_input)
