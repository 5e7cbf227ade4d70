"""What sampled attention rows say: entropy and the mass between text and audio, as sums that add up over calls and ranks.

Shapes: B batch, S tokens (queries), K keys, H heads, R sampled rows a sample, M key groups (padding, text, audio, first key, all).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from probe.measure.probabilities import CHUNK_BYTES, NotObservable, RowProbabilities
from probe.measure.rows import RowChoice
from probe.sites.modality import AUDIO, PADDING, TEXT

#: Columns of ``AttentionSums.sums``. A mean is a numerator divided by its denominator: ``entropy_nats`` and ``first_token`` by ``rows``,
#: ``entropy`` by ``relative_rows``, ``padding`` by ``padding_rows``, ``text_to_audio`` by ``text_rows_audio_visible`` and so on.
COLUMNS = (
    "sampled",
    "rows",
    "entropy_nats",
    "relative_rows",
    "entropy",
    "first_token",
    "padding_rows",
    "padding",
    "text_rows_text_visible",
    "text_to_text",
    "text_rows_audio_visible",
    "text_to_audio",
    "audio_rows_text_visible",
    "audio_to_text",
    "audio_rows_audio_visible",
    "audio_to_audio",
)
#: Rows of ``AttentionSums.per_head``: numerators whose denominators are those of the same columns of ``COLUMNS``.
HEAD_ROWS = ("entropy_nats", "first_token", "text_to_audio", "audio_to_text")

_PADDING, _TEXT, _AUDIO, _FIRST, _ALL = PADDING, TEXT, AUDIO, 3, 4  # columns of the key groups


@dataclass(frozen=True, slots=True)
class AttentionSums:
    """Weighted sums over the rows of one attention call, on the device.

    Attributes:
        sums: float64, one value for each of ``COLUMNS``; masses and entropies are means over heads.
        per_head: float64 (4, H), for ``HEAD_ROWS``.
        masses_per_head: Whether ``per_head`` holds the masses; if not, its rows after ``entropy_nats`` are 0 and mean nothing.
    """

    sums: Tensor
    per_head: Tensor
    masses_per_head: bool


@dataclass(frozen=True, slots=True)
class HeadMeanRows:
    """Rows whose masses wait for the modality of the tokens: mass is linear, so the mean over heads is enough.

    Attributes:
        p_BRK: float32 mean over heads of the probabilities.
        visible_BRK: bool.
        entropy_BHR: float64 entropy in nats of each head's row.
        choice: The rows; padding among them is taken out when the modality is known.
    """

    p_BRK: Tensor
    visible_BRK: Tensor
    entropy_BHR: Tensor
    choice: RowChoice

    @property
    def nbytes(self) -> int:
        """Bytes that this holds on the device (an upper bound: without a mask ``visible_BRK`` takes one byte)."""
        tensors = (self.p_BRK, self.visible_BRK, self.entropy_BHR, self.choice.index_BR, self.choice.weight_BR)
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def describe(
    rows: RowProbabilities, choice: RowChoice, *, query_modality_BS: Tensor | None, key_modality_BK: Tensor | None
) -> AttentionSums:
    """Sum up one attention call; padding among the queries counts for nothing, nor does a row that sees no key.

    Entropy is in nats, and relative to the logarithm of the number of visible keys over rows that see at least two. A mass from text
    (audio) rows on text (audio) keys is over rows that see at least one such key; without a modality its sums stay 0. The first token
    is the sample's first key that is not padding (without a modality, the earliest that a sampled row sees). Computed in float64 by
    chunks of heads with temporaries of about 8 MiB; no sync.

    Raises:
        NotObservable: rows, choice and modalities are not of the same call, by their shapes.
    """
    with torch.no_grad():
        _check(rows.p_BHRK.shape[0], rows.p_BHRK.shape[3], rows.queries, choice, query_modality_BS, key_modality_BK)
        groups_BKM = _key_groups(rows.visible_BRK, key_modality_BK)
        known = key_modality_BK is not None
        entropy_BHR, mass_BHRM = _entropy(rows.p_BHRK), _mass(rows.p_BHRK, groups_BKM)
        return _sum_up(entropy_BHR, mass_BHRM, rows.visible_BRK, groups_BKM, choice, query_modality_BS, known)


def describe_later(rows: RowProbabilities, choice: RowChoice) -> HeadMeanRows:
    """Keep what :func:`finish_later` needs once the modality is known: R * K floats a sample instead of H * R * K.

    Raises:
        NotObservable: rows and choice are not of the same call, by their shapes.
    """
    with torch.no_grad():
        _check(rows.p_BHRK.shape[0], rows.p_BHRK.shape[3], rows.queries, choice, None, None)
        return HeadMeanRows(p_BRK=rows.p_BHRK.mean(1), visible_BRK=rows.visible_BRK, entropy_BHR=_entropy(rows.p_BHRK), choice=choice)


def finish_later(held: HeadMeanRows, query_modality_BS: Tensor | None, key_modality_BK: Tensor | None) -> AttentionSums:
    """Return the sums that :func:`describe` would have given with these modalities; masses per head are not measured.

    Raises:
        NotObservable: the modalities are not those of the held call, by their shapes.
    """
    with torch.no_grad():
        _check(held.p_BRK.shape[0], held.p_BRK.shape[2], held.choice.queries, held.choice, query_modality_BS, key_modality_BK)
        groups_BKM = _key_groups(held.visible_BRK, key_modality_BK)
        mass_B1RM = (held.p_BRK.double() @ groups_BKM)[:, None]
        known = key_modality_BK is not None
        return _sum_up(held.entropy_BHR, mass_B1RM, held.visible_BRK, groups_BKM, held.choice, query_modality_BS, known)


def _check(
    samples: int, keys: int, queries: int, choice: RowChoice, query_modality_BS: Tensor | None, key_modality_BK: Tensor | None
) -> None:
    if choice.queries != queries or choice.index_BR.shape[0] != samples:
        raise NotObservable(f"rows chosen for ({choice.index_BR.shape[0]}, {choice.queries}) queries, the call has ({samples}, {queries})")
    for what, modality, length in (("queries", query_modality_BS, queries), ("keys", key_modality_BK, keys)):
        if modality is not None and modality.shape != (samples, length):
            raise NotObservable(f"the modality of {tuple(modality.shape)} tokens is known, the call has ({samples}, {length}) {what}")


def _key_groups(visible_BRK: Tensor, modality_BK: Tensor | None) -> Tensor:
    """Return float64 (B, K, M): 1 where a key is padding, text, audio, the sample's first, and any."""
    samples, _, keys = visible_BRK.shape
    device = visible_BRK.device
    real_BK = visible_BRK.any(1) if modality_BK is None else modality_BK != PADDING
    first_B1 = real_BK.to(torch.int8).argmax(1, keepdim=True)
    groups_BKM = torch.zeros((samples, keys, _ALL + 1), dtype=torch.float64, device=device)
    if modality_BK is not None:
        groups_BKM[..., : _AUDIO + 1] = modality_BK[..., None] == torch.arange(_AUDIO + 1, device=device)
    groups_BKM[..., _FIRST] = torch.arange(keys, device=device) == first_B1
    groups_BKM[..., _ALL] = 1.0
    return groups_BKM


