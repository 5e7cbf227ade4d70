"""What sampled attention rows say, as sums that add up over calls and ranks: entropy, distance, and the mass between text and audio.

Shapes: B batch, S tokens (queries), K keys, H heads, R sampled rows a sample, M key groups, Q quantities; b, h, r: those of one block.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from probe.measure import blocks
from probe.measure.blocks import RowBlock, RowSource
from probe.measure.quantities import SHAPE, AttentionSums, add_up, sums_of
from probe.measure.rows import RowChoice
from probe.measure.sight import GROUPS, Places, Sight, check_call, look, places
from probe.measure.walk import Coverage, monotonicity

# What is reduced from each row, in this order; then GROUPS.
_RAW = ("entropy", "effective_keys", "top", "sink", "band", "distance")


@dataclass(frozen=True, slots=True)
class HeadMeanRows:
    """Rows whose masses wait for the modality of the tokens: mass is linear, so the mean over heads is enough.

    Attributes:
        raw_BRHQ: float64: what each head's row says whatever the keys are.
        p_BRK: float32 mean over heads of the probabilities.
        visible_BRK: bool.
        choice: The rows; padding among them is taken out when the modality is known.
        shape: (B, H, S, K) of the call.
        sinks: Whether the layer has learned sinks.
    """

    raw_BRHQ: Tensor
    p_BRK: Tensor
    visible_BRK: Tensor
    choice: RowChoice
    shape: tuple[int, int, int, int]
    sinks: bool


def held_bytes(shape: tuple[int, int, int, int], choice: RowChoice) -> int:
    """Return how many bytes :func:`describe_later` will hold for a call, before anything is computed."""
    samples, rows = choice.index_BR.shape
    return samples * rows * (shape[1] * len(_RAW) * 8 + shape[3] * 5 + 12)


def describe(
    source: RowSource,
    choice: RowChoice,
    *,
    query_modality_BS: Tensor | None,
    key_modality_BK: Tensor | None,
    self_attention: bool = True,
    walks: bool = True,
) -> AttentionSums:
    """Sum up one attention call; padding among the queries counts for nothing, nor does a row that sees no key.

    The definitions are those of the catalogue (``docs/attention.md`` tells them at length). What needs a modality that is not known has
    weight 0. Reduced block by block, in float64; beside the blocks it holds a few numbers a row and head and a byte a key. No sync.

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
    heads, keys = source.shape[1], source.shape[3]
    with torch.no_grad():
        sight = look(lambda r: source.visible(choice.index_BR[:, r]), choice, keys, query_BS, key_BK, walks=walks)
        weight_BRQ = sight.row_weights(sinks=bool(source.sinks), distances=self_attention)
        shape_BRQ, mass_BRQ = weight_BRQ[..., : len(SHAPE)], weight_BRQ[..., len(SHAPE) :]
        text_BR = mass_BRQ[..., 3]  # the weights of text_to_audio
        coverage = Coverage(text_BR, sight.text_audio_BK, heads) if sight.text_audio_BK is not None else None
        where = places(choice, keys, query_BS, key_BK, self_attention=self_attention)
        raw_BRHQ = _reduce(source, choice, where, sight.columns, coverage.add if coverage is not None else None)
        raw_BRHQ, groups_BRHM = raw_BRHQ[..., : len(_RAW)], raw_BRHQ[..., len(_RAW) :]
        numerators = [add_up(_shape(raw_BRHQ, sight, source.sinks), shape_BRQ), add_up(_masses(groups_BRHM), mass_BRQ)]
        weights = [shape_BRQ.sum((0, 1)), mass_BRQ.sum((0, 1))]
        if coverage is not None:
            audio_BRH = groups_BRHM[..., 2] + groups_BRHM[..., 3]
            tau_BH, pairs_B1 = monotonicity(choice.index_BR, text_BR > 0, audio_BRH, groups_BRHM[..., 5])
            values_BHQ = torch.stack((tau_BH, coverage.value()), -1)
            each_B1 = text_BR.sum(1, keepdim=True)
            weight_BQ = torch.cat((each_B1 * (pairs_B1 > 0), each_B1), 1)
            numerators.append(add_up(values_BHQ[:, None], weight_BQ[:, None]))
            weights.append(weight_BQ.sum(0))
        return sums_of((sight.weight_BR > 0).sum(dtype=torch.float64), numerators, weights)


def describe_later(source: RowSource, choice: RowChoice) -> HeadMeanRows:
    """Keep what :func:`finish_later` needs once the modality is known, of self-attention: R * K floats a sample instead of H * R * K.

    Raises:
        NotObservable: rows and choice are not of the same call, by their shapes, or the source cannot give its rows.
    """
    check_call(source.shape, choice, None, None)
    samples, heads, _, keys = source.shape
    rows = choice.index_BR.shape[1]
    with torch.no_grad():
        p_BRK = torch.zeros((samples, rows, keys), dtype=torch.float32, device=source.device)

        def keep(block: RowBlock, p_brhK: Tensor) -> None:
            p_BRK[block.samples, block.rows] += p_brhK.sum(2) / heads

        raw_BRHQ = _reduce(source, choice, places(choice, keys, None, None, self_attention=True), None, keep)
        return HeadMeanRows(raw_BRHQ, p_BRK, source.visible(choice.index_BR), choice, source.shape, bool(source.sinks))


