"""Flex attention that can train on a CPU, where torch's own cannot: the same definition, blind to function modes, uncompiled."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask
from torch.overrides import _get_current_function_mode_stack

from flash_stand_in import VERSION, Blind

if VERSION >= (4, 48):
    from transformers.integrations import flex_attention as integration


def flex_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    score_mod: Any = None,
    block_mask: Any = None,
    scale: float | None = None,
    enable_gqa: bool = False,
    **options: Any,
) -> Tensor:
    """Attend; q (B, H, S, D). Every score goes through ``score_mod``, every pair through the mask's function."""
    assert not _get_current_function_mode_stack(), "a function mode is entered: torch.compile would compile the kernel anew"
    (samples, heads, queries, width), (key_heads, keys) = query.shape, key.shape[1:3]
    assert key_heads == heads or enable_gqa
    index = [
        torch.arange(size).view([-1 if i == axis else 1 for i in range(4)]) for axis, size in enumerate((samples, heads, queries, keys))
    ]
    may = torch.ones(samples, heads, queries, keys).bool()
    if block_mask is not None:
        may &= block_mask.mask_mod(*index)

    def compute(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        k, v = (part.repeat_interleave(heads // key_heads, 1) for part in (k, v))
        scores = q @ k.mT * (width**-0.5 if scale is None else scale)
        if score_mod is not None:
            every = [part.expand(scores.shape).flatten() for part in index]
            scores = torch.vmap(score_mod)(scores.flatten(), *every).view(scores.shape)
        p = torch.softmax(scores.masked_fill(~may, float("-inf")), -1)
        return p.masked_fill(~may.any(-1, keepdim=True), 0.0) @ v

    return Blind.apply(compute, query, key, value)


def install(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let transformers' own flex attention call the stand-in, and make its block masks without compiling."""

    def run(query: Tensor, key: Tensor, value: Tensor, training: bool = False, **options: Any) -> Any:
        output = flex_attention(query, key, value, **options)
        return (output, torch.zeros(query.shape[:3])) if options.get("return_lse") else output

    monkeypatch.setattr(integration, "compile_friendly_flex_attention" if VERSION >= (4, 50) else "flex_attention", run)
    plain = functools.partial(create_block_mask, _compile=False)

    def uncompiled(*args: Any, **options: Any) -> Any:
        return plain(*args, **{**options, "_compile": False})

    if VERSION >= (4, 53):
        from transformers import masking_utils

        monkeypatch.setattr(masking_utils, "create_block_mask", uncompiled)
    if hasattr(integration, "create_block_mask"):
        monkeypatch.setattr(integration, "create_block_mask", uncompiled)
