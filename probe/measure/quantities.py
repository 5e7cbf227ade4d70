"""What is said of attention rows, by name, and the sums that add up over calls, micro-batches and ranks.

Shapes: L attention calls, B batch, R sampled rows a sample, H heads, Q quantities, C columns; h is H, or 1 where only the mean over heads
is known.
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
    """Weighted sums over the rows of each of some attention calls, on the device.

    Attributes:
        sums_LC: float64, one value for each of ``COLUMNS``, means over heads.
        per_head_LQH: float64, for ``QUANTITIES``: numerators whose weights are those in ``sums_LC``.
        headwise: The quantities that ``per_head_LQH`` holds; the others of it are 0 and mean nothing.
    """

    sums_LC: Tensor
    per_head_LQH: Tensor
    headwise: tuple[str, ...]


def add_up(values_BRhQ: Tensor, weight_BRQ: Tensor) -> Tensor:
    """Return the weighted sums over samples and rows, (h, Q); a value whose weight is 0 may be anything, also not finite."""
    weight_BR1Q = weight_BRQ[:, :, None]
    return (torch.where(weight_BR1Q > 0, values_BRhQ, 0.0) * weight_BR1Q).sum((0, 1))


def sums_of(sampled: Tensor, numerators: Mapping[tuple[str, ...], Tensor], weights_Q: Tensor, *, calls: int = 1) -> AttentionSums:
    """Put together what :func:`add_up` returned for ``SHAPE``, ``MASSES`` and, unless they were left out, ``WALKS``.

    Args:
        sampled: Number of rows looked at, 0-dim.
        numerators: (L * h, Q) of each part of ``QUANTITIES``, in their order, call after call; with a single head, it is the mean over
            heads.
        weights_Q: The sums of the weights, of all of these parts; the same for all calls.
        calls: L.
    """
    parts = {names: values.view(calls, -1, len(names)) for names, values in numerators.items()}
    heads = max(values_LhQ.shape[1] for values_LhQ in parts.values())
    headwise = tuple(name for names, values_LhQ in parts.items() if values_LhQ.shape[1] == heads for name in names)
    missing_Q = sampled.new_zeros(len(QUANTITIES) - sum(map(len, numerators)))
    missing_LQ = missing_Q.expand(calls, -1)
    means = [values_LhQ.mean(1) for values_LhQ in parts.values()]
    weights = [part.expand(calls, -1) for part in (weights_Q, missing_Q)]
    each = [values if values.shape[1] == heads else torch.zeros_like(values).expand(-1, heads, -1) for values in parts.values()]
    per_head_LHQ = torch.cat([*each, missing_LQ[:, None].expand(-1, heads, -1)], 2)
    sums_LC = torch.cat((sampled.expand(calls, 1), *means, missing_LQ, *weights), 1)
    return AttentionSums(sums_LC, per_head_LHQ.transpose(1, 2).contiguous(), headwise)
