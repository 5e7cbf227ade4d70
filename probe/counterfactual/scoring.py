"""How well one pass predicted: cross-entropy of every labelled row of a head, whose sample it is of, how far two passes are apart.

Shapes: B samples, S positions, V vocabulary, K codebooks, N rows of a head (codebooks innermost), C rows of a chunk, R sampled rows.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from probe.capture.microbatch import MicroBatch, named_output
from probe.capture.observers.head_offered import Offered, offered_rows
from probe.capture.observers.head_scoring import change_of
from probe.counterfactual.replay import Replayed
from probe.measure.chunks import accumulator, blocks, per_chunk
from probe.measure.heads import UNCHANGED, Logits
from probe.measure.picks import pick_rows
from probe.records import Site
from probe.sites.batch import samples_in
from probe.sites.facts import ModelFacts
from probe.sites.labels import NotAligned, align

NOT_CALLED = "the model computes its loss without this head, and its output offers no log-probabilities"
_DIVERGENCE_MIB = 2.0


@dataclass(frozen=True, slots=True)
class Samples:
    """Whose rows the rows of a head are.

    Attributes:
        count: How many samples are told apart; 1 where they cannot be (``known`` is false).
        known: Whether each is a sample of the batch.
        index_N: int64 (N,), the sample of each row, ``count`` for rows of none; ``None`` where rows lie sample by sample, equally many.
    """

    count: int
    known: bool
    index_N: Tensor | None = None

    def of(self, index_R: Tensor, rows: int) -> Tensor:
        """Return the sample of each of some rows, int64 (R,), of a head that has ``rows`` rows."""
        return torch.div(index_R, rows // self.count, rounding_mode="floor") if self.index_N is None else self.index_N[index_R]

    def totals(self, values_N: Tensor) -> Tensor:
        """Return the sum of each sample's values, (count,), accumulated in float64. No sync."""
        wide = accumulator(values_N.device)
        if self.index_N is None:
            return values_N.reshape(self.count, -1).sum(1, dtype=wide)
        buckets = torch.zeros(self.count + 1, dtype=wide, device=values_N.device)
        return buckets.index_add_(0, self.index_N, values_N.to(wide))[: self.count]


@dataclass(frozen=True, slots=True)
class HeadRows:
    """One head in one pass.

    Attributes:
        loss_N: float32, cross-entropy in nats; NaN where there is no label, one outside the vocabulary, or no finite value.
        samples: Whose rows they are.
        logits: A view of the logits, (..., V), N rows; ``None`` where only log-probabilities of the labels are known.
        change: What the model does to the logits before its loss.
    """

    loss_N: Tensor
    samples: Samples
    logits: Tensor | None
    change: Logits = UNCHANGED


def head_rows(site: Site, pass_: Replayed, facts: ModelFacts) -> HeadRows | str:
    """Score a head as it was called in a pass, or from what the root's output offers; else say why it cannot be. No sync.

    Memory: 4 bytes a row that stay, 16 to 24 bytes a label while labels are laid, two temporaries of a chunk.
    """
    logits = pass_.logits.get(site.name)
    if logits is None:
        offered = offered_rows(site, pass_.micro, facts)
        if isinstance(offered, Offered):
            return _of_offered(offered, pass_.micro)
        return offered.reason if isinstance(offered, NotAligned) else NOT_CALLED
    aligned = align(logits, site=site, facts=facts, micro=pass_.micro)
    if isinstance(aligned, NotAligned):
        return aligned.reason
    rows = aligned.labels.shape if site.modality == "text" else aligned.labels.shape[:-1]
    books = 1 if site.modality == "text" else aligned.labels.shape[-1]
    change = change_of(site, facts)
    loss_N = row_losses(aligned.logits, aligned.labels, change=change)
    return HeadRows(loss_N, samples_of(rows, books, pass_.micro), aligned.logits, change)


def _of_offered(offered: Offered, micro: MicroBatch) -> HeadRows:
    counted_BP = offered.meant & offered.log_probs.isfinite()
    loss_BP = torch.where(counted_BP, -offered.log_probs.float(), torch.nan)
    return HeadRows(loss_BP.reshape(-1), samples_of(loss_BP.shape, 1, micro), None)


def row_losses(logits: Tensor, labels: Tensor, *, change: Logits = UNCHANGED) -> Tensor:
    """Return the cross-entropy of every row, float32 (N,), NaN where it does not count (see :class:`HeadRows`). No sync.

    Works a chunk of rows at a time, in float32 whatever the dtype of the logits: two temporaries of at most 8 MiB, or of one row.

    Args:
        logits: (..., V).
        labels: int64 (...), any negative number where there is none.
        change: What the model does to these logits before its loss.
    """
    vocabulary, limit = logits.shape[-1], per_chunk(4.0 * logits.shape[-1])
    loss_N = torch.full((labels.numel(),), torch.nan, dtype=torch.float32, device=logits.device)
    for (start, block_CV), (_, labels_C1) in zip(blocks(logits.detach(), limit), blocks(labels.unsqueeze(-1), limit)):
        counted_C1 = (labels_C1 >= 0) & (labels_C1 < vocabulary)
        wide_CV = change.change_(block_CV.to(torch.float32, copy=True))
        label_C1 = wide_CV.gather(1, torch.where(counted_C1, labels_C1, 0))
        loss_C1 = torch.logsumexp(wide_CV, -1, keepdim=True) - label_C1
        kept_C1 = torch.where(counted_C1 & loss_C1.isfinite(), loss_C1, torch.nan)
        loss_N[start : start + len(kept_C1)] = kept_C1.squeeze(1)
    return loss_N


