"""Random samples that look like the real ones: log-mel features with a padded tail, words, delayed audio codes, padded rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

IGNORED = -100

Sample = dict[str, Any]


class Samples(Dataset[Sample]):
    """A dataset of samples that are made once and kept."""

    def __init__(self, samples: Sequence[Sample]) -> None:
        self._samples = list(samples)

    def __len__(self) -> int:
        return len(self._samples)

    def __getitem__(self, index: int) -> Sample:
        return self._samples[index]


def make_samples(count: int, seed: int, make: Callable[[int, torch.Generator], Sample]) -> Samples:
    """Return ``count`` samples, each from ``make(index, generator)``; the global generators are left alone."""
    generator = torch.Generator().manual_seed(seed)
    return Samples([make(index, generator) for index in range(count)])


def integer(generator: torch.Generator, low: int, high: int) -> int:
    """Return a random whole number from ``low`` to ``high``, both possible."""
    return int(torch.randint(low, high + 1, (1,), generator=generator))


def words(generator: torch.Generator, low: int, high: int) -> str:
    """Return ``low`` to ``high`` random lower-case characters, cut into words by spaces."""
    letters = "abcdefghijklmnopqrstuvwxyz    "
    return "".join(letters[integer(generator, 0, len(letters) - 1)] for _ in range(integer(generator, low, high)))


def clip_features(generator: torch.Generator, mels: int, frames: int, valid: int) -> Tensor:
    """Return the log-mel features of one random clip, (mels, frames) float32, of which the first ``valid`` frames are sound.

    The rest is what a Whisper feature extractor makes of padding: the floor of this clip, 8 (in log10, so 2 after scaling) below its peak.
    Source: ``transformers.WhisperFeatureExtractor``, ``log_spec = max(log_spec, log_spec.max() - 8); (log_spec + 4) / 4``.
    """
    slow = torch.randn(mels, frames // 4 + 1, generator=generator).repeat_interleave(4, dim=1)[:, :frames]
    features = 0.4 * slow + 0.2 * torch.randn(mels, frames, generator=generator)
    floor = features[:, :valid].max() - 2.0
    features = features.clamp(min=float(floor))
    features[:, valid:] = floor
    return features


def delayed_codes(generator: torch.Generator, codebooks: int, codes: int, frames: int) -> tuple[Tensor, Tensor]:
    """Return random audio codes in the delay pattern and their labels, both (frames + codebooks - 1, codebooks) int64.

    Codebook k starts k frames late: ``codes`` (begin) stands before its first code and ``codes + 1`` (end) after its last.
    What stands before the first code is no label.
    """
    plain = torch.randint(0, codes, (frames, codebooks), generator=generator)
    delayed = torch.full((frames + codebooks - 1, codebooks), codes + 1)
    labels = delayed.clone()
    for codebook in range(codebooks):
        delayed[:codebook, codebook] = codes
        labels[:codebook, codebook] = IGNORED
        delayed[codebook : codebook + frames, codebook] = plain[:, codebook]
        labels[codebook : codebook + frames, codebook] = plain[:, codebook]
    return delayed, labels


def pad_rows(rows: Sequence[Sequence[int]] | Sequence[Tensor], value: int) -> Tensor:
    """Return the rows as one int64 tensor (B, longest, ...), padded on the right with ``value``."""
    tensors = [torch.as_tensor(row, dtype=torch.long) for row in rows]
    return torch.nn.utils.rnn.pad_sequence(tensors, batch_first=True, padding_value=value)


def text_batch(samples: Sequence[Sample], pad_id: int) -> dict[str, Tensor]:
    """Return ``input_ids``, ``attention_mask`` and ``labels`` (B, S) of samples with ``input_ids`` and ``labels``, padded on the right."""
    return {
        "input_ids": pad_rows([sample["input_ids"] for sample in samples], pad_id),
        "attention_mask": pad_rows([[1] * len(sample["input_ids"]) for sample in samples], 0),
        "labels": pad_rows([sample["labels"] for sample in samples], IGNORED),
    }


def prompt_and_target(prompt: Sequence[int], target: Sequence[int]) -> Sample:
    """Return ``input_ids`` and ``labels`` of one sample, in which only ``target`` is learnt."""
    return {"input_ids": [*prompt, *target], "labels": [IGNORED] * len(prompt) + list(target)}
