"""Scores of an LM head against its labels: cross-entropy, accuracy, top 5 and entropy, in chunks of rows."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from probe.errors import ProbeValueError
from probe.measure.chunks import CHUNK_MIB, accumulator, blocks, per_chunk

COLUMNS = ("cross_entropy", "correct", "top5", "entropy", "labelled", "labels_outside", "nonfinite_rows")

# exp(-104) is 0 in float32, so a logit this far below the largest adds nothing to any sum; -inf there would make 0 * -inf.
_FLOOR = -200.0
# A row costs some 30 bytes besides its logits: with a tiny vocabulary they would outgrow the chunk.
_LEAST_WIDTH = 32


@dataclass(frozen=True, slots=True)
class HeadScore:
    """What one head scored in one call.

    Attributes:
        sums: ``COLUMNS`` as a float64 tensor of shape (7,) on the device of the logits (float32 on MPS). The first five are over the
            labelled positions: cross-entropy and entropy in nats, positions whose argmax is the label, positions with fewer than five
            logits strictly above the label's, and their number. ``labels_outside`` counts labels that are neither ``ignore_index``
            nor a row of the vocabulary. ``nonfinite_rows`` counts labelled positions whose cross-entropy is not finite (NaN or +Inf
            among the logits, or the label's own logit is -Inf); they are in no other column.
        predictions: int64, the leading shape of the logits: argmax over V at every position, labelled or not.
    """

    sums: Tensor
    predictions: Tensor


def score(logits: Tensor, labels: Tensor, *, ignore_index: int = -100, chunk_mib: float = CHUNK_MIB) -> HeadScore:
    """Score logits against labels that already lie over them (see ``probe.sites.labels``).

    Works in float32 whatever the dtype of the logits, a block of rows at a time; never copies the whole of them, contiguous or not.
    Beyond the results the peak of extra memory stays below four times ``chunk_mib`` (or four rows, if one row is larger). No sync, no
    gather outside the vocabulary. ``-inf`` logits of suppressed tokens are legitimate.

    Args:
        logits: Shape (..., V), any float dtype.
        labels: Integers, shape (...), on any device (moved without waiting).
        ignore_index: Label of positions where nothing is predicted.
        chunk_mib: Size of one block of rows in float32, in MiB.

    Raises:
        ProbeValueError: if the shapes do not match or V is 0.
    """
    if logits.dim() == 0 or logits.shape[-1] == 0 or logits.shape[:-1] != labels.shape:
        raise ProbeValueError(
            f"logits of shape {tuple(logits.shape)} and labels of shape {tuple(labels.shape)}: expected (..., V) and (...), V > 0"
        )
    logits, vocabulary = logits.detach(), logits.shape[-1]
    labels_N = labels.detach().to(logits.device, torch.int64, non_blocking=True).reshape(-1)
    rows = labels_N.numel()
    sums = torch.zeros(len(COLUMNS), dtype=accumulator(logits.device), device=logits.device)
    predictions_N = torch.empty(rows, dtype=torch.int64, device=logits.device)
    limit = min(per_chunk(4 * max(vocabulary, _LEAST_WIDTH), chunk_mib), max(rows, 1))
    work_NV, spare_NV = torch.empty((2, limit, vocabulary), dtype=torch.float32, device=logits.device).unbind()
    for start, block_NV in blocks(logits, limit):
        stop = start + block_NV.shape[0]
        part, predictions_N[start:stop] = _score_block(
            block_NV, labels_N[start:stop], ignore_index, (work_NV[: stop - start], spare_NV[: stop - start])
        )
        sums += part
    return HeadScore(sums=sums, predictions=predictions_N.view(logits.shape[:-1]))


def split_codebooks(logits: Tensor, codebooks: int) -> Tensor:
    """Return (..., K*V) as a view of shape (..., K, V).

    Raises:
        ProbeValueError: if the last dimension does not divide by ``codebooks``, or ``codebooks`` is below 1.
    """
    if codebooks < 1 or logits.dim() == 0 or logits.shape[-1] % codebooks:
        raise ProbeValueError(f"logits of shape {tuple(logits.shape)} do not split into {codebooks} codebooks along the last dimension")
    return torch.unflatten(logits, -1, (codebooks, logits.shape[-1] // codebooks))


def _score_block(block_NV: Tensor, labels_N: Tensor, ignore_index: int, buffers: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Return the columns of one block, and its predictions; both buffers, float32 of the block's shape, are overwritten.

    Source: with z = x - max(x), s = sum(exp z): cross-entropy = log s - z[label]; entropy = log s - sum(z exp z) / s.
    """
    z_NV, exp_NV = buffers
    largest_N1, predictions_N1 = block_NV.max(-1, keepdim=True)
    ignored_N = labels_N == ignore_index
    inside_N = (labels_N >= 0) & (labels_N < block_NV.shape[-1])
    counted_N = inside_N & ~ignored_N
    label_logit_N1 = block_NV.gather(1, torch.where(counted_N, labels_N, 0).unsqueeze(-1))
    # Comparing in the logits' own dtype keeps ties ties; 0 and 1 land in float32, exact up to 2**24 tokens.
    larger_N = torch.gt(block_NV, label_logit_N1, out=z_NV).sum(-1)

    largest_N1 = largest_N1.float()
    z_NV.copy_(block_NV).sub_(largest_N1).clamp_(min=_FLOOR)
    sum_N = torch.exp(z_NV, out=exp_NV).sum(-1)
    log_N = sum_N.log()
    cross_entropy_N = log_N - (label_logit_N1.float() - largest_N1).squeeze(-1)
    entropy_N = log_N - z_NV.mul_(exp_NV).sum(-1) / sum_N

    predictions_N = predictions_N1.squeeze(-1)
    finite_N = cross_entropy_N.isfinite()
    scored = torch.stack([cross_entropy_N, predictions_N == labels_N, larger_N < 5, entropy_N, torch.ones_like(entropy_N)])
    scored = torch.where(counted_N & finite_N, scored, 0.0)
    tally = torch.stack([~inside_N & ~ignored_N, counted_N & ~finite_N])
    wide = accumulator(block_NV.device)
    return torch.cat([scored.sum(-1, dtype=wide), tally.sum(-1, dtype=wide)]), predictions_N
