"""What is said of attention rows, by name, and the sums that add up over calls, micro-batches and ranks.

Shapes: B batch, R sampled rows a sample, H heads, Q quantities; h is H, or 1 where only the mean over heads is known.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

#: Of one head's row, whatever the keys are.
SHAPE = ("entropy_nats", "entropy", "effective_keys", "top", "sink", "band", "distance")
#: Probability masses of one head's row on some of the keys.
MASSES = (
    "first_token",
    "padding",
    "text_to_text",
    "text_to_audio",
    "text_to_reference",
    "audio_to_text",
    "audio_to_audio",
    "audio_to_reference",
)
#: Of all text rows of a sample over its audio keys.
WALKS = ("monotonicity", "coverage")
QUANTITIES = (*SHAPE, *MASSES, *WALKS)


def weight_of(quantity: str) -> str:
    """Return the name of the column that a quantity's column is divided by."""
    return f"{quantity}_weight"


#: Columns of ``AttentionSums.sums``: rows looked at; each quantity times the weight of what it is of; those weights.
COLUMNS = ("sampled", *QUANTITIES, *map(weight_of, QUANTITIES))


@dataclass(frozen=True, slots=True)
class AttentionSums:
    """Weighted sums over the rows of one attention call, on the device.

    Attributes:
        sums: float64, one value for each of ``COLUMNS``, means over heads.
        per_head: float64 (Q, H), for ``QUANTITIES``: numerators whose weights are those in ``sums``.
        headwise: The quantities that ``per_head`` holds; its other rows are 0 and mean nothing.
    """

    sums: Tensor
    per_head: Tensor
    headwise: tuple[str, ...]


def add_up(values_BRhQ: Tensor, weight_BRQ: Tensor) -> Tensor:
    """Return the weighted sums over samples and rows, (h, Q); a value whose weight is 0 may be anything, also not finite."""
    weight_BR1Q = weight_BRQ[:, :, None]
    return (torch.where(weight_BR1Q > 0, values_BRhQ, 0.0) * weight_BR1Q).sum((0, 1))


def sums_of(sampled: Tensor, numerators: Mapping[tuple[str, ...], Tensor], weights_Q: Tensor) -> AttentionSums:
    """Put together what :func:`add_up` returned for ``SHAPE``, ``MASSES`` and, unless they were left out, ``WALKS``.

    Args:
        sampled: Number of rows looked at, 0-dim.
        numerators: (h, Q) of each part of ``QUANTITIES``, in their order; with a single head, it is the mean over heads.
        weights_Q: The sums of the weights, of all of these parts.
    """
    heads = max(values.shape[0] for values in numerators.values())
    headwise = tuple(name for names, values in numerators.items() if values.shape[0] == heads for name in names)
    missing = sampled.new_zeros(len(QUANTITIES) - sum(map(len, numerators)))
    means_Q = torch.cat([*(values.mean(0) for values in numerators.values()), missing])
    each_HQ = [values if values.shape[0] == heads else torch.zeros_like(values).expand(heads, -1) for values in numerators.values()]
    per_head_QH = torch.cat([values.T for values in each_HQ] + [missing[:, None].expand(-1, heads)])
    return AttentionSums(torch.cat((sampled[None], means_Q, weights_Q, missing)), per_head_QH, headwise)