def _entropy(p_BHRK: Tensor) -> Tensor:
    """Return the entropy of each row in nats, float64 (B, H, R)."""
    return torch.cat([torch.special.entr(p_bhRK).sum(-1) for p_bhRK in _parts(p_BHRK)], 1)


def _mass(p_BHRK: Tensor, groups_BKM: Tensor) -> Tensor:
    """Return the mass on each group of keys, float64 (B, H, R, M): neither autocast nor TF32 touches a float64 product."""
    samples, _, rows, _ = p_BHRK.shape
    return torch.cat([(p_bhRK.flatten(1, 2) @ groups_BKM).view(samples, -1, rows, _ALL + 1) for p_bhRK in _parts(p_BHRK)], 1)


def _parts(p_BHRK: Tensor) -> Iterator[Tensor]:
    """Yield the probabilities in float64, as many heads at once as leave room for a second tensor of the size."""
    samples, heads, rows, keys = p_BHRK.shape
    step = max(1, CHUNK_BYTES // max(1, samples * rows * keys * 16))
    return (p_BHRK[:, start : start + step].double() for start in range(0, heads, step))


def _sum_up(
    entropy_BHR: Tensor,
    mass_BhRM: Tensor,
    visible_BRK: Tensor,
    groups_BKM: Tensor,
    choice: RowChoice,
    query_modality_BS: Tensor | None,
    keys_known: bool,
) -> AttentionSums:
    """Weigh the rows and add them up. ``mass_BhRM`` holds every head (h = H), or their mean (h = 1)."""
    seen_BRM = visible_BRK.double() @ groups_BKM
    visible_BR = seen_BRM[..., _ALL]
    weight_BR = choice.weight_BR.double() * (visible_BR > 0)
    text_BR = audio_BR = torch.zeros_like(weight_BR)
    if query_modality_BS is not None:
        query_BR = query_modality_BS.gather(1, choice.index_BR)
        weight_BR *= query_BR != PADDING
        text_BR, audio_BR = (query_BR == TEXT).double(), (query_BR == AUDIO).double()
    sees_text_BR, sees_audio_BR = seen_BRM[..., _TEXT] > 0, seen_BRM[..., _AUDIO] > 0
    entropy_BR, mass_BRM = entropy_BHR.mean(1), mass_BhRM.mean(1)
    relative_BR = visible_BR >= 2
    one_BR = torch.ones_like(weight_BR)
    columns = [one_BR, entropy_BR, relative_BR, relative_BR * entropy_BR / visible_BR.clamp(min=2).log(), mass_BRM[..., _FIRST]]
    columns += [one_BR * keys_known, mass_BRM[..., _PADDING]]
    for rows_BR in (text_BR, audio_BR):
        for sees_BR, group in ((sees_text_BR, _TEXT), (sees_audio_BR, _AUDIO)):
            columns += [rows_BR * sees_BR, rows_BR * sees_BR * mass_BRM[..., group]]
    sums = _weighted(torch.stack([column.double() for column in columns], 0), weight_BR).sum((1, 2))
    sampled = (weight_BR > 0).sum(dtype=torch.float64)
    heads, every_head = entropy_BHR.shape[1], mass_BhRM.shape[1] == entropy_BHR.shape[1]
    per_head = [entropy_BHR]
    if every_head:
        to_audio_BHR = (text_BR * sees_audio_BR)[:, None] * mass_BhRM[..., _AUDIO]
        to_text_BHR = (audio_BR * sees_text_BR)[:, None] * mass_BhRM[..., _TEXT]
        per_head += [mass_BhRM[..., _FIRST], to_audio_BHR, to_text_BHR]
    summed = _weighted(torch.stack(per_head, 0), weight_BR[:, None]).sum((1, 3))
    missing = summed.new_zeros((len(HEAD_ROWS) - len(per_head), heads))
    return AttentionSums(sums=torch.cat((sampled[None], sums)), per_head=torch.cat((summed, missing)), masses_per_head=every_head)


def _weighted(values: Tensor, weight: Tensor) -> Tensor:
    """Return values times weights, 0 where the weight is 0 even if the value is not finite (a padded row may hold anything)."""
    return torch.where(weight > 0, values, 0.0) * weight
