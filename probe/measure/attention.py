"""What sampled attention rows say, as sums that add up over calls and ranks: entropy, distance, and the mass between text and audio.

Each call is reduced to a few numbers a row when it is seen; what these add up to is worked out for many calls at once.

Shapes: L attention calls, B batch, S tokens (queries), K keys, H heads, R sampled rows a sample, M key groups, Q quantities; b, h, r: those
of one block.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from probe.measure import blocks
from probe.measure.blocks import RowBlock, RowSource
from probe.measure.fused_rows import FusedRows
from probe.measure.prepared import Prepared, Weights, multiplied_in, weigh
from probe.measure.quantities import MASSES, SHAPE, WALKS, AttentionSums, add_up, sums_of
from probe.measure.rows import RowChoice
from probe.measure.sight import GROUPS, check_call, look
from probe.measure.walk import Coverage, covered, monotonicity

# What is reduced from each row, in this order; then GROUPS.
_RAW = ("entropy", "sum_of_squares", "top", "band", "distance", "sink")
_NORM_COLUMNS = 1 << 15
_OF_ROWS = (*SHAPE, *MASSES)
# Of which of these the quantities are made.
_OF = {"entropy_nats": "entropy", "effective_keys": "sum_of_squares", "first_token": "first"}


@dataclass(frozen=True, slots=True)
class ReducedRows:
    """What the rows of one call say, to be summed up with those of other calls that were prepared for alike.

    Attributes:
        raw_QBHR: float32: ``_RAW``, then the masses in ``GROUPS``.
        walked: Of text rows over audio keys, float32 (B, H, K) distributions or float64 (B, H) coverage; ``None`` without walks.
    """

    raw_QBHR: Tensor
    walked: Tensor | None

    @property
    def nbytes(self) -> int:
        """Bytes that it holds on the device."""
        return self.raw_QBHR.nbytes + (0 if self.walked is None else self.walked.nbytes)


@dataclass(frozen=True, slots=True)
class HeadMeanRows:
    """Rows whose masses wait for the modality of the tokens: mass is linear, so the mean over heads is enough.

    Attributes:
        raw_QBHR: float32: what each head's row says whatever the keys are.
        p_BRK: float32 mean over heads of the probabilities.
        visible_BRK: bool.
        choice: The rows; padding among them is taken out when the modality is known.
        shape: (B, H, S, K) of the call.
        sinks: Whether the layer has learned sinks.
    """

    raw_QBHR: Tensor
    p_BRK: Tensor
    visible_BRK: Tensor
    choice: RowChoice
    shape: tuple[int, int, int, int]
    sinks: bool


def held_bytes(shape: tuple[int, int, int, int], choice: RowChoice) -> int:
    """Return how many bytes :func:`describe_later` will hold for a call, before anything is computed."""
    samples, rows = choice.index_BR.shape
    return samples * rows * (shape[1] * len(_RAW) * 4 + shape[3] * 5 + 12)


def reduce_rows(source: RowSource, prepared: Prepared, *, fused: FusedRows | None = None) -> ReducedRows:
    """Reduce the rows of one call, block by block, in float32; beside the blocks it holds a few numbers a row and head. No sync.

    Args:
        source: The call.
        prepared: What :func:`probe.measure.prepared.prepare` made of it, or of another call whose queries see the same keys.
        fused: The kernels to use where they can be used: then no block is built.

    Raises:
        NotObservable: the source cannot give its rows.
    """
    heads, audio_BK = source.shape[1], prepared.sight.text_audio_BK
    with torch.no_grad(), torch.autocast(source.device.type, enabled=False):
        found = None if fused is None else fused(source, prepared, groups=len(GROUPS), covered=audio_BK is not None)
        if found is not None:
            return ReducedRows(*found)
        coverage = None if audio_BK is None else Coverage(prepared.text_BR, audio_BK, heads)
        raw_QBHR = _reduce(source, prepared, None if coverage is None else coverage.add)
        return ReducedRows(raw_QBHR, None if coverage is None else coverage.held())


def sum_up(calls: Sequence[ReducedRows], prepared: Prepared) -> AttentionSums:
    """Sum up calls; padding among the queries counts for nothing, nor does a row that sees no key.

    The definitions are those of the catalogue (``docs/attention.md`` tells them at length). What needs a modality that is not known has
    weight 0. Over rows in float64, in as many operations as for one call: heads of different calls lie side by side. No sync.

    Args:
        calls: At least one, all of one shape.
        prepared: What all of them were reduced with.
    """
    with torch.no_grad(), torch.autocast(calls[0].raw_QBHR.device.type, enabled=False):
        raw_QBHR = _side_by_side([call.raw_QBHR for call in calls], 2)
        numerators: dict[tuple[str, ...], Tensor] = {_OF_ROWS: _add_up(raw_QBHR, _OF_ROWS, prepared.weights)}
        weights_Q = prepared.weights.sum_Q
        walked = [call.walked for call in calls if call.walked is not None]
        if walked:
            numerators[WALKS], weights_2 = _walks(raw_QBHR, walked, prepared)
            weights_Q = torch.cat((weights_Q, weights_2))
        return sums_of(prepared.weights.sampled, numerators, weights_Q, calls=len(calls))


def describe_later(source: RowSource, prepared: Prepared) -> HeadMeanRows:
    """Keep what :func:`finish_later` needs once the modality is known, of self-attention: R * K floats a sample instead of H * R * K.

    Raises:
        NotObservable: the source cannot give its rows.
    """
    heads, keys = source.shape[1], source.shape[3]
    choice = prepared.choice
    with torch.no_grad(), torch.autocast(source.device.type, enabled=False):
        p_BRK = torch.zeros((*choice.index_BR.shape, keys), dtype=torch.float32, device=source.device)

        def keep(block: RowBlock, p_bhrK: Tensor) -> None:
            p_BRK[block.samples, block.rows] += p_bhrK.sum(1) / heads

        raw_QBHR = _reduce(source, prepared, keep, masses=False)
        return HeadMeanRows(raw_QBHR, p_BRK, source.visible(choice.index_BR), choice, source.shape, bool(source.sinks))


def finish_later(held: HeadMeanRows, query_modality_BS: Tensor | None, key_modality_BK: Tensor | None) -> AttentionSums:
    """Return the sums that :func:`sum_up` would have given with these modalities, but no ``WALKS``, and no masses of each head.

    Raises:
        NotObservable: the modalities are not those of the held call, by their shapes.
    """
    check_call(held.shape, held.choice, query_modality_BS, key_modality_BK)
    keys = held.shape[3]
    with torch.no_grad(), torch.autocast(held.p_BRK.device.type, enabled=False):
        sight = look(lambda r: held.visible_BRK[:, r], held.choice, keys, query_modality_BS, key_modality_BK, walks=False)
        weights = weigh(sight, sinks=held.sinks, distances=True)
        groups_BKM = sight.columns(slice(None), multiplied_in(held.p_BRK.device))
        rows = held.p_BRK.shape[1]
        step = max(1, blocks.CHUNK_BYTES // max(1, held.p_BRK[:, :1].numel() * 8))
        parts = [held.p_BRK[:, start : start + step].to(groups_BKM.dtype) @ groups_BKM for start in range(0, rows, step)]
        groups_MB1R = torch.cat(parts, 1).permute(2, 0, 1).unsqueeze(2)
        shape_HQ = _add_up(held.raw_QBHR, SHAPE, weights)
        nothing = held.raw_QBHR[:, :, :1]  # stands where ``_RAW`` does; no mass is made of it
        mass_1Q = _add_up(torch.cat((nothing, groups_MB1R)), MASSES, weights)
        return sums_of(weights.sampled, {SHAPE: shape_HQ, MASSES: mass_1Q}, weights.sum_Q)


def _reduce(source: RowSource, prepared: Prepared, each: Callable[[RowBlock, Tensor], None] | None, *, masses: bool = True) -> Tensor:
    """Return what each head's row says, float32 (Q, B, H, R): ``_RAW``, then, unless they are to come, its mass in each group of keys.

    ``each`` is shown every block with its probabilities of keys, (b, h, r, K), free to be overwritten.
    """
    samples, heads, _, keys = source.shape
    rows, alone = prepared.choice.index_BR.shape[1], len(_RAW) - 1
    raw_QBHR = torch.empty((len(_RAW) + masses * len(GROUPS), samples, heads, rows), dtype=torch.float32, device=source.device)
    if not source.sinks:
        raw_QBHR[alone].zero_()
    for block in source.blocks(prepared.choice.index_BR, prepared.masks):
        b, h, r = block.samples, block.heads, block.rows
        torch.stack(_alone(block, prepared, keys), out=raw_QBHR[:alone, b, h, r])
        if source.sinks:
            raw_QBHR[alone, b, h, r] = block.p[..., -1]
        p_bhrK = block.p[..., :keys]
        if masses:
            groups_bKM = prepared.groups(b)
            masses_bnM = torch.bmm(p_bhrK.flatten(1, 2).to(groups_bKM.dtype), groups_bKM)
            raw_QBHR[len(_RAW) :, b, h, r] = masses_bnM.view(*p_bhrK.shape[:3], -1)[..., : len(GROUPS)].permute(3, 0, 1, 2)
        if each is not None:
            each(block, p_bhrK)
        del block, p_bhrK  # before the next block is made
    return raw_QBHR


def _alone(block: RowBlock, prepared: Prepared, keys: int) -> list[Tensor]:
    """Return ``_RAW`` of one block less the sink, each (b, h, r), of K columns and perhaps a sink's."""
    p_bhrC = block.p
    spare = torch.empty_like(p_bhrC) if block.spare is None else block.spare
    entropy_bhr = block.entropy
    if entropy_bhr is None:  # p log p is 0 where p is
        entropy_bhr = -torch.clamp(p_bhrC, min=torch.finfo(p_bhrC.dtype).tiny, out=spare).log_().mul_(p_bhrC).sum(-1)
    square_bhr = _squares(p_bhrC, spare)
    top_bhr = p_bhrC[..., :keys].amax(-1) if block.top is None else block.top
    band_bhr, distance_bhr = prepared.where.near(block.samples, block.rows, p_bhrC[..., :keys], spare[..., :keys])
    return [part.float() for part in (entropy_bhr, square_bhr, top_bhr, band_bhr, distance_bhr)]


