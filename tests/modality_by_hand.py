"""What each position of a batch is, written out sample by sample as the cases construct their samples; no label is looked at."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from models.case import Case
from probe.sites.modality import AUDIO, PADDING, REFERENCE, TEXT


def by_hand(case: Case, batch: Any) -> Tensor:
    """Return the codes (B, S) int8 of what the decoder of a case attends over.

    Higgs Audio v2: a prompt with a reference, then an answer with its target. The original: clips and their codes are reference, what
    stands for ``<|AUDIO_OUT|>`` is target. Elsewhere all audio is input.
    """
    convert = case.tokenizer().convert_tokens_to_ids
    if case.name == "original":
        return rows_of(list(_expanded(batch, convert("<|AUDIO|>"), convert("<|AUDIO_OUT|>"))))
    if case.name == "higgs_audio_v2":
        return _by_segments(batch, {convert("<|AUDIO_OUT|>"), convert("<|audio_delay|>")}, [REFERENCE, AUDIO])
    return _by_segments(batch, {convert(case.audio_token)}, [AUDIO])


def rows_of(codes: Sequence[Sequence[int]]) -> Tensor:
    """Return rows of codes, padded."""
    return pad_sequence([torch.tensor(row, dtype=torch.int8) for row in codes], batch_first=True, padding_value=PADDING)


def _by_segments(batch: Any, audio: set[int], kinds: Sequence[int]) -> Tensor:
    """Return codes where the i-th segment of audio ids of a sample is ``kinds[i]`` (the last for all that follow)."""
    coded = []
    for row, real in zip(batch["input_ids"].tolist(), batch["attention_mask"].sum(1).tolist()):
        segment, inside, codes = -1, False, []
        for token in row[:real]:
            segment += token in audio and not inside
            inside = token in audio
            codes.append(kinds[min(segment, len(kinds) - 1)] if inside else TEXT)
        coded.append(codes)
    return rows_of(coded)


def _expanded(batch: Any, audio_in: int, audio_out: int) -> Iterator[list[int]]:
    """Yield the codes of each sample: a clip of n frames leaves n / 4 after a convolution of stride 2 and pooling by 2."""
    clips = iter(batch["audio_feature_attention_mask"].sum(1).tolist())
    sizes = {name: _lengths(batch[f"{name}_start"].tolist(), batch[name].shape[1]) for name in ("audio_in_ids", "audio_out_ids")}
    for row, real in zip(batch["input_ids"].tolist(), batch["attention_mask"].sum(1).tolist()):
        codes: list[int] = []
        for token in row[:real]:
            if token == audio_in:
                codes += [REFERENCE] * ((next(clips) + 1) // 2 // 2 + next(sizes["audio_in_ids"]))
            elif token == audio_out:
                codes += [AUDIO] * next(sizes["audio_out_ids"])
            else:
                codes.append(TEXT)
        yield codes


def _lengths(starts: list[int], total: int) -> Iterator[int]:
    return (end - start for start, end in zip(starts, [*starts[1:], total]))
