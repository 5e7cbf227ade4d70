"""Stands round kernels that torch functions do not show, and turns a call of theirs into where its attention rows are.

Shapes: B batch, S tokens (queries), K keys, M keys of a padding mask, H query heads, h key heads, D width.

Sources: ``flash_attention_forward``, ``_flash_attention_forward`` and ``flex_attention_forward`` of transformers; for the flash kernels'
own conventions (causality aligned at the bottom right, inclusive windows, ``cu_seqlens``) ``flash_attn/flash_attn_interface.py`` 2.8.
"""

from __future__ import annotations

import inspect
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from probe.capture.tap import AttentionTap
from probe.foreign.attention_kernels import Kernel
from probe.foreign.flash_call import FlashCall, flash_call, looked_at, window_of
from probe.foreign.function_modes import innermost, stepped_out_of
from probe.measure.blocks import NotObservable, RowSource
from probe.measure.output_check import CheckedRows, OutputCheck
from probe.measure.probabilities import FromScores
from probe.measure.scores import MaskFunction, Scores

_INTERFACE = ("module", "query", "key", "value", "attention_mask")


def run_kernel(kernel: Kernel, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run a kernel as it was called and return its very result; then report the call to the tap that is entered innermost, if any is.

    Not if something inside the kernel was reported already, and not while ``torch.compile`` traces. Flex attention runs outside the tap's
    function mode: its compiled kernel is compiled anew under another stack of modes.
    """
    tap = None if torch.compiler.is_compiling() else innermost(AttentionTap)
    if tap is None:
        return kernel.function(*args, **kwargs)
    reported = tap.reported
    with stepped_out_of(AttentionTap) if kernel.convention == "flex" else nullcontext():
        result = kernel.function(*args, **kwargs)
    if tap.reported == reported:
        tap.report(lambda: read_call(kernel, args, kwargs, result))
    return result


def read_call(kernel: Kernel, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> RowSource:
    """Return where the rows of a kernel's call are, by the kernel's convention.

    Raises:
        NotObservable: with the kernel's name and why.
    """
    if kernel.convention == "flash":
        return from_flash(flash_call(kernel.function, args, kwargs))
    if kernel.convention == "flex":
        return from_flex(kernel, args, kwargs)
    if kernel.convention == "paged":
        raise NotObservable(f"the kernel {kernel.name!r} is paged: it reads keys and values from a cache of its own")
    return from_interface(kernel, args, kwargs, result)


def from_flash(call: FlashCall) -> FromScores:
    """Return the rows of a flash attention call: padding and other sequences are never computed, and so hidden.

    Raises:
        NotObservable: a paged call; a padding mask shorter than the queries; a batch of several rows with ``cu_seq_lens``.
    """
    if call.paged:
        raise NotObservable("paged flash attention reads keys and values from a cache of its own")
    q_BHSD, k_BhKD = (part.detach().transpose(1, 2) for part in (call.q_BSHD, call.k_BKhD))
    queries, keys = q_BHSD.shape[2], k_BhKD.shape[2]
    scores = Scores(
        q_BHSD,
        k_BhKD,
        scale=call.scale,
        softcap=call.softcap,
        causal_offset=None if not call.causal else 0 if call.top_left else keys - queries,
        window=call.window,
        sinks_H=None if call.sinks_H is None else call.sinks_H.detach(),
        autocast_dtype=call.dtype,
    )
    if call.mask_BM is not None:
        return FromScores(_padded(scores, call.mask_BM, call))
    if call.cu_seq_lens is not None:
        return FromScores(_packed_by_lengths(scores, *call.cu_seq_lens))
    if call.position_ids is not None and queries == keys:
        return FromScores(_packed_by_positions(scores, call.position_ids, call.if_decreasing))
    return FromScores(scores)


def from_flex(kernel: Kernel, args: tuple[Any, ...], kwargs: dict[str, Any]) -> FromScores:
    """Return the rows of a call of transformers' flex attention: q, k (B, heads, length, D), a block mask or an added 4-D mask.

    Raises:
        NotObservable: a block mask without a function, or a 4-D mask that is bool, which flex attention adds as 0 and 1.
    """
    bound = inspect.signature(kernel.function).bind(*args, **kwargs).arguments
    given = {**bound, **bound.get("kwargs", {})}
    mask, s_aux = given["attention_mask"], given.get("s_aux")
    if isinstance(mask, Tensor) and mask.dtype == torch.bool:
        raise NotObservable("flex attention was given a bool mask, which it adds to the scores as 0 and 1")
    return FromScores(
        Scores(
            given["query"].detach(),
            given["key"].detach(),
            scale=given.get("scaling"),
            softcap=given.get("softcap"),
            mask=mask.detach()[:, :1] if isinstance(mask, Tensor) else None,  # the kernel reads head 0
            may=None if mask is None or isinstance(mask, Tensor) else _mask_function(mask),
            bias=_detached(given.get("position_bias")),
            sinks_H=_detached(s_aux),
        )
    )


def from_interface(kernel: Kernel, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> CheckedRows:
    """Return the rows of a kernel that somebody registered, supposed to do what the interface documents, and the check that it did.

    Supposed: a 4-D mask is as ``scaled_dot_product_attention`` has it, a 2-D one, and none, as flash attention has them.

    Raises:
        NotObservable: the arguments or the result are none of this, or the kernel's own dropout keeps its output from being checked.
    """
    given = {**dict(zip(_INTERFACE, args)), **kwargs}
    q, k, v, mask = (given.get(name) for name in _INTERFACE[1:])
    output = result[0] if isinstance(result, tuple) and result else result
    if not (isinstance(q, Tensor) and isinstance(k, Tensor) and isinstance(v, Tensor) and q.dim() == k.dim() == v.dim() == 4):
        raise _unknown(kernel, "was not called with query, key and value of four dimensions")
    samples, heads, queries, _ = q.shape
    if not isinstance(output, Tensor) or tuple(output.shape) != (samples, queries, heads, v.shape[3]):
        raise _unknown(kernel, "did not return (batch, queries, heads, width) first")
    if given.get("dropout"):
        raise _unknown(kernel, f"was called with dropout {given['dropout']:g}, under which its output cannot be checked")
    if v.shape[0] != samples or v.shape[1] == 0 or heads % v.shape[1] or v.shape[2] != k.shape[2]:
        raise _unknown(kernel, f"was called with q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}, which do not fit")
    return CheckedRows(FromScores(_supposed(kernel, given, q, k, mask)), OutputCheck(v.detach(), output.detach()))


def _supposed(kernel: Kernel, given: dict[str, Any], q: Tensor, k: Tensor, mask: Any) -> Scores:
    """Return the scores that a kernel of the interface's documented convention has."""
    is_causal, cu_q, cu_k = (given.get(name) for name in ("is_causal", "cu_seq_lens_q", "cu_seq_lens_k"))
    plain = mask is None or (isinstance(mask, Tensor) and mask.dim() == 2)
    like_flash = FlashCall(
        q.transpose(1, 2),
        k.transpose(1, 2),
        mask_BM=mask if plain else None,
        cu_seq_lens=(cu_q, cu_k) if plain and cu_q is not None and cu_k is not None else None,
        position_ids=looked_at(given.get("position_ids"), q.shape[0]) if plain else None,
        if_decreasing=True,
        causal=plain and bool(getattr(given.get("module"), "is_causal", False) if is_causal is None else is_causal),
        scale=given.get("scaling"),
        softcap=given.get("softcap") or None,
        window=window_of(given.get("sliding_window")) if plain else None,
        sinks_H=given.get("s_aux"),
    )
    scores = replace(from_flash(like_flash).scores, bias=_detached(given.get("position_bias")))
    if plain:
        return scores
    if isinstance(mask, Tensor) and mask.dim() == 4:
        return replace(scores, mask=mask.detach())
    if hasattr(mask, "mask_mod"):
        return replace(scores, may=_mask_function(mask))
    raise _unknown(kernel, f"was given a mask that is neither 2-D nor 4-D nor a block mask: {type(mask).__name__}")


def _padded(scores: Scores, mask_BM: Tensor, call: FlashCall) -> Scores:
    """Hide padding keys, and every key from queries that are padding: flash attention computes neither.

    Keys beyond the mask (of a static cache) do not exist. The mask's last places are the queries'. Windows count unpadded places.
    """
    queries, keys = scores.q_BHSD.shape[2], mask_BM.shape[1]
    kept_BK = mask_BM.detach().bool()
    if queries > 1 and keys < queries:
        raise NotObservable(f"the padding mask has {keys} places for {queries} queries")
    kept_BS = torch.ones_like(kept_BK[:, :1]) if queries == 1 else kept_BK[:, keys - queries :]
    place_BK = kept_BK.cumsum(1)
    place_BS = place_BK[:, keys - queries :]
    by_place = call.window is not None
    if call.top_left and queries != keys:
        by_place, place_BS = True, kept_BS.cumsum(1)
    return replace(
        scores,
        k_BhKD=scores.k_BhKD[:, :, :keys],
        causal_offset=None if by_place or scores.causal_offset is None else keys - queries,
        window=None,
        padding_BK=kept_BK,
        segment_BS=kept_BS.long() - 1,
        segment_BK=torch.zeros_like(kept_BK, dtype=torch.long),
        may=_within(place_BS, place_BK, call.causal, call.window) if by_place else None,
    )


def _packed_by_lengths(scores: Scores, cu_q: Tensor, cu_k: Tensor) -> Scores:
    """Let queries see keys of their own sequence only; causality and window are aligned at the sequence's last query and key."""
    if scores.q_BHSD.shape[0] != 1:
        raise NotObservable(f"cu_seq_lens with a batch of {scores.q_BHSD.shape[0]}: a sequence may go over several rows")

    def of(cu: Tensor, length: int) -> tuple[Tensor, Tensor]:
        """Return each position's sequence, and its place counted back from the sequence's last (0, -1, …), both (1, length)."""
        position = torch.arange(length, device=cu.device, dtype=cu.dtype)
        sequence = torch.searchsorted(cu[1:].contiguous(), position, right=True)
        return sequence[None], (position + 1 - cu[(sequence + 1).clamp(max=cu.shape[0] - 1)])[None]

    segment_BS, place_BS = of(cu_q.detach(), scores.q_BHSD.shape[2])
    segment_BS = segment_BS.masked_fill(segment_BS == cu_q.shape[0] - 1, -1)  # beyond the last sequence nothing is computed
    segment_BK, place_BK = of(cu_k.detach(), scores.k_BhKD.shape[2])
    causal = scores.causal_offset is not None
    by_place = causal or scores.window is not None
    may = _within(place_BS, place_BK, causal, scores.window) if by_place else None
    return replace(scores, causal_offset=None, window=None, segment_BS=segment_BS, segment_BK=segment_BK, may=may)


def _packed_by_positions(scores: Scores, position_ids: Tensor, if_decreasing: bool) -> Scores:
    """Let queries see keys of their own sequence only. With one sequence a row all have the same number, so nothing depends on values."""
    samples, _, queries, _ = scores.q_BHSD.shape
    if position_ids.numel() not in (queries, samples * queries):
        raise NotObservable(f"position_ids of shape {tuple(position_ids.shape)} for {samples} samples of {queries} tokens")
    position_BS = position_ids.detach().reshape(-1, queries).expand(samples, queries)
    segment_BS = (position_BS == position_BS.min()).cumsum(1)
    if if_decreasing:
        segment_BS = segment_BS * (position_BS.diff(dim=1) < 0).any()
    return replace(scores, segment_BS=segment_BS, segment_BK=segment_BS)


def _within(place_BS: Tensor, place_BK: Tensor, causal: bool, window: tuple[int, int] | None) -> MaskFunction:
    """Return the mask of causality and window by the places that queries and keys have in their own sequences."""
    before, after = window or (-1, -1)

    def may(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        ahead = place_BK[b, k] - place_BS[b, q]
        seen = ahead <= 0 if causal else torch.ones_like(ahead, dtype=torch.bool)
        seen = seen & (ahead >= -before) if before >= 0 else seen
        return seen & (ahead <= after) if after >= 0 else seen

    return may


def _mask_function(block_mask: Any) -> MaskFunction:
    function: MaskFunction | None = getattr(block_mask, "mask_mod", None)
    if function is None or getattr(function, "__name__", "") == "noop_mask":
        raise NotObservable(f"a mask of type {type(block_mask).__name__} without a function that tells what it hides")
    return function


def _detached(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.detach()


def _unknown(kernel: Kernel, what: str) -> NotObservable:
    return NotObservable(f"the kernel {kernel.name!r} is not known, and {what}")
