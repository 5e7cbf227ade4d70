"""Which query rows of an attention call are looked at: a fixed number a sample, spread over text and audio, without RNG or sync.

Shapes: B batch, S tokens (queries), R sampled rows a sample.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from probe.sites.modality import AUDIO, PADDING, TEXT

_LOW_32_BITS = 0xFFFFFFFF


@dataclass(frozen=True, slots=True)
class RowChoice:
    """Query rows to look at, R a sample.

    Attributes:
        index_BR: int64 row numbers, always below ``queries``, also in unused slots.
        weight_BR: float32: how many rows that are not padding the slot stands for; 0 where the slot is unused. So
            ``sum(weight * f(row)) / sum(weight)`` estimates the mean of ``f`` over all such rows (exact when all were taken).
        queries: S of the call that the rows were chosen for.
    """

    index_BR: Tensor
    weight_BR: Tensor
    queries: int


def choose_rows(modality_BS: Tensor, *, rows: int, salt: int = 0) -> RowChoice:
    """Choose about ``rows`` query rows over the whole batch, ``max(1, rows // B)`` a sample, all of a sample if it has no more.

    Within a sample, text (with what nobody knows to be audio) and audio get half of the slots each, and what one cannot fill goes to
    the other; a row stands for as many of its modality in its sample as there are for each one taken. With a single slot a sample, text
    and audio are one stratum.
    The choice is a hash of sample, position and ``salt`` (any integer, such as the step): the same everywhere for the same shapes, and
    the estimate is unbiased over salts.

    Args:
        modality_BS: Codes of :mod:`probe.sites.modality`, any integer dtype.
        rows: Budget over the batch, at least 1.
        salt: Host integer that changes which rows are taken.
    """
    samples, queries = modality_BS.shape
    slots = min(queries, max(1, rows // max(1, samples)))
    with torch.no_grad():
        text_BS, audio_BS = (modality_BS != PADDING) & (modality_BS < AUDIO), modality_BS >= AUDIO
        if slots == 1:
            text_BS, audio_BS = modality_BS != PADDING, torch.zeros_like(audio_BS)
        hash_BS = hash_positions(samples, queries, salt, modality_BS.device)
        text_BR = hash_BS.masked_fill(~text_BS, -1).topk(slots, dim=1).indices
        audio_BR = hash_BS.masked_fill(~audio_BS, -1).topk(slots, dim=1).indices
        texts_B1, audios_B1 = text_BS.sum(1, keepdim=True), audio_BS.sum(1, keepdim=True)
        text_slots_B1 = torch.minimum(texts_B1, (slots - audios_B1).clamp(min=slots - slots // 2))
        audio_slots_B1 = torch.minimum(audios_B1, slots - text_slots_B1)
        slot_R = torch.arange(slots, device=modality_BS.device)
        is_text_BR = slot_R < text_slots_B1
        after_text_BR = (slot_R - text_slots_B1).clamp(min=0)
        index_BR = torch.where(is_text_BR, text_BR, audio_BR.gather(1, after_text_BR))
        weight_BR = torch.where(is_text_BR, texts_B1 / text_slots_B1.clamp(min=1), audios_B1 / audio_slots_B1.clamp(min=1))
        used_BR = slot_R < text_slots_B1 + audio_slots_B1
        return RowChoice(index_BR=index_BR, weight_BR=weight_BR.float() * used_BR, queries=queries)


def choose_all_valid(samples: int, queries: int, rows: int, device: torch.device, *, salt: int = 0) -> RowChoice:
    """Choose rows as :func:`choose_rows` does where no modality is known: every row counts, each stands for ``queries / R``."""
    return choose_rows(torch.full((samples, queries), TEXT, dtype=torch.int8, device=device), rows=rows, salt=salt)


def hash_positions(samples: int, queries: int, salt: int, device: torch.device) -> Tensor:
    """Return int64 (B, S) in 0 … 2^32 - 1, distinct within a sample: murmur3's finaliser is a bijection of 32 bits.

    Source: A. Appleby, MurmurHash3 (fmix32). The seed of a sample is mixed in by exclusive or, so distinctness survives.
    """
    sample_B1 = torch.arange(samples, device=device)[:, None]
    seed_B1 = _mix(sample_B1 + ((salt * 0x9E3779B1 + 1) & _LOW_32_BITS))
    return _mix(torch.arange(queries, device=device)[None, :] ^ seed_B1)


def _mix(value: Tensor) -> Tensor:
    value = value & _LOW_32_BITS
    value = ((value ^ (value >> 16)) * 0x85EBCA6B) & _LOW_32_BITS
    value = ((value ^ (value >> 13)) * 0xC2B2AE35) & _LOW_32_BITS
    return value ^ (value >> 16)
