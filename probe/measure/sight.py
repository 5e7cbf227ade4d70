"""What sampled attention rows can see: keys of each modality, and how much each row therefore counts.

Shapes: B batch, S tokens (queries), K keys, R sampled rows a sample, M groups of keys; b, r: those of one block.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from probe.measure import blocks
from probe.measure.blocks import NotObservable
from probe.measure.rows import RowChoice
from probe.sites.modality import AUDIO, PADDING, REFERENCE, TEXT, UNKNOWN

#: Columns of :meth:`Sight.columns`; audio includes the reference.
GROUPS = ("padding", "text", "audio", "reference", "first", "place")
#: With two of zeros: the CPU multiplies by 8 columns faster than by 6.
COLUMNS = 8
_SEEN_BYTES = 16  # of one (row, key) pair that is counted


@dataclass(frozen=True, slots=True)
class Sight:
    """What the sampled rows of one call see.

    Attributes:
        query_BR, key_BK: int8 codes of :mod:`probe.sites.modality`, -1 where nothing is known.
        keys_known: Whether the keys' codes are known.
        weight_BR: float64: what a row stands for; 0 for padding, unused slots and rows that see nothing.
        visible_BR: float64 number of visible keys.
        kinds_BRM: float32 number of visible keys of text, audio and reference.
        first_B1: int64: the sample's first key that is not padding (if unknown, the first that a sampled row sees).
        text_audio_BK: bool: audio keys that at least one text row sees that counts. ``None`` if nobody asked.
    """

    query_BR: Tensor
    key_BK: Tensor
    keys_known: bool
    weight_BR: Tensor
    visible_BR: Tensor
    kinds_BRM: Tensor
    first_B1: Tensor
    text_audio_BK: Tensor | None

    def columns(self, b: slice, dtype: torch.dtype) -> Tensor:
        """Return (b, K, ``COLUMNS``): 1 where a key is in a group; in that of places its number, where it is audio or reference.

        Keys of a group lie side by side in memory: rows are multiplied by it in less than half the time on a CPU.
        """
        key_bK1 = self.key_BK[b, :, None]
        place_K1 = torch.arange(key_bK1.shape[1], device=key_bK1.device)[:, None]
        groups_bKM = key_bK1.new_zeros((key_bK1.shape[0], COLUMNS, key_bK1.shape[1]), dtype=dtype).mT
        groups_bKM[..., :4] = key_bK1 == torch.arange(4, device=key_bK1.device)
        groups_bKM[..., 2] += groups_bKM[..., 3]
        groups_bKM[..., 4:5] = place_K1 == self.first_B1[b, None]
        groups_bKM[..., 5:6] = (key_bK1 >= AUDIO) * place_K1
        return groups_bKM

    def row_weights(self, *, sinks: bool, distances: bool) -> Tensor:
        """Return float64 (B, R, Q): how much a row counts for each of ``SHAPE`` and ``MASSES``."""
        one_BR = torch.ones_like(self.weight_BR)
        text_BR, audio_BR = self.query_BR == TEXT, self.query_BR >= AUDIO
        sees_text_BR, sees_reference_BR = self.kinds_BRM[..., 0] > 0, self.kinds_BRM[..., 2] > 0
        sees_audio_BR = (self.kinds_BRM[..., 1] > 0) | sees_reference_BR
        counts = (
            *(one_BR, self.visible_BR + sinks >= 2, one_BR, one_BR, one_BR * sinks, one_BR, one_BR * distances),
            *(one_BR, one_BR * self.keys_known, text_BR & sees_text_BR, text_BR & sees_audio_BR, text_BR & sees_reference_BR),
            *(audio_BR & sees_text_BR, audio_BR & sees_audio_BR, (self.query_BR == AUDIO) & sees_reference_BR),
        )
        return torch.stack(counts, -1) * self.weight_BR[..., None]


def check_call(shape: tuple[int, int, int, int], choice: RowChoice, query_BS: Tensor | None, key_BK: Tensor | None) -> None:
    """Check that rows and modalities are of this call.

    Raises:
        NotObservable: they are not, by their shapes.
    """
    samples, _, queries, keys = shape
    if choice.queries != queries or choice.index_BR.shape[0] != samples:
        raise NotObservable(f"rows chosen for ({choice.index_BR.shape[0]}, {choice.queries}) queries, the call has ({samples}, {queries})")
    for what, modality, length in (("queries", query_BS, queries), ("keys", key_BK, keys)):
        if modality is not None and modality.shape != (samples, length):
            raise NotObservable(f"the modality of {tuple(modality.shape)} tokens is known, the call has ({samples}, {length}) {what}")


def look(
    visible_of: Callable[[slice], Tensor], choice: RowChoice, keys: int, query_BS: Tensor | None, key_BK: Tensor | None, *, walks: bool
) -> Sight:
    """Count what the sampled rows see. Some rows at once, so that temporaries stay within ``CHUNK_BYTES``; no sync.

    Args:
        visible_of: Returns bool (B, r, K) for a slice of the sampled rows.
        choice: The rows.
        keys: K.
        query_BS: Codes of the queries, or ``None``.
        key_BK: Codes of the keys, or ``None``.
        walks: Whether to find the audio keys that text rows see.
    """
    samples, rows = choice.index_BR.shape
    device = choice.index_BR.device
    unknown = torch.full((samples, 1), UNKNOWN, dtype=torch.int8, device=device)
    query_BR = unknown.expand(-1, rows) if query_BS is None else query_BS.gather(1, choice.index_BR)
    codes_BK = unknown.expand(-1, keys) if key_BK is None else key_BK
    weight_BR = choice.weight_BR.double() * (query_BR != PADDING)
    text_BR1 = ((query_BR == TEXT) & (weight_BR > 0))[..., None]
    numbers: list[Tensor] = []
    seen_BK, by_text_BK = [torch.zeros((samples, keys), dtype=torch.bool, device=device) for _ in range(2)]
    step = max(1, blocks.CHUNK_BYTES // max(1, samples * keys * _SEEN_BYTES))
    for r in (slice(start, min(start + step, rows)) for start in range(0, rows, step)):
        visible_BrK = visible_of(r)
        numbers.append(_count(visible_BrK, codes_BK))
        seen_BK = seen_BK | visible_BrK.any(1)
        if walks:
            by_text_BK = by_text_BK | (visible_BrK & text_BR1[:, r]).any(1)
    number_BRM = numbers[0] if len(numbers) == 1 else torch.cat(numbers, 1)
    real_BK = seen_BK if key_BK is None else codes_BK != PADDING
    return Sight(
        query_BR=query_BR,
        key_BK=codes_BK,
        keys_known=key_BK is not None,
        weight_BR=weight_BR * (number_BRM[..., 0] > 0),
        visible_BR=number_BRM[..., 0].double(),
        kinds_BRM=number_BRM[..., 1:],
        first_B1=real_BK.to(torch.int8).argmax(1, keepdim=True),
        text_audio_BK=by_text_BK & (codes_BK >= AUDIO) if walks else None,
    )


def _count(visible_BrK: Tensor, codes_BK: Tensor) -> Tensor:
    """Return float32 (B, r, 4): how many keys of any kind, of text, audio and reference are visible. Exact: ones are added."""
    counts: list[Tensor] = []
    samples, rows, keys = visible_BrK.shape
    kinds_M = torch.arange(TEXT, REFERENCE + 1, device=codes_BK.device)
    for b in some(samples, keys * (_SEEN_BYTES + 4 * rows)):
        visible_brK = visible_BrK[b].float()
        kinds_bKM = (codes_BK[b, :, None] == kinds_M).float()
        with torch.autocast(visible_brK.device.type, enabled=False):
            kinds_brM = visible_brK @ kinds_bKM
        counts.append(torch.cat((visible_brK.sum(-1, keepdim=True), kinds_brM), -1))
    return counts[0] if len(counts) == 1 else torch.cat(counts)


def some(samples: int, sample_bytes: int) -> Iterator[slice]:
    """Yield slices of samples that stay within ``CHUNK_BYTES``."""
    step = max(1, blocks.CHUNK_BYTES // max(1, sample_bytes))
    return (slice(start, min(start + step, samples)) for start in range(0, samples, step))