def _walks(raw_QBHR: Tensor, walked: Sequence[Tensor], prepared: Prepared) -> tuple[Tensor, Tensor]:
    """Return the sums of ``WALKS`` over samples, float64 (H, 2), and those of their weights; H: heads of all calls."""
    audio_BRH, place_BRH = (raw_QBHR[len(_RAW) + GROUPS.index(of)].transpose(1, 2).double() for of in ("audio", "place"))
    tau_BH, pairs_B1 = monotonicity(prepared.choice.index_BR, prepared.text_BR > 0, audio_BRH, place_BRH)
    audio_BK = prepared.sight.text_audio_BK
    assert audio_BK is not None
    if all(part.dim() == 3 for part in walked):
        coverage_BH = covered(_side_by_side(walked, 1), audio_BK)
    else:
        coverage_BH = _side_by_side([part if part.dim() == 2 else covered(part, audio_BK) for part in walked], 1)
    each_B1 = prepared.text_BR.sum(1, keepdim=True)
    weight_BQ = torch.cat((each_B1 * (pairs_B1 > 0), each_B1), 1)
    return add_up(torch.stack((tau_BH, coverage_BH), -1)[:, None], weight_BQ[:, None]), weight_BQ.sum(0)


def _side_by_side(parts: Sequence[Tensor], dim: int) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts), dim)


