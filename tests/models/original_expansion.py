"""How the original-style model makes its sequence longer: every audio token becomes as many positions as its audio has frames.

Shapes: B samples, S expanded positions, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

IGNORED = -100


@dataclass(frozen=True)
class AudioIn:
    """The embeddings that stand for one ``<|AUDIO|>``: encoder frames first, then the embedded codes, each (frames, D)."""

    frames: Tensor
    codes: Tensor


@dataclass(frozen=True)
class Expanded:
    """The sequence that the decoder sees: embeddings (B, S, D), the rest (B, S), padded on the right."""

    inputs_embeds: Tensor
    input_ids: Tensor
    labels: Tensor
    attention_mask: Tensor
    audio_in_mask: Tensor
    audio_in_discrete_codes_mask: Tensor
    audio_out_mask: Tensor


@dataclass(frozen=True)
class _Piece:
    embeds: Tensor
    token: int
    label: int
    kind: str  # "text", "frames", "codes" or "out"


@dataclass(frozen=True)
class AudioTokens:
    """The ids that are expanded, and the one that pads."""

    audio_in: int
    audio_out: int
    pad: int


def expand(
    tokens: AudioTokens,
    *,
    input_ids: Tensor,
    attention_mask: Tensor,
    labels: Tensor,
    text_embeds: Tensor,
    audio_in: Sequence[AudioIn],
    audio_out: Sequence[Tensor],
) -> Expanded:
    """Put the audio into the text, in order over the batch.

    Args:
        tokens: The special ids.
        input_ids: (B, L) before expansion.
        attention_mask: (B, L).
        labels: (B, L); those at audio tokens are dropped.
        text_embeds: (B, L, D).
        audio_in: One entry for each ``<|AUDIO|>`` of the batch.
        audio_out: One (frames, D) for each ``<|AUDIO_OUT|>``.

    Raises:
        ValueError: if there are more or fewer audio tokens than audio.
    """
    ins, outs = iter(audio_in), iter(audio_out)
    rows: list[list[_Piece]] = []
    try:
        for row in range(input_ids.shape[0]):
            real = attention_mask[row].bool()
            ids, row_labels = input_ids[row][real].tolist(), labels[row][real].tolist()
            rows.append(list(_pieces(tokens, ids, row_labels, text_embeds[row][real], ins, outs)))
    except RuntimeError as error:  # a generator turns StopIteration into this
        raise ValueError(f"more audio tokens than audio: {len(audio_in)} in, {len(audio_out)} out") from error
    if next(ins, None) is not None or next(outs, None) is not None:
        raise ValueError(f"fewer audio tokens than audio: {len(audio_in)} in, {len(audio_out)} out")
    return _join(tokens, rows)


def _pieces(
    tokens: AudioTokens, ids: list[int], labels: list[int], embeds: Tensor, ins: Iterator[AudioIn], outs: Iterator[Tensor]
) -> Iterator[_Piece]:
    for position, (token, label) in enumerate(zip(ids, labels, strict=True)):
        if token == tokens.audio_in:
            audio = next(ins)
            yield _Piece(audio.frames, token, IGNORED, "frames")
            yield _Piece(audio.codes, token, IGNORED, "codes")
        elif token == tokens.audio_out:
            yield _Piece(next(outs), token, IGNORED, "out")
        else:
            yield _Piece(embeds[position : position + 1], token, label, "text")


def _join(tokens: AudioTokens, rows: list[list[_Piece]]) -> Expanded:
    device = rows[0][0].embeds.device

    def column(value: Callable[[_Piece], int], padding: int) -> Tensor:
        filled = [[value(piece) for piece in row for _ in range(len(piece.embeds))] for row in rows]
        return pad_sequence([torch.tensor(row, device=device) for row in filled], batch_first=True, padding_value=padding)

    def mask(*kinds: str) -> Tensor:
        return column(lambda piece: int(piece.kind in kinds), 0).bool()

    return Expanded(
        inputs_embeds=pad_sequence([torch.cat([piece.embeds for piece in row]) for row in rows], batch_first=True),
        input_ids=column(lambda piece: piece.token, tokens.pad),
        labels=column(lambda piece: piece.label, IGNORED),
        attention_mask=column(lambda piece: 1, 0),
        audio_in_mask=mask("frames", "codes"),
        audio_in_discrete_codes_mask=mask("codes"),
        audio_out_mask=mask("out"),
    )
