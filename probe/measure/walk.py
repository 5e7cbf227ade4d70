"""How text rows walk over audio keys: whether later rows look at later audio, and how much of the audio is looked at at all.

Shapes: B batch, K keys, H heads, R sampled rows a sample; b, h, r: those of one block.
"""

from __future__ import annotations

import torch
from torch import Tensor

from probe.measure import blocks
from probe.measure.blocks import RowBlock
from probe.measure.sight import some

_TOGETHER_BYTES = 128  # of one key of one sample and head: 16 of it while entropies are taken, of an eighth of a chunk
_COVERED_BYTES = 24  # of one probability while entropies are taken
_TIE_KEYS = 1e-3  # centres of attention nearer than this are told apart by rounding only


class Coverage:
    """Adds up the distribution of a sample's text rows over its audio keys, block by block.

    Holds one float32 distribution for each sample and head, of all of them where that is small, else of the blocks in work.
    """

    def __init__(self, weight_BR: Tensor, audio_BK: Tensor, heads: int) -> None:
        """Take the weights of the text rows (0 for others) and the audio keys that they see."""
        samples, keys = audio_BK.shape
        self._weight_BR = weight_BR.float()
        self._audio_BK = audio_BK
        self._at: tuple[slice, slice] | None = None
        self._together = samples * heads * keys <= blocks.CHUNK_BYTES // _TOGETHER_BYTES
        shape = (samples, heads, keys) if self._together else (0, 0, 0)
        self._sum_bhK = self._weight_BR.new_zeros(shape)
        self._coverage_BH = weight_BR.new_zeros((samples, heads) if not self._together else (0, 0))

    def add(self, block: RowBlock, p_bhrK: Tensor) -> None:
        """Add a block, whose probabilities are overwritten."""
        at = (block.samples, block.heads)
        if not self._together and self._at != at:
            self._close()
            self._at, self._sum_bhK = at, torch.zeros_like(p_bhrK[:, :, 0])
        sum_bhK = p_bhrK.mul_(self._weight_BR[block.samples, None, block.rows, None]).sum(2)
        target_bhK = self._sum_bhK[at] if self._together else self._sum_bhK
        target_bhK += sum_bhK

    def held(self) -> Tensor:
        """Return the distributions, float32 (B, H, K), or, where they were not held together, their coverage, float64 (B, H)."""
        self._close()
        return self._sum_bhK if self._together else self._coverage_BH

    def _close(self) -> None:
        if self._at is not None:
            b, h = self._at
            self._coverage_BH[b, h] = covered(self._sum_bhK, self._audio_BK[b])
            self._at = None


def covered(sum_BHK: Tensor, audio_BK: Tensor) -> Tensor:
    """Return float64 (B, H): exp(entropy of the mean distribution over audio keys) ÷ how many of them are visible; 0 … 1.

    0 where nothing of the probability is on audio. Some samples at once, so that temporaries stay within ``CHUNK_BYTES``, unless those of
    one sample do not.

    Args:
        sum_BHK: Weighted sums of the rows' probabilities; H may be heads of several calls.
        audio_BK: bool: the audio keys that are visible.
    """
    samples, heads, keys = sum_BHK.shape
    parts: list[Tensor] = []
    for b in some(samples, heads * keys * _COVERED_BYTES):
        sum_bhK = sum_BHK[b].double() * audio_BK[b, None]
        total_bh = sum_bhK.sum(-1)
        entropy_bh = torch.special.entr(sum_bhK).sum(-1) / total_bh + total_bh.log()
        visible_b1 = audio_BK[b].sum(-1, keepdim=True)
        parts.append(torch.where(total_bh == 0, 0.0, entropy_bh.exp() / visible_b1))
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def monotonicity(index_BR: Tensor, counts_BR: Tensor, mass_BRH: Tensor, place_BRH: Tensor) -> tuple[Tensor, Tensor]:
    """Return Kendall's tau between the number of a row and its centre of attention, over pairs of rows of a sample.

    Tau-a: pairs in the same order less pairs in the opposite order, by all pairs. Centres nearer than a thousandth of a key tie, and so
    does a row without any mass. Pairs are compared some rows at a time, with temporaries within ``CHUNK_BYTES``.

    Args:
        index_BR: Row numbers, all different where ``counts_BR``.
        counts_BR: bool: rows that are compared.
        mass_BRH: float64 mass of a row on the keys.
        place_BRH: float64 sum of key number times probability.

    Returns:
        Tau, float64 (B, H), -1 … 1; the number of pairs (each counted twice), float64 (B, 1). Without a pair, tau is 0.

    Source: Kendall (1938), A new measure of rank correlation, Biometrika 30.
    """
    samples, rows, heads = mass_BRH.shape
    nowhere_BRH = mass_BRH == 0
    centre_BRH = place_BRH / torch.where(nowhere_BRH, 1.0, mass_BRH)
    # 1 for rows that are compared; 0 * NaN stays NaN, which has no sign and is to show.
    there_BRH = (counts_BR[..., None] & ~nowhere_BRH).to(centre_BRH.dtype)
    order_BH = (torch.where(counts_BR[..., None], centre_BRH, 0.0) * 0.0).sum(1)
    step = max(1, blocks.CHUNK_BYTES // max(1, samples * rows * heads * 32))
    for r in (slice(start, start + step) for start in range(0, rows, step)):
        ahead_BrRH = centre_BRH[:, r, None] - centre_BRH[:, None]
        ahead_BrRH.div_(_TIE_KEYS).trunc_().sign_().mul_(there_BRH[:, r, None]).mul_(there_BRH[:, None])
        later_BrR = (index_BR[:, r, None] - index_BR[:, None]).sign()
        order_BH = order_BH + (ahead_BrRH.mul_(later_BrR[..., None])).sum((1, 2))
    number_B1 = counts_BR.sum(1, keepdim=True).double()
    pairs_B1 = number_B1 * (number_B1 - 1)
    return order_BH / pairs_B1.clamp(min=1), pairs_B1
