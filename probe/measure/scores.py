"""What one attention call makes its scores of, whatever kernel runs it: q, k, scale, softcap, masks, window, segments, sinks.

Shapes: B batch, S tokens (queries), K keys, H query heads, h key heads, D width, R sampled rows a sample.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

#: ``may(b, h, q, k)`` of flex attention: index tensors that broadcast to (B, H, R, K) -> bool of that shape, True: attend.
MaskFunction = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True, slots=True)
class Scores:
    """The arguments of one attention call, detached and by reference: use them at once, keep none.

    The score of query i and key j is ``q_i · k_j * scale``, then ``softcap * tanh(score / softcap)``, then what ``mask`` and ``bias``
    add; j is hidden from i by ``mask``, by causality, by ``window``, by ``padding_BK``, where the segments differ, or by ``may``.

    Attributes:
        q_BHSD: Queries.
        k_BhKD: Keys; h divides H (each key head serves H / h query heads, side by side).
        scale: ``None`` for D ** -0.5.
        softcap: ``None`` for none.
        mask: bool (True: attend) or added; broadcasts to (B, H, S, K); a last dimension beyond K is cut off.
        bias: Added to the scores, broadcasts to (B, H, S, K); hides nothing.
        causal_offset: ``None`` for no causality; else i sees the keys j <= i + causal_offset (0: aligned at the top left; K - S: at the
            bottom right).
        window: ``None``, or how many keys before and after the query's own place (i + K - S) are seen, inclusive.
        padding_BK: bool, True for keys that exist; ``None`` if all do.
        segment_BS, segment_BK: Integer numbers of packed sequences; a query sees keys of its own only. ``None`` without packing.
        may: A function of indices that tells what may be attended to (flex attention's ``mask_mod``).
        sinks_H: A learned logit a head that joins the softmax without being a key.
        autocast_dtype: The dtype to which autocast rounds q, k and mask on their way into the kernel; ``None`` without.
        how: Where the probabilities come from, as the record says it.
    """

    q_BHSD: Tensor
    k_BhKD: Tensor
    scale: float | None = None
    softcap: float | None = None
    mask: Tensor | None = None
    bias: Tensor | None = None
    causal_offset: int | None = None
    window: tuple[int, int] | None = None
    padding_BK: Tensor | None = None
    segment_BS: Tensor | None = None
    segment_BK: Tensor | None = None
    may: MaskFunction | None = None
    sinks_H: Tensor | None = None
    autocast_dtype: torch.dtype | None = None
    how: str = "recomputed from q and k"

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(B, H, S, K) of the attention matrix."""
        samples, heads, queries, _ = self.q_BHSD.shape
        return samples, heads, queries, self.k_BhKD.shape[2]