def finish_later(held: HeadMeanRows, query_modality_BS: Tensor | None, key_modality_BK: Tensor | None) -> AttentionSums:
    """Return the sums that :func:`describe` would have given with these modalities, but no ``WALKS``, and no masses of each head.

    Raises:
        NotObservable: the modalities are not those of the held call, by their shapes.
    """
    check_call(held.shape, held.choice, query_modality_BS, key_modality_BK)
    keys = held.shape[3]
    with torch.no_grad():
        sight = look(lambda r: held.visible_BRK[:, r], held.choice, keys, query_modality_BS, key_modality_BK, walks=False)
        weight_BRQ = sight.row_weights(sinks=held.sinks, distances=True)
        shape_BRQ, mass_BRQ = weight_BRQ[..., : len(SHAPE)], weight_BRQ[..., len(SHAPE) :]
        groups_BKM = sight.columns(slice(None))
        rows = held.p_BRK.shape[1]
        step = max(1, blocks.CHUNK_BYTES // max(1, held.p_BRK[:, :1].numel() * 8))
        parts = [held.p_BRK[:, start : start + step].double() @ groups_BKM for start in range(0, rows, step)]
        groups_BRM = torch.cat(parts, 1)
        numerators = [add_up(_shape(held.raw_BRHQ, sight, held.sinks), shape_BRQ), add_up(_masses(groups_BRM[:, :, None]), mass_BRQ)]
        weights = [shape_BRQ.sum((0, 1)), mass_BRQ.sum((0, 1))]
        return sums_of((sight.weight_BR > 0).sum(dtype=torch.float64), numerators, weights)


def _reduce(
    source: RowSource,
    choice: RowChoice,
    where: Places,
    columns: Callable[[slice], Tensor] | None,
    each: Callable[[RowBlock, Tensor], None] | None,
) -> Tensor:
    """Return what each head's row says, float64 (B, R, H, Q): ``_RAW``, then its mass in each of the ``columns`` of keys.

    ``each`` is shown every block with its probabilities of keys in float64, (b, r, h, K), free to be overwritten.
    """
    samples, heads, _, keys = source.shape
    rows = choice.index_BR.shape[1]
    values_BRHQ = torch.empty(0, device=source.device)
    groups_bKM, at = None, None
    for block in source.blocks(choice.index_BR):
        if columns is not None and at != block.samples:
            groups_bKM, at = columns(block.samples), block.samples
        alone_brhQ = _alone(block.p.transpose(1, 2), keys)
        p_brhK = block.p.transpose(1, 2)[..., :keys].to(torch.float64, memory_format=torch.contiguous_format)
        b, r, h, _ = p_brhK.shape
        parts = [alone_brhQ, (p_brhK.flatten(0, 1) @ where.columns(block.samples, block.rows).flatten(0, 1)).view(b, r, h, -1)]
        if groups_bKM is not None:
            parts.append((p_brhK.flatten(1, 2) @ groups_bKM).view(b, r, h, -1))
        if each is not None:
            each(block, p_brhK)
        values_brhQ = torch.cat(parts, -1)
        if (b, r, h) == (samples, rows, heads):
            return values_brhQ
        if not values_BRHQ.numel():
            values_BRHQ = values_brhQ.new_empty((samples, rows, heads, values_brhQ.shape[-1]))
        values_BRHQ[block.samples, block.rows, block.heads] = values_brhQ
    return values_BRHQ


def _alone(p_brhC: Tensor, keys: int) -> Tensor:
    """Return entropy, 1 / Σp², the largest probability of a key and that of the sink, float64 (b, r, h, 4), of K columns and a sink's."""
    entropy_brh = torch.special.entr(p_brhC).sum(-1, dtype=torch.float64)
    square_brh = torch.linalg.vector_norm(p_brhC, dim=-1, dtype=torch.float64).square_()
    effective_brh = torch.where(square_brh == 0, 0.0, square_brh.reciprocal())
    top_brh = p_brhC[..., :keys].amax(-1).double()
    sink_brh = p_brhC[..., -1].double() if p_brhC.shape[-1] > keys else torch.zeros_like(top_brh)
    return torch.stack((entropy_brh, effective_brh, top_brh, sink_brh), -1)


def _shape(raw_BRHQ: Tensor, sight: Sight, sinks: int) -> Tensor:
    """Return the values of ``SHAPE``, (B, R, H, Q). A sink is one more outcome, for which the largest possible entropy is larger, too."""
    entropy_BRH1 = raw_BRHQ[..., :1]
    largest_BR = (sight.visible_BR + bool(sinks)).clamp(min=2).log()
    return torch.cat((entropy_BRH1, entropy_BRH1 / largest_BR[..., None, None], raw_BRHQ[..., 1:]), -1)


def _masses(groups_BRhM: Tensor) -> Tensor:
    """Return the values of ``MASSES``, (B, R, h, Q), from the masses on ``GROUPS``: audio includes the reference."""
    padding, text, audio, reference, first = groups_BRhM.unbind(-1)[: len(GROUPS) - 1]
    audio = audio + reference
    return torch.stack((first, padding, text, audio, reference, text, audio, reference), -1)
