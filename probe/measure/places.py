"""Where rows and keys of an attention call lie on a common scale, and what of a row's probability lies near it.

Shapes: B batch, K keys, H heads, R sampled rows a sample, N keys of a band; b, h, r: those of one block.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from probe.measure.rows import RowChoice
from probe.measure.sight import some
from probe.sites.modality import PADDING

#: Half the width of the diagonal band: in keys for self-attention, in shares of both lengths for cross-attention.
BAND_KEYS, BAND_SHARE = 4, 0.1
#: Shares of keys are float32.
ROUNDING = 1e-6
_PAIR_BYTES = 16  # of one (row, key) pair while differences are taken


@dataclass(frozen=True, slots=True)
class OwnKeys:
    """Self-attention: row i lies at key i + K - S, and what is near is counted in keys.

    Attributes:
        row_BR: float32 key of each row.
        key_K: float32 number of each key.
        band_BRN: int64 keys of the band, each row's own in the middle, none beyond the call.
        inside_BRN: bool: whether there is such a key.
        away_BRK: float32 distance of each pair, where that is small enough to be kept.
    """

    row_BR: Tensor
    key_K: Tensor
    band_BRN: Tensor
    inside_BRN: Tensor
    away_BRK: Tensor | None = None

    def near(self, b: slice, r: slice, p_bhrK: Tensor, spare: Tensor) -> tuple[Tensor, Tensor]:
        """Return the mass in the band and the mean distance in keys, both (b, h, r); ``spare`` is overwritten."""
        band_bhrN = self.band_BRN[b, None, r].expand(-1, p_bhrK.shape[1], -1, -1)
        band_bhr = (p_bhrK.gather(-1, band_bhrN) * self.inside_BRN[b, None, r]).sum(-1)
        away_brK = _apart(self.key_K, self.row_BR[b, r]) if self.away_BRK is None else self.away_BRK[b, r]
        return band_bhr, torch.mul(p_bhrK, away_brK[:, None], out=spare).sum(-1)


@dataclass(frozen=True, slots=True)
class Shares:
    """Cross-attention: the n-th (from 0) of N tokens or frames that are not padding lies at (n + ½) / N.

    Attributes:
        row_BR: float32.
        key_BK: float32, (1, K) where it is the same for all samples; infinite for a key that lies nowhere (padding).
        near_BRK: float32: 1 where the pair lies in the band, where that is small enough to be kept.
    """

    row_BR: Tensor
    key_BK: Tensor
    near_BRK: Tensor | None = None

    def near(self, b: slice, r: slice, p_bhrK: Tensor, spare: Tensor) -> tuple[Tensor, Tensor]:
        """Return the mass in the band (b, h, r), twice: there is no distance. ``spare`` is overwritten."""
        near_brK = self.pairs(b, r) if self.near_BRK is None else self.near_BRK[b, r]
        band_bhr = torch.mul(p_bhrK, near_brK[:, None], out=spare).sum(-1)
        return band_bhr, band_bhr

    def pairs(self, b: slice, r: slice) -> Tensor:
        """Return 1 where a pair lies in the band, float32 (b, r, K)."""
        key_bK = self.key_BK[b] if self.key_BK.shape[0] > 1 else self.key_BK
        return (_apart(key_bK, self.row_BR[b, r]) <= BAND_SHARE + ROUNDING).float()


def places(
    choice: RowChoice, keys: int, query_BS: Tensor | None, key_BK: Tensor | None, *, self_attention: bool, keep_bytes: int
) -> OwnKeys | Shares:
    """Return where rows and keys lie; in cross-attention all count where padding is not known. No sync.

    Args:
        choice: The rows.
        keys: K.
        query_BS: Codes of the queries, or ``None``.
        key_BK: Codes of the keys, or ``None``.
        self_attention: Whether queries and keys are the same sequence.
        keep_bytes: What the pairs may take to be worked out once.
    """
    device, all_of = choice.index_BR.device, slice(None)
    keep = choice.index_BR.numel() * keys * _PAIR_BYTES <= keep_bytes
    if self_attention:
        own_BR = choice.index_BR + (keys - choice.queries)
        band_BRN = own_BR[..., None] + torch.arange(-BAND_KEYS, BAND_KEYS + 1, device=device)
        inside_BRN = (band_BRN >= 0) & (band_BRN < keys)
        row_BR, key_K = own_BR.float(), torch.arange(keys, device=device).float()
        return OwnKeys(row_BR, key_K, band_BRN.clamp(0, keys - 1), inside_BRN, _apart(key_K, row_BR) if keep else None)
    row_BR = _shares(query_BS, choice.queries, device).expand(choice.index_BR.shape[0], -1).gather(1, choice.index_BR)
    found = Shares(row_BR, _shares(key_BK, keys, device))
    return Shares(found.row_BR, found.key_BK, found.pairs(all_of, all_of)) if keep else found


def _apart(key: Tensor, row_br: Tensor) -> Tensor:
    """Return how far keys (K,) or (b, K) are from the rows, (b, r, K)."""
    return (key[..., None, :] - row_br[..., None]).abs_()


def _shares(codes: Tensor | None, length: int, device: torch.device) -> Tensor:
    """Return where each token lies between a sample's first (0) and last (1) that is not padding, float32; padding at infinity."""
    real = torch.ones((1, length), dtype=torch.bool, device=device) if codes is None else codes != PADDING
    shares: list[Tensor] = []
    for b in some(real.shape[0], length * 32):
        rank = real[b].cumsum(1).double()
        shares.append(((rank - 0.5) / rank[:, -1:]).float().masked_fill_(~real[b], float("inf")))
    return shares[0] if len(shares) == 1 else torch.cat(shares)
