"""What one row of an LM head's logits says, in as few passes over the vocabulary as it takes: argmax, sums, the labels' own logits.

Shapes: V vocabulary, C rows of one chunk, N rows that are gathered, L ways to lay the labels, W columns of one stripe.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

# exp(-104) is 0 in float32, so a logit this far below the largest adds nothing to any sum; -inf there would make 0 * -inf.
_FLOOR = -200.0
# Stripes of a row in which the CPU looks for its maximum: its argmax of a whole row takes eight times as long as amax.
_STRIPE = 256
_LARGER, _MEAN, _SUM, _WEIGHTED, _LARGEST, _LABELS = range(6)


@dataclass(frozen=True, slots=True)
class Logits:
    """What a model's class does to the logits behind its head: ``softcap * tanh(x * factor / softcap)``; ``None`` for no softcap."""

    factor: float = 1.0
    softcap: float | None = None

    @property
    def changes(self) -> bool:
        """Whether it does anything."""
        return self.factor != 1.0 or self.softcap is not None

    def change_(self, x: Tensor) -> Tensor:
        """Change float32 logits in place."""
        if self.factor != 1.0:
            x.mul_(self.factor)
        return x if self.softcap is None else x.div_(self.softcap).tanh_().mul_(self.softcap)


UNCHANGED = Logits()


class Rows:
    """Row values, gathered over chunks until there are as many as it holds.

    With z = x - max(x), of the logits x as the loss gets them:

    Attributes:
        filled: Rows gathered so far.
        labels_LN: int64.
        predictions_N: int64, the argmax (the first of equals).
        values: float32 (5 + L, N), see the properties.
    """

    def __init__(self, capacity: int, ways: int, *, device: torch.device) -> None:
        """Hold ``capacity`` rows with ``ways`` labels each: 8 (1 + L) + 4 (5 + L) bytes a row."""
        self.filled = 0
        self.labels_LN = torch.empty((ways, capacity), dtype=torch.int64, device=device)
        self.predictions_N = torch.empty(capacity, dtype=torch.int64, device=device)
        self.values = torch.empty((_LABELS + ways, capacity), dtype=torch.float32, device=device)

    @property
    def larger(self) -> Tensor:
        """How many logits, (N,), are strictly above the label's (of the first way)."""
        return self.values[_LARGER, : self.filled]

    @property
    def mean(self) -> Tensor:
        """Mean of z, (N,); -inf where a logit is."""
        return self.values[_MEAN, : self.filled]

    @property
    def sum(self) -> Tensor:
        """Sum of exp z, (N,)."""
        return self.values[_SUM, : self.filled]

    @property
    def weighted(self) -> Tensor:
        """Sum of z exp z, (N,)."""
        return self.values[_WEIGHTED, : self.filled]

    @property
    def labels_z(self) -> Tensor:
        """The labels' own z, (L, N), what it is of labels that are no row of the vocabulary being of no meaning."""
        return self.values[_LABELS:, : self.filled] - self.values[_LARGEST, : self.filled]

    def fits(self, rows: int) -> bool:
        """Tell whether as many rows more find room."""
        return self.filled + rows <= self.predictions_N.shape[0]

    def read(self, block_CV: Tensor, labels_LC: Tensor, change: Logits, buffers_2CV: Tensor) -> slice:
        """Go over a block of logits, and return where its rows stand. The buffers, float32 of the block's shape, are overwritten.

        Passes over (C, V): the maximum, the comparison and its sum, z, its mean, the floor, exp, its sum, the product and its sum.
        """
        here = slice(self.filled, self.filled + block_CV.shape[0])
        self.filled = here.stop
        values, (z_CV, exp_CV) = self.values[:, here], buffers_2CV.unbind()
        self.labels_LN[:, here] = labels_LC
        largest_C1, predictions_C = _argmax(block_CV)
        self.predictions_N[here] = predictions_C
        label_logits_CL = block_CV.gather(1, labels_LC.clamp(0, block_CV.shape[-1] - 1).T)
        # Comparing in the logits' own dtype keeps ties ties; 0 and 1 land in float32, exact up to 2**24 tokens.
        torch.sum(torch.gt(block_CV, label_logits_CL[:, :1], out=z_CV), -1, out=values[_LARGER])
        largest_C1 = largest_C1.float()
        if change.changes:
            change.change_(largest_C1)
            change.change_(z_CV.copy_(block_CV)).sub_(largest_C1)
            values[_LABELS:] = change.change_(label_logits_CL.float()).T
        else:
            torch.sub(block_CV, largest_C1, out=z_CV)
            values[_LABELS:] = label_logits_CL.T
        values[_LARGEST] = largest_C1.squeeze(1)
        torch.mean(z_CV, -1, out=values[_MEAN])
        z_CV.clamp_(min=_FLOOR)
        torch.sum(torch.exp(z_CV, out=exp_CV), -1, out=values[_SUM])
        torch.sum(z_CV.mul_(exp_CV), -1, out=values[_WEIGHTED])
        return here


def _argmax(block_CV: Tensor) -> tuple[Tensor, Tensor]:
    """Return the largest logit (C, 1) and the place of the first of that size (C,); NaN counts as largest."""
    rows, vocabulary = block_CV.shape
    if block_CV.device.type != "cpu" or vocabulary < 4 * _STRIPE or block_CV.stride(1) != 1:
        largest_C1, place_C1 = block_CV.max(-1, keepdim=True)
        return largest_C1, place_C1.squeeze(1)
    whole = vocabulary // _STRIPE
    stripes_CSW = block_CV.as_strided((rows, whole, _STRIPE), (block_CV.stride(0), _STRIPE, 1), block_CV.storage_offset())
    peaks = [stripes_CSW.amax(-1)]
    if vocabulary % _STRIPE:
        peaks.append(block_CV[:, whole * _STRIPE :].amax(-1, keepdim=True))
    largest_C1, stripe_C1 = torch.cat(peaks, 1).max(-1, keepdim=True)
    # The last stripe begins before the end of the one before it, so that it is as wide as they are.
    begin_C1 = (stripe_C1 * _STRIPE).clamp(max=vocabulary - _STRIPE)
    inside_CW = block_CV.gather(1, begin_C1 + torch.arange(_STRIPE, device=block_CV.device))
    return largest_C1, (inside_CW.argmax(-1, keepdim=True) + begin_C1).squeeze(1)
