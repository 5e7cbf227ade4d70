"""What transformers' flash attention was asked for, as the installed version understands it.

``_flash_attention_forward`` is run on 4.46.3, 4.48.3, 4.57.6 and 5.23.0, and read in 4.50, 4.52 to 4.56. What differs between them:

* the window: ``(w, w)`` before 4.56, ``(w - 1, w - 1)`` since;
* packed sequences are told by ``position_ids`` in a batch of any size (to 4.52, and in 4.54), else in a batch of one; to 4.53 only if some
  position is below the one before;
* since 4.55, ``_process_flash_kwargs_fn`` tells what of softcap, window and sinks the loaded kernel supports: what it does not is dropped.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import modeling_flash_attention_utils as flash

_VERSION = tuple(int(part) for part in transformers.__version__.split(".")[:2])


@dataclass(frozen=True, slots=True)
class FlashCall:
    """One call, its tensors by reference. B batch, S tokens (queries), K keys, M keys of the mask, H query heads, h key heads, D width.

    Attributes:
        q_BSHD, k_BKhD: As given, before they are cast to ``dtype``.
        mask_BM: 0 for padding; ``None`` if there is none.
        cu_seq_lens: Where packed sequences begin, and the end of the last: of queries and of keys, each (sequences + 1,); or ``None``.
        position_ids: Positions (B, S) that may tell packed sequences, each beginning at the smallest; ``None`` if they are not looked at.
        if_decreasing: ``position_ids`` count only if some position is below the one before it.
        causal: Whether later keys are hidden.
        top_left: Old kernels: causality is aligned at the first query and key, not at the last.
        window: Keys before and after a query's own place that are seen, inclusive; ``None`` for all.
        paged: Keys and values lie in a cache of the kernel's own.
        dtype: What float32 q and k are cast to; ``None`` for no cast.
    """

    q_BSHD: Tensor
    k_BKhD: Tensor
    mask_BM: Tensor | None = None
    cu_seq_lens: tuple[Tensor, Tensor] | None = None
    position_ids: Tensor | None = None
    if_decreasing: bool = False
    causal: bool = False
    top_left: bool = False
    scale: float | None = None
    softcap: float | None = None
    window: tuple[int, int] | None = None
    sinks_H: Tensor | None = None
    paged: bool = False
    dtype: torch.dtype | None = None


def flash_call(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> FlashCall:
    """Read a call of ``_flash_attention_forward`` that has just returned. Host work only."""
    bound = inspect.signature(function).bind(*args, **kwargs)
    bound.apply_defaults()
    given = {**bound.arguments, **bound.arguments.get("kwargs", {})}
    q_BSHD, k_BKhD = given["query_states"], given["key_states"]
    told = _told(given, queries=given["query_length"], keys=k_BKhD.shape[1])
    return FlashCall(
        q_BSHD,
        k_BKhD,
        mask_BM=given["attention_mask"],
        cu_seq_lens=_cu_seq_lens(given),
        position_ids=looked_at(given["position_ids"], q_BSHD.shape[0]),
        if_decreasing=_VERSION < (4, 54) and given.get("max_length_q") is None,
        causal=bool(told["causal"]),
        top_left=bool(given["use_top_left_mask"]),
        scale=given["softmax_scale"],
        softcap=told.get("softcap") or None,
        window=told.get("window_size"),
        sinks_H=told.get("s_aux", told.get("learnable_sink")),
        paged=given.get("block_table") is not None,
        dtype=given.get("target_dtype") if q_BSHD.dtype == torch.float32 else None,
    )


def window_of(sliding_window: int | None) -> tuple[int, int] | None:
    """Return the window that ``sliding_window`` means to a flash kernel: keys before and after, inclusive."""
    if sliding_window is None:
        return None
    side = sliding_window - (_VERSION >= (4, 56))
    return side, side


def looked_at(position_ids: Tensor | None, samples: int) -> Tensor | None:
    """Return the positions if this version looks for packed sequences in them in a batch of that size, else ``None``."""
    any_batch = _VERSION < (4, 53) or _VERSION == (4, 54)
    return position_ids if any_batch or samples == 1 else None


def _cu_seq_lens(given: dict[str, Any]) -> tuple[Tensor, Tensor] | None:
    names = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")
    needed = names if _VERSION >= (4, 53) else (*names, "position_ids")
    return None if any(given.get(name) is None for name in needed) else (given["cu_seq_lens_q"], given["cu_seq_lens_k"])


def _told(given: dict[str, Any], *, queries: int, keys: int) -> dict[str, Any]:
    """Return what the kernel itself is told: ``causal``, and of ``softcap``, ``window_size`` and sinks what applies."""
    asked = {name: given[name] for name in ("is_causal", "softmax_scale", "sliding_window", "use_top_left_mask", "softcap")}
    process = getattr(flash, "_process_flash_kwargs_fn", None)
    if callable(process) and process is not dict:
        told: dict[str, Any] = process(query_length=queries, key_length=keys, s_aux=given.get("s_aux"), **asked)
        return told
    supported = getattr(flash, "_flash_supports_window_size", getattr(flash, "_flash_supports_window", True))
    return {
        "causal": asked["is_causal"] and not (asked["use_top_left_mask"] and queries == 1),
        "window_size": window_of(asked["sliding_window"]) if supported else None,
        "softcap": asked["softcap"],
    }
