"""What a model says of itself before it runs: class, vocabulary, codebooks, audio token ids, and how labels lie over logits."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

from probe.sites.configs import all_configs, config_of, field_of, fields_of, number_of, text_of
from probe.sites.conventions import logit_changes, padding_token
from probe.sites.encoders import is_audio_encoder
from probe.sites.names import class_name, is_pretrained, module_names, unwrapped

_AUDIO_TOKEN = re.compile(r"(?:^|_)(?:audio|boa|eoa)_(?:.*_)?(?:token_(?:id|idx|index)|bos_id|eos_id|pad_id)$")
_CODE_ID = re.compile(r"(?:^|_)audio_stream_")
_BORDER_CODES = ("audio_stream_bos_id", "audio_stream_eos_id")
_PLACEHOLDERS = (
    "audio_token_id",
    "audio_token_index",
    "audio_in_token_idx",
    "audio_out_token_idx",
    "audio_delay_token_id",
    "audio_prompt_token_id",
    "audio_latent_token_id",
)
_CODEBOOKS = ("num_codebooks", "audio_num_codebooks", "num_audio_codebooks", "n_codebooks")
_CODEBOOKS_BY_TYPE = {"dia": ("num_channels",)}
_LANGUAGE_PARTS = ("text_config", "decoder_config", "decoder", "thinker_config", "talker_config")
_NO_SHIFT = re.compile(r"For(?:MaskedLM|TokenClassification|CTC)$")
_EMBEDDINGS = frozenset({"embed_tokens", "wte", "word_embeddings", "tok_embeddings", "token_embedding", "text_embedding"})


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """What is known of a model from its class, its config and its embedding.

    Attributes:
        model_class: Class name of the core model, without FSDP's prefix.
        model_type: ``config.model_type``, or "".
        encoder_decoder: The config says that decoder and encoder are joined by cross-attention.
        vocabulary: Rows of the input embedding of tokens; ``None`` if unknown.
        codebooks: Codebooks of discrete audio; 0 if there are none.
        audio_tokens: Ids of special audio tokens in ``input_ids``, by the config's own field name. Ids that are unset or negative are
            left out, and so are ``audio_stream_bos_id`` and ``audio_stream_eos_id``: these count in the codebooks, not in the text
            vocabulary, where the same number is an ordinary word. A field that holds a list stands once for each id.
        audio_placeholders: Ids at whose positions the model puts audio embeddings. In Higgs Audio v2 the delay token is one
            (``get_placeholder_mask`` treats it like the audio token).
        label_shift: 0 where labels lie over logits position by position (encoder-decoder, masked), 1 where logits predict the next label.
        padding_token: Id that pads token sequences; ``None`` if the configs do not tell.
        ends_with_padding: That id also ends a text (or no other is known to).
        logit_factor, logit_softcap: What the class does to the logits of its text head, see :mod:`probe.sites.conventions`.
        border_codes: Codes that begin and end a stream of each codebook (``audio_stream_bos_id``, ``audio_stream_eos_id``): no sound.
    """

    model_class: str
    model_type: str
    encoder_decoder: bool
    vocabulary: int | None
    codebooks: int
    audio_tokens: tuple[tuple[str, int], ...]
    audio_placeholders: tuple[int, ...]
    label_shift: int
    padding_token: int | None = None
    ends_with_padding: bool = True
    logit_factor: float = 1.0
    logit_softcap: float | None = None
    border_codes: tuple[int, ...] = ()


def read_facts(model: nn.Module) -> ModelFacts:
    """Read the facts, through wrappers; what is not there is left unknown. Reads no tensor values."""
    core = core_model(model)
    configs = all_configs(core)
    encoder_decoder = bool(field_of(configs[0], "is_encoder_decoder")) if configs else False
    tokens = _audio_tokens(configs)
    padding, ends = padding_token(core)
    factor, softcap = logit_changes(core)
    return ModelFacts(
        model_class=class_name(core),
        model_type=text_of(configs[0], "model_type") if configs else "",
        encoder_decoder=encoder_decoder,
        vocabulary=_vocabulary(core),
        codebooks=_codebooks(configs),
        audio_tokens=tokens,
        audio_placeholders=tuple(dict.fromkeys(value for name, value in tokens if name in _PLACEHOLDERS)),
        label_shift=0 if encoder_decoder or _NO_SHIFT.search(class_name(core)) else 1,
        padding_token=padding,
        ends_with_padding=ends,
        logit_factor=factor,
        logit_softcap=softcap,
        border_codes=_border_codes(configs),
    )


def core_model(model: nn.Module) -> nn.Module:
    """Return the outermost transformers ``PreTrainedModel`` below wrappers, else the model itself.

    Where a hand-written module joins several, it is the one that generates (owns output embeddings); an audio encoder is never
    the core of a module that adds more to it.
    """
    if is_pretrained(model):
        return model
    names = module_names(model)
    outermost = [module for module in _outermost(model) if names.find(module) == "" or not is_audio_encoder(module)]
    generating = [module for module in outermost if output_embeddings(module) is not None]
    return next(iter(generating or outermost), model)


def output_embeddings(model: nn.Module) -> nn.Module | None:
    """Return what ``get_output_embeddings()`` returns if that is a module; ``None`` where there is none or the call raises."""
    return _asked(model, "get_output_embeddings")


def _outermost(model: nn.Module) -> Iterator[nn.Module]:
    for child in model.children():
        if is_pretrained(child):
            yield child
        else:
            yield from _outermost(child)


def _audio_tokens(configs: tuple[Any, ...]) -> tuple[tuple[str, int], ...]:
    """Collect special audio token ids; of a name that several configs hold, the outermost config's."""
    found: dict[str, tuple[int, ...]] = {}
    for config in configs:
        for name, value in fields_of(config):
            if name in found or not _AUDIO_TOKEN.search(name) or _CODE_ID.search(name):
                continue
            ids = tuple(each for each in (value if isinstance(value, (list, tuple)) else (value,)) if _is_id(each))
            if ids:
                found[name] = ids
    return tuple((name, each) for name, ids in found.items() for each in ids)


