"""Everything about a call's sampled rows that does not depend on q and k: worked out once for all layers whose rows see the same keys.

Shapes: B batch, S tokens (queries), K keys, R sampled rows a sample, M groups of keys, Q quantities.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from probe.measure.blocks import RowSource, chunk_bytes
from probe.measure.masks import RowMasks
from probe.measure.places import OwnKeys, Shares, places
from probe.measure.quantities import MASSES, SHAPE
from probe.measure.rows import RowChoice
from probe.measure.sight import COLUMNS, Sight, check_call, look

_KEPT_SHARE = 4  # of a block: what masks and places may take


@dataclass(frozen=True, slots=True)
class Weights:
    """How much rows count for each of ``SHAPE`` and ``MASSES``.

    Attributes:
        factor_BRQ: float64: what a row's value is multiplied by; that of the relative entropy holds the division by the largest.
        counts_BRQ: bool: where the weight is not 0 (elsewhere a value may be anything, also not finite).
        sum_Q: float64 sums of the weights.
        sampled: float64, 0-dim: number of rows looked at.
    """

    factor_BRQ: Tensor
    counts_BRQ: Tensor
    sum_Q: Tensor
    sampled: Tensor


@dataclass(frozen=True, slots=True)
class Prepared:
    """What :func:`probe.measure.attention.describe` needs beside a call. Holds a few numbers a row, and up to a quarter of a block.

    Attributes:
        choice: The rows. One that counts for nothing reads a row of its sample that counts: it may hold anything.
        masks: What hides keys from them, where that is the same for all heads.
        sight: What they see.
        where: Where rows and keys lie.
        weights: How much they count.
        text_BR: float64: weights of the text rows that see audio.
        groups_BKM: Groups of keys, where that is small enough to be kept.
    """

    choice: RowChoice
    masks: RowMasks | None
    sight: Sight
    where: OwnKeys | Shares
    weights: Weights
    text_BR: Tensor
    groups_BKM: Tensor | None

    def groups(self, b: slice) -> Tensor:
        """Return the groups of some samples' keys, (b, K, M), in the dtype that probabilities are multiplied in."""
        if self.groups_BKM is None:
            return self.sight.columns(b, multiplied_in(self.text_BR.device))
        return self.groups_BKM[b]


def prepare(
    source: RowSource,
    choice: RowChoice,
    *,
    query_modality_BS: Tensor | None,
    key_modality_BK: Tensor | None,
    self_attention: bool = True,
    walks: bool = True,
) -> Prepared:
    """Work out what does not depend on q and k. No sync.

    Args:
        source: The call.
        choice: Rows to look at.
        query_modality_BS: Codes of :mod:`probe.sites.modality`, or ``None``.
        key_modality_BK: The same of the keys.
        self_attention: Whether queries and keys are the same sequence; decides what is diagonal, and whether there is a distance.
        walks: Whether to look for ``WALKS``, where both modalities are known.

    Raises:
        NotObservable: choice and modalities are not of this call, by their shapes, or the source cannot give its rows.
    """
    query_BS, key_BK = query_modality_BS, key_modality_BK
    check_call(source.shape, choice, query_BS, key_BK)
    walks = walks and query_BS is not None and key_BK is not None
    samples, _, _, keys = source.shape
    with torch.no_grad():
        masks = source.masks(choice.index_BR)

        def visible_of(r: slice) -> Tensor:
            if masks is None:
                return source.visible(choice.index_BR[:, r])
            index_Br = choice.index_BR[:, r]
            every = torch.ones((), dtype=torch.bool, device=index_Br.device) if masks.visible is None else masks.visible[:, 0, r]
            return every.expand(*index_Br.shape, keys)

        sight = look(visible_of, choice, keys, query_BS, key_BK, walks=walks)
        weights = weigh(sight, sinks=source.sinks, distances=self_attention)
        keep_bytes = chunk_bytes(source.shape) // _KEPT_SHARE
        where = places(choice, keys, query_BS, key_BK, self_attention=self_attention, keep_bytes=keep_bytes)
        dtype = multiplied_in(source.device)
        kept = samples * keys * COLUMNS * dtype.itemsize <= keep_bytes
        groups_BKM = sight.columns(slice(0, samples), dtype) if kept else None
        text_BR = weights.factor_BRQ[..., len(SHAPE) + MASSES.index("text_to_audio")]
        return Prepared(_counted(choice, sight), masks, sight, where, weights, text_BR, groups_BKM)


def multiplied_in(device: torch.device) -> torch.dtype:
    """Return the dtype in which probabilities are multiplied by groups of keys: float64 where a float32 product may be one of TF32."""
    return torch.float64 if device.type == "cuda" else torch.float32


def weigh(sight: Sight, *, sinks: int, distances: bool) -> Weights:
    """Return how much rows count. A sink is one more outcome, for which the largest possible entropy is larger, too."""
    weight_BRQ = sight.row_weights(sinks=bool(sinks), distances=distances)
    factor_BRQ = weight_BRQ.clone()
    factor_BRQ[..., SHAPE.index("entropy")] /= (sight.visible_BR + bool(sinks)).clamp(min=2).log()
    return Weights(factor_BRQ, weight_BRQ > 0, weight_BRQ.sum((0, 1)), (sight.weight_BR > 0).sum(dtype=torch.float64))


def _counted(choice: RowChoice, sight: Sight) -> RowChoice:
    """Let slots that count for nothing read a row of their sample that counts, if there is one."""
    counts_BR = sight.weight_BR > 0
    instead_B1 = choice.index_BR.gather(1, counts_BR.to(torch.int8).argmax(1, keepdim=True))
    return RowChoice(torch.where(counts_BR, choice.index_BR, instead_B1), choice.weight_BR, choice.queries)
