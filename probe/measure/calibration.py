"""How well a head's certainty fits its accuracy: rows, confidence and hits in bins of confidence, and the expected calibration error.

Shapes: C rows, M bins.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from probe.measure.chunks import accumulator

BINS = 15
"""Source: Guo et al. (2017), arXiv:1706.04599, section 4."""

_WHAT = ("bin_rows", "bin_confidence", "bin_correct")
CALIBRATION = tuple(f"{what}_{number}" for what in _WHAT for number in range(BINS))
"""In each bin ((m - 1) / 15, m / 15] of the largest probability: rows, the sum of those probabilities, rows whose argmax is the label."""


def calibration(confidence_C: Tensor, correct_C: Tensor, scored_C: Tensor) -> Tensor:
    """Return ``CALIBRATION`` as (45,) float64 (float32 on MPS).

    Compares with every bin, because counting into bins by number (``bincount``) waits for the device. No sync.

    Args:
        confidence_C: Largest probability of each row; NaN is in no bin.
        correct_C: bool.
        scored_C: bool: which rows count.
    """
    bins_M = torch.arange(BINS, device=confidence_C.device)
    bin_C1 = ((confidence_C * BINS).ceil() - 1).clamp(0, BINS - 1).unsqueeze(-1)
    member_CM = (bin_C1 == bins_M) & scored_C.unsqueeze(-1)
    wide = accumulator(confidence_C.device)
    rows_M = member_CM.sum(0, dtype=wide)
    sums_M = torch.where(member_CM, confidence_C.unsqueeze(-1), 0.0).sum(0, dtype=wide)
    return torch.cat([rows_M, sums_M, (member_CM & correct_C.unsqueeze(-1)).sum(0, dtype=wide)])


def expected_calibration_error(sums: Mapping[str, float]) -> float | None:
    """Return Σ |correct - confidence| over the bins ÷ rows, from combined columns on the host; ``None`` without a row.

    Source: Guo et al. (2017), arXiv:1706.04599, equation 3 (a bin's weight n_b / n takes its own n_b away).
    """
    rows = sum(sums[f"bin_rows_{number}"] for number in range(BINS))
    gaps = (abs(sums[f"bin_correct_{number}"] - sums[f"bin_confidence_{number}"]) for number in range(BINS))
    return sum(gaps) / rows if rows else None