def _border_codes(configs: tuple[Any, ...]) -> tuple[int, ...]:
    """Collect the ids by which streams of codes begin and end, the outermost config's that names them."""
    for config in configs:
        codes = [field_of(config, name) for name in _BORDER_CODES]
        if any(_is_id(code) for code in codes):
            return tuple(code for code in codes if _is_id(code))
    return ()


def _is_id(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _codebooks(configs: tuple[Any, ...]) -> int:
    """Read the number of codebooks from the config or from its parts that describe a language model (a codec's own do not count)."""
    if not configs:
        return 0
    root = configs[0]
    parts = [root, *(part for name in _LANGUAGE_PARTS if (part := field_of(root, name)) is not None)]
    names = (*_CODEBOOKS, *_CODEBOOKS_BY_TYPE.get(text_of(root, "model_type"), ()))
    return next((number for part in parts if (number := number_of(part, *names)) is not None), 0)


def _vocabulary(core: nn.Module) -> int | None:
    """Count the rows of the token embedding: asked of the model, then of the models inside it, then by the usual names."""
    text = number_of(config_of(core), "text_vocab_size")  # beside an embedding of audio codes, which some return as *the* input embedding
    if text is not None and any(_rows(module) == text for module in core.modules()):
        return text
    for module in (core, *(module for module in core.modules() if module is not core and is_pretrained(module))):
        rows = _rows(_asked(module, "get_input_embeddings"))
        if rows is not None:
            return rows
    named = (module for name, module in core.named_modules() if name.rpartition(".")[2] in _EMBEDDINGS)
    return next((rows for module in named if (rows := _rows(module)) is not None), None)


def _rows(embedding: nn.Module | None) -> int | None:
    return None if embedding is None else number_of(unwrapped(embedding), "num_embeddings")


def _asked(model: nn.Module, method: str) -> nn.Module | None:
    function = getattr(model, method, None)
    if not callable(function):
        return None
    try:
        answer = function()
    except Exception:  # code of any model; many raise on purpose (NotImplementedError, AttributeError), and then the next rule is asked
        return None
    return answer if isinstance(answer, nn.Module) else None
