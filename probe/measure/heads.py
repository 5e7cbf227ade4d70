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
from probe.measure.head_rows import UNCHANGED, Logits, Rows
from probe.measure.variants import SUMS as AUDIT_SUMS
from probe.measure.variants import Variant

__all__ = ["COLUMNS", "UNCHANGED", "WORK_MIB", "HeadScore", "Logits", "score", "split_codebooks"]

_OVER_LABELLED = ("cross_entropy", "correct", "top5", "entropy", "labelled", "squared_cross_entropy")
COLUMNS = (*_OVER_LABELLED, *CALIBRATION, "labels_outside", "nonfinite_rows")

WORK_MIB = 20.0
"""What scoring takes beside the logits, the labels and what it returns, unless a single row is larger."""

# Two blocks in float32, and a copy of the block where the strides of the logits do not allow a view of it.
_BUFFERS = 2
# A row takes some 400 bytes beside its logits: few enough are gathered that they stay below 4 MiB.
_MOST_ROWS = 8192


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
    gathered = Rows(min(rows, _MOST_ROWS), len(laid), device=logits.device)

    def add_up() -> None:
        _add_up(gathered, sums, audit, vocabulary=vocabulary, ignore_index=ignore_index, histogram=histogram)

    with torch.no_grad():
        for (start, block_CV), *labels_C1 in zip(blocks(logits, limit), *cut):
            if not gathered.fits(len(block_CV)):
                add_up()
            labels_LC = torch.stack([part.squeeze(-1).to(logits.device, torch.int64, non_blocking=True) for _, part in labels_C1])
            here = gathered.read(block_CV, labels_LC, change, buffers[:, : len(block_CV)])
            if start < len(predictions_N):
                predictions_N[start : start + len(block_CV)] = gathered.predictions_N[here][: len(predictions_N) - start]
        if rows:
            add_up()
    return HeadScore(sums=sums, audit=dict(zip(laid, audit)), predictions=predictions_N)


def split_codebooks(logits: Tensor, codebooks: int) -> Tensor:
    """Return (..., K*V) as a view of shape (..., K, V).

    Raises:
        ProbeValueError: if the last dimension does not divide by ``codebooks``, or ``codebooks`` is below 1.
    """
    if codebooks < 1 or logits.dim() == 0 or logits.shape[-1] % codebooks:
        raise ProbeValueError(f"logits of shape {tuple(logits.shape)} do not split into {codebooks} codebooks along the last dimension")
    return torch.unflatten(logits, -1, (codebooks, logits.shape[-1] // codebooks))


def _add_up(rows: Rows, sums: Tensor, audit: Tensor, *, vocabulary: int, ignore_index: int, histogram: Tensor | None) -> None:
    """Add the gathered rows to ``COLUMNS`` (…,), to the audit's sums (L, …) and to the histogram, and let go of them.

    Source: with z = x - max(x), s = sum(exp z): cross-entropy = log s - z[label]; entropy = log s - sum(z exp z) / s; the mean over the
    vocabulary of -log p = log s - mean(z).
    """
    labels_LN, predictions_N = rows.labels_LN[:, : rows.filled], rows.predictions_N[: rows.filled]
    labelled_LN = labels_LN != ignore_index
    inside_LN = (labels_LN >= 0) & (labels_LN < vocabulary)
    counted_LN = inside_LN & labelled_LN
    sum_N = rows.sum
    log_N = sum_N.log()
    cross_entropy_LN = log_N - rows.labels_z
    entropy_N = log_N - rows.weighted / sum_N

    scored_LN = counted_LN & cross_entropy_LN.isfinite()
    audit_L3N = torch.stack([torch.ones_like(cross_entropy_LN), cross_entropy_LN, (log_N - rows.mean).expand_as(cross_entropy_LN)], 1)
    audit += torch.where(scored_LN.unsqueeze(1), audit_L3N, 0.0).sum(-1, dtype=audit.dtype)
    scored_N, loss_N = scored_LN[0], cross_entropy_LN[0]
    correct_N = predictions_N == labels_LN[0]
    columns_6N = torch.stack([loss_N, correct_N, rows.larger < 5, entropy_N, torch.ones_like(entropy_N), loss_N.square()])
    over_labelled_6 = torch.where(scored_N, columns_6N, 0.0).sum(-1, dtype=sums.dtype)
    in_bins = calibration(1 / sum_N, correct_N, scored_N)
    outside = torch.stack([~inside_LN[0] & labelled_LN[0], counted_LN[0] & ~scored_N]).sum(1, dtype=sums.dtype)
    sums += torch.cat([over_labelled_6, in_bins, outside])
    if histogram is not None:
        histogram.scatter_add_(0, predictions_N, scored_N.to(histogram.dtype))
    rows.filled = 0


def _rows_per_chunk(vocabulary: int, itemsize: int, rows: int, work_mib: float) -> int:
    """Return how many rows of logits, in float32 twice and perhaps copied, the working memory holds; at least 1."""
    fitting = int(work_mib * MIB // (vocabulary * (4 * _BUFFERS + itemsize)))
    return max(1, min(fitting, _MOST_ROWS, rows))
