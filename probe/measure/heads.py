"""Scores of an LM head against its labels: cross-entropy, accuracy, entropy, calibration, collapse, in chunks of rows.

Shapes: V vocabulary, N rows, C rows of one chunk, L ways to lay the labels, M bins of confidence.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from probe.errors import ProbeValueError
from probe.measure.calibration import CALIBRATION, calibration
from probe.measure.chunks import MIB, accumulator, blocks
from probe.measure.variants import SUMS as AUDIT_SUMS
from probe.measure.variants import Variant

_OVER_LABELLED = ("cross_entropy", "correct", "top5", "entropy", "labelled", "squared_cross_entropy")
COLUMNS = (*_OVER_LABELLED, *CALIBRATION, "labels_outside", "nonfinite_rows")

WORK_MIB = 20.0
"""What scoring takes beside the logits, the labels and what it returns, unless a single row is larger."""

# exp(-104) is 0 in float32, so a logit this far below the largest adds nothing to any sum; -inf there would make 0 * -inf.
_FLOOR = -200.0
# Two blocks in float32, and a copy of the block where the strides of the logits do not allow a view of it.
_BUFFERS = 2
# A row takes some 400 bytes beside its logits: few enough in a chunk that they stay below 4 MiB.
_MOST_ROWS = 8192


@dataclass(frozen=True, slots=True)
class Logits:
    """What a model's class does to the logits behind its head: ``softcap * tanh(x * factor / softcap)``; ``None`` for no softcap."""

    factor: float = 1.0
    softcap: float | None = None

    def change_(self, x: Tensor) -> Tensor:
        """Change float32 logits in place."""
        if self.factor != 1.0:
            x.mul_(self.factor)
        return x if self.softcap is None else x.div_(self.softcap).tanh_().mul_(self.softcap)


UNCHANGED = Logits()


@dataclass(frozen=True, slots=True)
class HeadScore:
    """What one head scored in one call.

    Attributes:
        sums: ``COLUMNS`` as a float64 tensor (float32 on MPS) on the device of the logits. Over the labelled positions: cross-entropy
            (its square, too) and entropy in nats, positions whose argmax is the label, positions with fewer than five logits strictly
            above the label's, and their number; ``CALIBRATION`` as in :mod:`probe.measure.calibration`. ``labels_outside`` counts labels
            that are neither ``ignore_index`` nor a row of the vocabulary. ``nonfinite_rows`` counts labelled positions whose
            cross-entropy is not finite (NaN or +Inf among the logits, or the label's own logit is -Inf); they are in no other column.
        audit: For the labels as meant and each other way to lay them, :data:`probe.measure.variants.SUMS` as a tensor like ``sums``.
            ``uniform`` is +Inf where a logit is -Inf.
        predictions: int64 (``keep``,): argmax over V of the first rows, labelled or not.
    """

    sums: Tensor
    audit: Mapping[Variant, Tensor]
    predictions: Tensor


def score(
    logits: Tensor,
    labels: Tensor,
    *,
    others: Mapping[Variant, Tensor] | None = None,
    change: Logits = UNCHANGED,
    ignore_index: int = -100,
    keep: int = 0,
    histogram: Tensor | None = None,
    work_mib: float = WORK_MIB,
) -> HeadScore:
    """Score logits against labels that already lie over them (see ``probe.sites.labels``).

    Works in float32 whatever the dtype of the logits, a block of rows at a time; never copies the whole of them, contiguous or not. The
    peak of extra memory stays below ``work_mib`` plus 4 MiB (or what one row takes: 12 bytes a logit, 16 for float64), whatever
    the vocabulary and the number of rows, plus 8 bytes for each prediction that is kept. No sync, no gather outside the vocabulary.
    ``-inf`` logits of suppressed tokens are legitimate.

    Args:
        logits: Shape (..., V), any float dtype.
        labels: Integers, shape (...), on any device (moved without waiting).
        others: The labels laid in other ways, of the same shape, for the loss audit.
        change: What the model does to these logits before its loss.
        ignore_index: Label of positions where nothing is predicted.
        keep: How many rows' predictions to return, from the first (in row-major order).
        histogram: int32 (V,): the predictions at labelled positions are counted into it.
        work_mib: Bound of the working memory, in MiB.

    Raises:
        ProbeValueError: if the shapes do not match or V is 0.
    """
    if logits.dim() == 0 or logits.shape[-1] == 0 or logits.shape[:-1] != labels.shape:
        raise ProbeValueError(
            f"logits of shape {tuple(logits.shape)} and labels of shape {tuple(labels.shape)}: expected (..., V) and (...), V > 0"
        )
    logits, vocabulary, rows = logits.detach(), logits.shape[-1], labels.numel()
    laid = {"meant": labels, **(others or {})}
    limit = _rows_per_chunk(vocabulary, logits.itemsize, rows, work_mib)
    sums = torch.zeros(len(COLUMNS), dtype=accumulator(logits.device), device=logits.device)
    audit = sums.new_zeros(len(laid), len(AUDIT_SUMS))
    predictions_N = torch.empty(min(keep, rows), dtype=torch.int64, device=logits.device)
    buffers = torch.empty((_BUFFERS, limit, vocabulary), dtype=torch.float32, device=logits.device)
    cut = [blocks(way.detach().unsqueeze(-1), limit) for way in laid.values()]
    for (start, block_CV), *labels_C1 in zip(blocks(logits, limit), *cut):
        labels_LC = torch.stack([part.squeeze(-1).to(logits.device, torch.int64, non_blocking=True) for _, part in labels_C1])
        one = _score_block(block_CV, labels_LC, ignore_index, change, buffers[:, : block_CV.shape[0]])
        sums += one.sums
        audit += one.audit
        if start < len(predictions_N):
            predictions_N[start : start + len(one.predictions_C)] = one.predictions_C[: len(predictions_N) - start]
        if histogram is not None:
            histogram.scatter_add_(0, one.predictions_C, one.scored_C.to(histogram.dtype))
    return HeadScore(sums=sums, audit=dict(zip(laid, audit)), predictions=predictions_N)


