"""A flash attention kernel made of torch, blind to function modes like the real one, and how transformers' own code comes to call it.

The stand-in has flash_attn's signatures and semantics: q, k, v (B, S, H, D) or packed with ``cu_seqlens``, grouped heads, causality aligned
at the bottom right, inclusive windows, softcap, dropout, sinks; it computes in float32 (float64 for float64 input) and returns q's dtype.
Real flash attention takes its place where it is installed together with a GPU, see ``REAL``.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers import modeling_flash_attention_utils as utils

VERSION = tuple(int(part) for part in transformers.__version__.split(".")[:2])
#: Real kernels can be run: then models of the same tests run them, in bfloat16 on the GPU.
REAL = torch.cuda.is_available() and find_spec("flash_attn") is not None
#: Before 4.56 a flash kernel was told of one key more on each side than eager attention sees.
WINDOW_EXCESS = int(VERSION < (4, 56))


def attend(
    q_SHD: Tensor,
    k_KhD: Tensor,
    v_KhD: Tensor,
    *,
    scale: float | None = None,
    causal: bool = False,
    window: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    sinks_H: Tensor | None = None,
    keep_HSK: Tensor | None = None,
) -> Tensor:
    """Return the output (S, H, D) of one sequence: the definition itself, written out. ``keep_HSK`` multiplies the probabilities."""
    (queries, heads, width), (keys, key_heads) = q_SHD.shape, k_KhD.shape[:2]
    k_KHD, v_KHD = (part.repeat_interleave(heads // key_heads, 1) for part in (k_KhD, v_KhD))
    scores_HSK = torch.einsum("shd,khd->hsk", q_SHD, k_KHD) * (width**-0.5 if scale is None else scale)
    if softcap:
        scores_HSK = softcap * torch.tanh(scores_HSK / softcap)
    ahead_SK = torch.arange(keys, device=q_SHD.device) - (torch.arange(queries, device=q_SHD.device) + keys - queries)[:, None]
    left, right = window[0], 0 if causal else window[1]
    hidden_SK = torch.zeros_like(ahead_SK, dtype=torch.bool)
    hidden_SK |= ahead_SK > right if right >= 0 else hidden_SK
    hidden_SK |= ahead_SK < -left if left >= 0 else hidden_SK
    scores_HSK = scores_HSK.masked_fill(hidden_SK, float("-inf"))
    if sinks_H is not None:
        scores_HSK = torch.cat((scores_HSK, sinks_H.to(scores_HSK.dtype)[:, None, None].expand(-1, queries, 1)), -1)
    p_HSK = torch.softmax(scores_HSK, -1)[..., :keys].masked_fill(hidden_SK.all(1)[:, None], 0.0)
    return torch.einsum("hsk,khd->shd", p_HSK if keep_HSK is None else p_HSK * keep_HSK, v_KHD)


class Blind(torch.autograd.Function):
    """Runs a function of tensors as an extension in C would: no function mode sees into it, forward or backward."""

    @staticmethod
    def forward(ctx: Any, compute: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
        ctx.compute = compute
        ctx.save_for_backward(*tensors)
        with torch._C.DisableTorchFunction(), torch.autocast(tensors[0].device.type, enabled=False):
            return compute(*tensors)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        saved = ctx.saved_tensors  # once: a checkpoint computes them anew when they are asked for
        with torch._C.DisableTorchFunction(), torch.enable_grad(), torch.autocast(saved[0].device.type, enabled=False):
            inputs = [tensor.detach().requires_grad_() for tensor in saved]
            return None, *torch.autograd.grad(ctx.compute(*inputs), inputs, *gradients, allow_unused=True)


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: Any,
    max_seqlen_k: Any,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    deterministic: bool = False,
    s_aux: Tensor | None = None,
) -> Tensor:
    """Attend in packed sequences; q (tokens, H, D). Tokens in no sequence get 0."""
    assert all(part.dim() == 3 for part in (q, k, v))
    ends_q, ends_k = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    pieces = [(slice(*ends_q[i : i + 2]), slice(*ends_k[i : i + 2])) for i in range(len(ends_q) - 1)]
    kept = [_dropout_mask(q.shape[1], s, k_, dropout_p) for s, k_ in pieces]
    options = {"scale": softmax_scale, "causal": causal, "window": window_size, "softcap": softcap}

    def compute(q: Tensor, k: Tensor, v: Tensor, *sinks: Tensor) -> Tensor:
        wide = [part if part.dtype == torch.float64 else part.float() for part in (q, k, v)]
        out = torch.zeros((*q.shape[:2], v.shape[2]), dtype=wide[0].dtype, device=q.device)
        for (s, k_), keep in zip(pieces, kept):
            if s.stop > s.start and k_.stop > k_.start:
                out = out.index_add(
                    0,
                    torch.arange(s.start, s.stop),
                    attend(wide[0][s], wide[1][k_], wide[2][k_], sinks_H=sinks[0] if sinks else None, keep_HSK=keep, **options),
                )
        return out.to(q.dtype)

    return Blind.apply(compute, q, k, v, *(() if s_aux is None else (s_aux,)))


def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    deterministic: bool = False,
    s_aux: Tensor | None = None,
) -> Tensor:
    """Attend; q (B, S, H, D)."""
    samples, queries, keys = q.shape[0], q.shape[1], k.shape[1]
    cu_q, cu_k = (torch.arange(samples + 1) * length for length in (queries, keys))
    flat = (part.flatten(0, 1) for part in (q, k, v))
    options = (dropout_p, softmax_scale, causal, window_size, softcap, deterministic, s_aux)
    return flash_attn_varlen_func(*flat, cu_q, cu_k, queries, keys, *options).unflatten(0, (samples, queries))


def _dropout_mask(heads: int, queries: slice, keys: slice, p: float) -> Tensor | None:
    shape = (heads, queries.stop - queries.start, keys.stop - keys.start)
    return None if p == 0.0 else (torch.rand(shape) >= p).float() / (1 - p)


def without_sinks(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Return the kernel as flash_attn 2 has it: without ``s_aux``."""
    if function is flash_attn_func:

        def dense(q: Tensor, k: Tensor, v: Tensor, dropout_p: float = 0.0, softmax_scale: Any = None, causal: bool = False,
                  window_size: Any = (-1, -1), softcap: float = 0.0, deterministic: bool = False) -> Tensor:  # fmt: skip
            return flash_attn_func(q, k, v, dropout_p, softmax_scale, causal, window_size, softcap, deterministic)

        return dense

    def packed(q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: Any, max_seqlen_k: Any,
               dropout_p: float = 0.0, softmax_scale: Any = None, causal: bool = False, window_size: Any = (-1, -1),
               softcap: float = 0.0, deterministic: bool = False) -> Tensor:  # fmt: skip
        lengths = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
        return flash_attn_varlen_func(q, k, v, *lengths, dropout_p, softmax_scale, causal, window_size, softcap, deterministic)

    return packed