def _squares(p_bhrC: Tensor, spare: Tensor) -> Tensor:
    """Return the sum of each row's squares, in one pass; in two over rows so long that the CPU's norm, which does not pair, is off."""
    if p_bhrC.shape[-1] <= _NORM_COLUMNS:
        norm_bhr: Tensor = torch.linalg.vector_norm(p_bhrC, dim=-1)
        return norm_bhr.square_()
    return torch.mul(p_bhrC, p_bhrC, out=spare).sum(-1)


def _add_up(raw_QBHR: Tensor, quantities: tuple[str, ...], weights: Weights) -> Tensor:
    """Return the weighted sums of quantities over samples and rows, float64 (h, Q)."""
    columns = (*_RAW, *GROUPS)
    taken = [columns.index(_OF.get(name, name.rsplit("_", 1)[-1])) for name in quantities]
    values_QBHR = torch.stack([raw_QBHR[index] for index in taken]).double()
    if "effective_keys" in quantities:
        square_BHR = values_QBHR[quantities.index("effective_keys")]
        square_BHR.copy_(torch.where(square_BHR == 0, 0.0, square_BHR.reciprocal()))
    first = _OF_ROWS.index(quantities[0])
    part = slice(first, first + len(quantities))
    factor_QB1R, counts_QB1R = (of[..., part].permute(2, 0, 1).unsqueeze(2) for of in (weights.factor_BRQ, weights.counts_BRQ))
    return (torch.where(counts_QB1R, values_QBHR, 0.0) * factor_QB1R).sum((1, 3)).T