def split_codebooks(logits: Tensor, codebooks: int) -> Tensor:
    """Return (..., K*V) as a view of shape (..., K, V).

    Raises:
        ProbeValueError: if the last dimension does not divide by ``codebooks``, or ``codebooks`` is below 1.
    """
    if codebooks < 1 or logits.dim() == 0 or logits.shape[-1] % codebooks:
        raise ProbeValueError(f"logits of shape {tuple(logits.shape)} do not split into {codebooks} codebooks along the last dimension")
    return torch.unflatten(logits, -1, (codebooks, logits.shape[-1] // codebooks))


@dataclass(frozen=True, slots=True)
class _Block:
    """One block's ``COLUMNS`` (…,) and audit sums (L, …), its predictions, and which rows were scored."""

    sums: Tensor
    audit: Tensor
    predictions_C: Tensor
    scored_C: Tensor


def _score_block(block_CV: Tensor, labels_LC: Tensor, ignore_index: int, change: Logits, buffers_2CV: Tensor) -> _Block:
    """Score one block; the buffers, float32 of the block's shape, are overwritten.

    Source: with z = x - max(x), s = sum(exp z): cross-entropy = log s - z[label]; entropy = log s - sum(z exp z) / s; the mean over the
    vocabulary of -log p = log s - mean(z).
    """
    z_CV, exp_CV = buffers_2CV.unbind()
    largest_C1, predictions_C1 = block_CV.max(-1, keepdim=True)
    predictions_C = predictions_C1.squeeze(-1)
    labelled_LC = labels_LC != ignore_index
    inside_LC = (labels_LC >= 0) & (labels_LC < block_CV.shape[-1])
    counted_LC = inside_LC & labelled_LC
    label_logits_CL = block_CV.gather(1, torch.where(counted_LC, labels_LC, 0).T)
    # Comparing in the logits' own dtype keeps ties ties; 0 and 1 land in float32, exact up to 2**24 tokens.
    larger_C = torch.gt(block_CV, label_logits_CL[:, :1], out=z_CV).sum(-1)

    largest_C1 = change.change_(largest_C1.float())
    change.change_(z_CV.copy_(block_CV)).sub_(largest_C1)
    mean_C = z_CV.mean(-1)
    z_CV.clamp_(min=_FLOOR)
    sum_C = torch.exp(z_CV, out=exp_CV).sum(-1)
    log_C = sum_C.log()
    cross_entropy_LC = log_C - (change.change_(label_logits_CL.float()) - largest_C1).T
    entropy_C = log_C - z_CV.mul_(exp_CV).sum(-1) / sum_C

    scored_LC = counted_LC & cross_entropy_LC.isfinite()
    audit_L3C = torch.stack([torch.ones_like(cross_entropy_LC), cross_entropy_LC, (log_C - mean_C).expand_as(cross_entropy_LC)], 1)
    wide = accumulator(block_CV.device)
    audit_L3 = torch.where(scored_LC.unsqueeze(1), audit_L3C, 0.0).sum(-1, dtype=wide)
    meant_C, scored_C, loss_C = labels_LC[0], scored_LC[0], cross_entropy_LC[0]
    correct_C = predictions_C == meant_C
    columns_6C = torch.stack([loss_C, correct_C, larger_C < 5, entropy_C, torch.ones_like(entropy_C), loss_C.square()])
    over_labelled_6 = torch.where(scored_C, columns_6C, 0.0).sum(-1, dtype=wide)
    in_bins = calibration(1 / sum_C, correct_C, scored_C)
    outside = (~inside_LC[0] & labelled_LC[0]).sum(dtype=wide)
    nonfinite = (counted_LC[0] & ~scored_C).sum(dtype=wide)
    return _Block(torch.cat([over_labelled_6, in_bins, torch.stack([outside, nonfinite])]), audit_L3, predictions_C, scored_C)


def _rows_per_chunk(vocabulary: int, itemsize: int, rows: int, work_mib: float) -> int:
    """Return how many rows of logits, in float32 twice and perhaps copied, the working memory holds; at least 1."""
    fitting = int(work_mib * MIB // (vocabulary * (4 * _BUFFERS + itemsize)))
    return max(1, min(fitting, _MOST_ROWS, rows))