def samples_of(rows: torch.Size, books: int, micro: MicroBatch) -> Samples:
    """Say whose rows the rows of a head are.

    Rows (B, S) are the samples' in order. Rows that lie joined, one for each predicted audio frame of the batch, are told apart by the
    ``audio_out_mask`` (B, S) that models of this kind return: frame by frame in the order of its positions.

    Args:
        rows: Shape of the rows without codebooks.
        books: Codebooks of each row.
        micro: Inputs and output of the pass.
    """
    count = samples_in(micro.inputs)
    if len(rows) == 2 and rows[0] == count:
        return Samples(count, known=True)
    if count == 1:
        return Samples(1, known=True)
    mask_BS = named_output(micro.output, "audio_out_mask")
    if len(rows) == 1 and isinstance(mask_BS, Tensor) and mask_BS.dim() == 2 and mask_BS.shape[0] == count:
        ends_B = (mask_BS != 0).sum(1).cumsum(0)
        sample_N = torch.searchsorted(ends_B, torch.arange(rows[0], device=ends_B.device), right=True)
        return Samples(count, known=True, index_N=sample_N.unsqueeze(1).expand(-1, books).reshape(-1))
    return Samples(1, known=False)


@dataclass(frozen=True, slots=True)
class Distribution:
    """The predicted distributions of a few labelled rows: int64 (R,) rows, bool (R,) which of them count, float32 (R, V) log p."""

    index_R: Tensor
    used_R: Tensor
    log_p_RV: Tensor


def distribution(rows: HeadRows, *, most: int, salt: int) -> Distribution | None:
    """Return the distributions of up to ``most`` labelled rows, picked by a hash; ``None`` if there are no logits. No sync.

    Holds 4 bytes a row and entry of the vocabulary; picking costs some 32 bytes a row of the head for a moment.
    """
    if rows.logits is None or not rows.loss_N.numel():
        return None
    index_R, used_R = pick_rows(rows.loss_N.isfinite(), most=most, salt=salt)
    return Distribution(index_R, used_R, _log_probabilities(rows, index_R))


def divergence(before: Distribution, after: HeadRows, reached_B: Tensor | None = None) -> Tensor:
    """Return Σ KL(before ‖ after) in nats and the number of rows it is over, (2,) float64. No sync.

    Rows whose divergence is not finite are left out, and those of samples that ``reached_B`` (bool) leaves out. Temporaries stay
    below 2 MiB each, or are of one row.

    Source: KL(p ‖ q) = Σ p (log p - log q) = Σ p (e^d - 1 - d) with d = log q - log p, as both sum to 1. In this form no term is negative,
    and the rounding of the two normalisations, larger than the divergence of two nearly equal passes, drops out.
    """
    wide, limit = accumulator(before.log_p_RV.device), per_chunk(4.0 * before.log_p_RV.shape[1], _DIVERGENCE_MIB)
    used_R = before.used_R
    if reached_B is not None and after.samples.count == len(reached_B):
        sample_R = after.samples.of(before.index_R, after.loss_N.numel())
        used_R = used_R & reached_B[sample_R.clamp(max=len(reached_B) - 1)]
    total_2 = torch.zeros(2, dtype=wide, device=before.log_p_RV.device)
    for start in range(0, len(before.index_R) if after.logits is not None else 0, limit):
        rows = slice(start, start + limit)
        log_p_CV, log_q_CV = before.log_p_RV[rows], _log_probabilities(after, before.index_R[rows])
        p_CV, d_CV = log_p_CV.exp(), log_q_CV - log_p_CV
        near_CV = p_CV * (d_CV.expm1() - d_CV)
        # Far apart e^d overflows where p e^d = q does not; and where p is 0 only q is left.
        far_CV = log_q_CV.exp() - torch.where(p_CV > 0, p_CV + p_CV * d_CV, 0.0)
        kl_C = torch.where(d_CV.abs() < 1, near_CV, far_CV).sum(-1, dtype=wide)
        counted_C = used_R[rows] & kl_C.isfinite()
        total_2 += torch.stack([torch.where(counted_C, kl_C, 0.0).sum(), counted_C.sum(dtype=wide)])
    return total_2


def _log_probabilities(rows: HeadRows, index_R: Tensor) -> Tensor:
    """Return log softmax of some rows, float32 (R, V); the logits are not copied, whatever their strides."""
    assert rows.logits is not None
    places: list[Tensor] = []
    for size in reversed(rows.logits.shape[:-1]):
        places.insert(0, index_R % size)
        index_R = torch.div(index_R, size, rounding_mode="floor")
    picked_RV = rows.logits.detach()[tuple(places)].float()
    return torch.log_softmax(rows.change.change_(picked_RV), -1)
