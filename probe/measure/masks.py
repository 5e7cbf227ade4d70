"""Which keys sampled rows of an attention call may see, and what is added to their scores: masks of every kind, for one block of rows.

Shapes: B batch, S tokens (queries), K keys, H heads, R sampled rows a sample; b, h, r: those of one block; m is 1 or h.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from probe.foreign.torch_private import identity
from probe.measure import blocks
from probe.measure.blocks import NotObservable
from probe.measure.scores import MaskFunction, Scores

_MASKED_SCORE = -1e8
#: Added to the score of a hidden key: far below any score, far above what float32 would turn into -inf.
HIDDEN = -1e30
_SHARED_BYTES = 16  # of one (row, key) pair, while it is worked out


@dataclass(frozen=True, slots=True)
class RowMasks:
    """What hides keys from some rows, of one head or the same for all; bias that differs between layers is not in it.

    Attributes:
        added: float32 (b, m, r, K), added to the scores: what the mask adds, ``HIDDEN`` for a hidden key; ``None`` for nothing.
        blind: bool (b, m, r): rows that see no key; ``None`` if all see one.
        visible: bool (b, m, r, K): keys that the row may see; ``None`` for all.
    """

    added: Tensor | None = None
    blind: Tensor | None = None
    visible: Tensor | None = None

    def of(self, b: slice, r: slice) -> RowMasks:
        """Return those of some samples and rows, as views."""
        return RowMasks(*(part if part is None else part[b, :, r] for part in (self.added, self.blind, self.visible)))


@dataclass(frozen=True, slots=True, eq=False)
class View:
    """What decides which keys the queries of a call see, by identity: of the layers of a model it is the same as a rule.

    Attributes:
        tensors: Masks, by reference, so that no other tensor comes to lie in their memory.
        identities: What they were when the call was made; ``None`` of one that nothing tells from others.
        numbers: Sizes, causality, window, whether there is a sink.
        may: The mask function.
    """

    tensors: tuple[Tensor, ...]
    identities: tuple[tuple[object, ...] | None, ...]
    numbers: tuple[object, ...]
    may: MaskFunction | None

    def same(self, other: View) -> bool:
        """Tell whether both see the same keys, without looking at a value; ``False`` where that cannot be told."""
        told = None not in self.identities and self.identities == other.identities
        return told and self.may is other.may and self.numbers == other.numbers


def view_of(scores: Scores) -> View:
    """Return what decides which keys are seen in a call."""
    samples, heads, queries, keys = scores.shape
    given = (scores.mask, scores.padding_BK, scores.segment_BS, scores.segment_BK)
    tensors = tuple(tensor for tensor in given if tensor is not None)
    kinds = tuple(tensor is None for tensor in given)
    sinks = scores.sinks_H is not None
    numbers = (
        samples,
        heads,
        queries,
        keys,
        kinds,
        sinks,
        scores.causal_offset,
        scores.window,
        scores.autocast_dtype,
        scores.q_BHSD.device,
    )
    return View(tensors, tuple(map(identity, tensors)), numbers, scores.may)


def allowed(mask: Tensor) -> Tensor:
    """Return where a mask lets a query attend: a bool mask as it is, an added one where it is above half of the dtype's minimum.

    -1e8 and below hides too: -1e9 is added as often as the minimum is, and no bias of a real model goes near. NaN hides nothing, so that
    it shows in the probabilities.
    """
    if mask.dtype == torch.bool:
        return mask
    return ~(mask <= max(torch.finfo(mask.dtype).min / 2, _MASKED_SCORE))


def check_masks(scores: Scores) -> None:
    """Check everything that hides or is added against the shape of the call.

    Raises:
        NotObservable: a mask is an object of its own kind, has a dtype that is neither bool nor floating point, or does not fit.
    """
    shape = scores.shape
    samples, heads, queries, keys = shape
    for what, mask in (("mask", scores.mask), ("bias", scores.bias)):
        if mask is None:
            continue
        if type(mask) not in (Tensor, nn.Parameter):
            raise NotObservable(f"the {what} is a {type(mask).__name__}, not a plain tensor")
        if not mask.is_floating_point() and (mask.dtype != torch.bool or what == "bias"):
            raise NotObservable(f"the {what} has dtype {mask.dtype}: expected {'bool or ' if what == 'mask' else ''}floating point")
        sizes = (1,) * (4 - mask.dim()) + tuple(mask.shape)
        fits = len(sizes) == 4 and all(size in (1, full) for size, full in zip(sizes[:3], shape)) and (sizes[3] == 1 or sizes[3] >= keys)
        if not fits:
            raise NotObservable(f"the {what} of shape {tuple(mask.shape)} does not fit (batch, heads, queries, keys) = {shape}")
    vectors = (
        ("padding", scores.padding_BK, (samples, keys)),
        ("segments of the queries", scores.segment_BS, (samples, queries)),
        ("segments of the keys", scores.segment_BK, (samples, keys)),
        ("sinks", scores.sinks_H, (heads,)),
    )
    for what, vector, expected in vectors:
        if vector is not None and tuple(vector.shape) != expected:
            raise NotObservable(f"{what} of shape {tuple(vector.shape)}, expected {expected}")
    if (scores.segment_BS is None) != (scores.segment_BK is None):
        raise NotObservable("packed sequences are known for queries or keys only")


def differs_by_head(scores: Scores) -> bool:
    """Tell whether heads may see different keys, as far as that is known without evaluating a mask function."""
    mask = scores.mask
    return scores.may is not None or (mask is not None and mask.dim() >= 3 and mask.shape[-3] > 1 and mask.stride(-3) != 0)


def shared_masks(scores: Scores, index_BR: Tensor) -> RowMasks | None:
    """Return the masks of all rows if they are the same for every head and small; else ``None``.

    Raises:
        NotObservable: the mask function cannot be evaluated.
    """
    samples, heads, _, keys = scores.shape
    if differs_by_head(scores) or index_BR.numel() * keys * _SHARED_BYTES > blocks.chunk_bytes(scores.shape):
        return None
    return row_masks(scores, index_BR, slice(0, samples), slice(0, heads))


def row_masks(scores: Scores, index_br: Tensor, b: slice, h: slice) -> RowMasks:
    """Return what hides keys from the rows of one block; parts are as small as what was given allows, and broadcast.

    Args:
        scores: The call.
        index_br: The rows of these samples, already sliced.
        b: Samples of the block.
        h: Heads of the block.

    Raises:
        NotObservable: the mask function cannot be evaluated.
    """
    mask, may = _mask_rows(scores, index_br, b, h)
    if may is None:
        return RowMasks()
    added = (may.to(torch.float32) - 1.0).mul_(-HIDDEN)
    if mask is not None:
        added = added + mask
    samples, rows = index_br.shape
    added, may = (part.expand(samples, -1, rows, scores.shape[3]) for part in (added.clamp_(min=HIDDEN), may))
    return RowMasks(added, ~may.any(-1), may)


def bias_rows(scores: Scores, index_br: Tensor, b: slice, h: slice) -> Tensor | None:
    """Return the bias of the rows of one block, which broadcasts to (b, h, r, K)."""
    return None if scores.bias is None else _rows_of(scores.bias, scores, index_br, b, h)


def visible_rows(scores: Scores, index_br: Tensor, b: slice, h: slice) -> Tensor:
    """Return bool (b, r, K): keys that at least one of these heads of the row may see.

    Raises:
        NotObservable: the mask function cannot be evaluated.
    """
    _, may = _mask_rows(scores, index_br, b, h)
    shape = (*index_br.shape, scores.shape[3])
    if may is None:
        return torch.ones((), dtype=torch.bool, device=index_br.device).expand(shape)
    return (may.any(1) if may.shape[1] > 1 else may[:, 0]).expand(shape)


def _mask_rows(scores: Scores, index_br: Tensor, b: slice, h: slice) -> tuple[Tensor | None, Tensor | None]:
    """Return what the mask adds to the scores of the rows, and where they may attend, or ``None`` for nothing.

    Both broadcast to (b, h, r, K).
    """
    queries, keys = scores.shape[2:]
    key_K = torch.arange(keys, device=index_br.device)
    row_b1r1 = index_br[:, None, :, None]
    may: list[Tensor] = []
    if scores.causal_offset is not None:
        may.append(key_K <= row_b1r1 + scores.causal_offset)
    if scores.window is not None:
        before, after = scores.window
        ahead_b1rK = key_K - (row_b1r1 + (keys - queries))
        may += [ahead_b1rK >= -before] if before >= 0 else []
        may += [ahead_b1rK <= after] if after >= 0 else []
    if scores.padding_BK is not None:
        may.append(scores.padding_BK.detach()[b, None, None, :].bool())
    if scores.segment_BS is not None and scores.segment_BK is not None:
        may.append(scores.segment_BS[b].gather(1, index_br)[:, None, :, None] == scores.segment_BK[b, None, None, :])
    if scores.may is not None:
        may.append(_evaluate(scores, row_b1r1, key_K, b, h))
    added = None
    if scores.mask is not None:
        mask = _rows_of(scores.mask, scores, index_br, b, h)
        may.append(allowed(mask))
        if mask.dtype != torch.bool:
            added = mask if scores.autocast_dtype is None else mask.to(scores.autocast_dtype)
    together = None
    for one in may:
        together = one if together is None else together & one
    return added, together


def _rows_of(mask: Tensor, scores: Scores, index_br: Tensor, b: slice, h: slice) -> Tensor:
    """Return the rows of a mask, (b or 1, m, r or 1, K or 1)."""
    queries, keys = scores.shape[2:]
    mask = mask.detach()
    mask = mask.expand((1,) * (4 - mask.dim()) + mask.shape)
    if mask.stride(1) == 0:  # the same mask for every head, expanded by the model
        mask = mask[:, :1]
    mask = mask[b if mask.shape[0] > 1 else slice(None), h if mask.shape[1] > 1 else slice(None), :, :keys]
    if mask.shape[2] == queries:
        heads, width = mask.shape[1], mask.shape[3]
        mask = mask.expand(index_br.shape[0], -1, -1, -1).gather(2, index_br[:, None, :, None].expand(-1, heads, -1, width))
    return mask


def _evaluate(scores: Scores, row_b1r1: Tensor, key_K: Tensor, b: slice, h: slice) -> Tensor:
    """Call the mask function on indices that broadcast; whatever goes wrong in it is the model's, not a fault of the probe."""
    assert scores.may is not None
    sample_b111 = torch.arange(b.start, b.stop, device=key_K.device)[:, None, None, None]
    head_1h11 = torch.arange(h.start, h.stop, device=key_K.device)[None, :, None, None]
    full = (row_b1r1.shape[0], head_1h11.shape[1], row_b1r1.shape[2], key_K.shape[0])
    try:
        may = scores.may(sample_b111, head_1h11, row_b1r1, key_K[None, None, None, :])
        if may.dtype != torch.bool:
            raise NotObservable(f"the mask function returns {may.dtype}: expected bool")
        may = may.expand((1,) * (4 - may.dim()) + may.shape)
        may.expand(full)
    except NotObservable:
        raise
    except Exception as error:
        raise NotObservable(f"the mask function cannot be evaluated on indices: {type(error).__name__}: {error}") from error
    return may