def install(monkeypatch: pytest.MonkeyPatch, *, sinks: bool = True) -> None:
    """Let transformers' own flash attention code call the stand-in, whatever its version."""
    dense, packed = (flash_attn_func, flash_attn_varlen_func) if sinks else map(without_sinks, (flash_attn_func, flash_attn_varlen_func))

    def put(name: str, value: Any) -> None:
        monkeypatch.setattr(utils, name, value, raising=False)

    if hasattr(utils, "_lazy_define_process_function"):  # since 4.55
        put("_flash_fn", dense)
        put("_flash_varlen_fn", packed)
        put("_flash_with_kvcache_fn", None)
        put("_pad_fn", utils._pad_input)
        put("_unpad_fn", utils._unpad_input)
        put("_process_flash_kwargs_fn", utils._lazy_define_process_function(packed))
        put("_process_with_kvcache_kwargs_fn", dict)
        put("_loaded_implementation", "flash_attention_2")
    else:
        put("flash_attn_func", dense)
        put("flash_attn_varlen_func", packed)
        put("_flash_supports_window_size", True)
        put("index_first_axis", lambda tensor, indices: tensor[indices])
        put("pad_input", _pad_input)
        put("unpad_input", _unpad_input)
    integration = sys.modules.get("transformers.integrations.flash_attention")
    if integration is not None:
        monkeypatch.setattr(integration, "_use_top_left_mask", False)


def _pad_input(tensor: Tensor, indices: Tensor, samples: int, length: int) -> Tensor:
    padded = torch.zeros((samples * length, *tensor.shape[1:]), dtype=tensor.dtype)
    return padded.index_put((indices.long(),), tensor).unflatten(0, (samples, length))


def _unpad_input(tensor: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor, int]:
    lengths = mask.sum(1, dtype=torch.int32)
    indices = mask.flatten().nonzero().flatten()
    return tensor.flatten(0, 1)[indices], indices, F.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0)), int(lengths.max())


def built_for(monkeypatch: pytest.MonkeyPatch, build: Callable[[], nn.Module], implementation: str = "flash_attention_2") -> nn.Module:
    """Return the model that ``build`` makes, with another attention implementation than it would choose (or than is available)."""
    if VERSION >= (4, 48):
        return with_implementation(build(), implementation)

    def enable(cls: type, config: Any, *args: Any, **kwargs: Any) -> Any:
        config._attn_implementation = _possible(config, implementation)
        return config

    with monkeypatch.context() as building:
        building.setattr(PreTrainedModel, "_autoset_attn_implementation", classmethod(enable))
        model = build()
    for module in model.modules():
        if hasattr(module, "_flash_attn_uses_top_left_mask"):
            module._flash_attn_uses_top_left_mask = False  # what a flash_attn of today has
            modeling = importlib.import_module(type(module).__module__)
            monkeypatch.setattr(modeling, "_flash_attention_forward", utils._flash_attention_forward, raising=False)
            monkeypatch.setattr(modeling, "is_flash_attn_greater_or_equal", lambda version: True, raising=False)
    return model


def with_implementation(model: nn.Module, implementation: str) -> nn.Module:
    """Return the model, all of its configs naming the implementation."""
    for module in model.modules():
        config = getattr(module, "config", None)
        if config is not None:
            config._attn_implementation = _possible(config, implementation)
    return model


def _possible(config: Any, implementation: str) -> str:
    """Return the implementation, or eager for the one encoder that gives flash attention a mask which it cannot take."""
    flawed = VERSION < (5, 0) and type(config).__name__ == "Qwen2AudioEncoderConfig" and implementation.startswith("flash")
    return "eager" if flawed else implementation
