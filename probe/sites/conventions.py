"""What a model's configs say beside its sizes: which token pads, and what the model does to logits behind its head."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from torch import nn

from probe.sites.configs import all_configs, field_of, text_of

_LANGUAGE_PARTS = ("text_config", "decoder_config", "decoder", "thinker_config", "llm_config")
_MULTIPLIED_BY = ("logit_scale", "output_multiplier", "lm_head_multiplier")
# Granite and MiniCPM3 divide logits by ``logits_scaling``; these multiply.
_MULTIPLIES = frozenset({"hyperclovax"})


def padding_token(core: nn.Module) -> tuple[int | None, bool]:
    """Return the id that pads token sequences, if it is known, and whether that id also ends a text (or may, for all that is known).

    Looked for in the config, its language parts, then the generation config.
    """
    configs = [*_language_configs(core), getattr(core, "generation_config", None)]
    pad = next((value for config in configs if _is_id(value := field_of(config, "pad_token_id"))), None)
    ends = next((value for config in configs if (value := field_of(config, "eos_token_id")) is not None), None)
    ids = ends if isinstance(ends, (list, tuple)) else () if ends is None else (ends,)
    return pad, not ids or pad in ids


def logit_changes(core: nn.Module) -> tuple[float, float | None]:
    """Return the factor and the softcap that the model's class applies to the logits of its text head: ``cap * tanh(x * factor / cap)``.

    1 and ``None`` where it leaves them as they are. Source: modeling_cohere, modeling_granite, modeling_gemma2 and others of
    transformers; trl.trainer.utils.add_fused_lm_head, which reads the same fields.
    """
    configs = list(_language_configs(core))
    softcap = _number(configs, ("final_logit_softcapping",))
    factor = _number(configs, _MULTIPLIED_BY)
    if factor is None:
        by = _number(configs, ("logits_scaling",))
        multiplies = any(text_of(config, "model_type") in _MULTIPLIES for config in configs)
        factor = None if by is None else by if multiplies else 1 / by
    return 1.0 if factor is None else factor, softcap


def _language_configs(core: nn.Module) -> Iterator[Any]:
    for root in all_configs(core)[:1]:
        yield root
        yield from (part for name in _LANGUAGE_PARTS if (part := field_of(root, name)) is not None and not callable(part))


def _number(configs: Sequence[Any], names: Sequence[str]) -> float | None:
    """Return the first of the named fields that is a number above 0."""
    values = (field_of(config, name) for name in names for config in configs)
    return next((float(value) for value in values if _is_number(value) and value > 0), None)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _is_id(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0
