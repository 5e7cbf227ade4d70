"""Laying labels over the full rows of logits: the shift that the model's class means, the slips that a loss might make, kept positions.

Shapes: B batch, S tokens, K codebooks.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from probe.measure.variants import Variant

IGNORED = -100
LOGITS_TO_KEEP = ("logits_to_keep", "num_logits_to_keep")


@dataclass(frozen=True, slots=True)
class Aligned:
    """Labels that lie over logits, one for each row.

    Attributes:
        labels: int64 on the logits' device, (..., ) or (..., K) for an audio head; -100 where nothing is to be predicted.
        logits: A view of the head's logits, (..., V) or (..., K, V) for an audio head with K codebooks, every row of it. It keeps the
            whole of the logits alive.
        how: How they were laid over each other, for the record ("shifted by one", "not shifted", ...).
        others: The same labels as a slip would lay them, each of the shape of ``labels``; those that make no sense here are absent.
    """

    labels: Tensor
    logits: Tensor
    how: str
    others: Mapping[Variant, Tensor] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Kept:
    """Which positions the logits are of: all (``rows`` is ``None``), the last ``rows``, or those that an index tensor names."""

    rows: int | Tensor | None = None

    @property
    def how(self) -> str:
        """What the record says of it, "" for all positions."""
        if self.rows is None:
            return ""
        return f"the last {self.rows}, " if isinstance(self.rows, int) else f"{self.rows.numel()} chosen positions, "

    def of(self, tensor: Tensor, positions: int) -> Tensor:
        """Return these positions of a tensor (a view unless they are chosen by an index)."""
        if self.rows is None:
            return tensor
        total = tensor.shape[positions]
        if isinstance(self.rows, int):
            return tensor.narrow(positions, total - self.rows, self.rows)
        index = self.rows.to(tensor.device, torch.int64, non_blocking=True)
        return tensor.index_select(positions, torch.where(index < 0, index + total, index))


def asked_to_keep(inputs: Mapping[str, Any]) -> tuple[str, Any] | None:
    """Return the argument by which a model is asked for the logits of some positions only, with its name; ``None`` without one."""
    return next(((name, inputs[name]) for name in LOGITS_TO_KEEP if inputs.get(name) is not None), None)


def kept_positions(labels: Tensor, rows: torch.Size, inputs: Mapping[str, Any], *, positions: int) -> Kept | None:
    """Say which positions of the labels the logits are of; ``None`` if labels and logits do not lie over each other.

    Args:
        labels: Any shape.
        rows: Shape of the logits without the vocabulary.
        inputs: The model's, where ``logits_to_keep`` may be.
        positions: The dimension of the labels that counts positions.
    """
    if labels.shape == rows:
        return Kept()
    if len(rows) != labels.dim():
        return None
    keep, total = rows[positions], labels.shape[positions]
    asked = asked_to_keep(inputs)
    if asked is None or _without(labels.shape, positions) != _without(rows, positions):
        return None
    if isinstance(asked[1], Tensor):
        return Kept(asked[1]) if is_index(asked[1]) and asked[1].numel() == keep else None
    return Kept(keep) if asked[1] == keep <= total else None


def is_index(value: Tensor) -> bool:
    """Say whether a tensor names positions by their numbers (a mask does not: how many it names, only the device knows)."""
    return value.dim() == 1 and not value.is_floating_point() and not value.is_complex() and value.dtype != torch.bool


def lay(
    labels: Tensor, *, logits: Tensor, shift: int, kept: Kept, padding: Tensor | None = None, how: str = "", positions: int = -1
) -> Aligned:
    """Lay over each row of the logits the label ``shift`` positions later, and the same as slips would.

    Costs 8 bytes a label, with ``padding`` 16 and while that is made 24. No sync.

    Args:
        labels: int64, of all positions of the sequence.
        logits: (..., V), of the kept positions.
        shift: How the model's class means it.
        kept: Which positions those are.
        padding: bool, True where a label belongs to a position of padding; lays the variant ``padding_out``.
        how: What to say before the shift.
        positions: The dimension of the labels that counts positions.
    """
    total = labels.shape[positions]
    wide = _between_ignored(labels, 1, shift + 1, positions)

    def shifted(source: Tensor, by: int) -> Tensor:
        return kept.of(source.narrow(positions, 1 + by, total), positions)

    others: dict[Variant, Tensor] = {"shift_more": shifted(wide, shift + 1)}
    if shift >= 1:
        others["shift_less"] = shifted(wide, shift - 1)
    if padding is not None:
        others["padding_out"] = shifted(_between_ignored(labels.masked_fill(padding, IGNORED), 1, shift + 1, positions), shift)
    said = f"shifted by {'one' if shift == 1 else shift}" if shift else "not shifted"
    return Aligned(shifted(wide, shift), logits, f"{how}{kept.how}{said}", others)


def lay_shifted(labels: Tensor, *, logits: Tensor, padding: Tensor | None, how: str) -> Aligned:
    """Take labels (B, S) that were shifted by one before they came; a position of padding is that of the label, one later.

    ``shift_less`` lacks the first label of each row, which the shift has dropped.
    """
    total = labels.shape[-1]
    wide = _between_ignored(labels, 1, 1, -1)
    others: dict[Variant, Tensor] = {"shift_more": wide.narrow(-1, 2, total), "shift_less": wide.narrow(-1, 0, total)}
    if padding is not None:
        later = torch.cat([padding[..., 1:], padding.new_zeros(*padding.shape[:-1], 1)], -1)
        others["padding_out"] = labels.masked_fill(later, IGNORED)
    return Aligned(wide.narrow(-1, 1, total), logits, how, others)


def padding_of(labels_BS: Tensor, mask: Any, *, pad: int | None, ends_with_pad: bool) -> Tensor | None:
    """Return (B, S) bool, True where a label belongs to padding, or ``None`` if that cannot be told.

    Padding is what the mask hides; without a mask of that shape, the run of ``pad`` that ends a row (before labels of -100), less its
    first where padding is also what ends a text. No sync.
    """
    if isinstance(mask, Tensor) and mask.shape == labels_BS.shape:
        return mask.to(labels_BS.device, non_blocking=True) == 0
    if pad is None or labels_BS.dim() != 2:
        return None
    tail_BS = (labels_BS == pad) | (labels_BS == IGNORED)
    run_BS = tail_BS.flip(-1).to(torch.int8).cumprod(-1, dtype=torch.int8).flip(-1) != 0
    if not ends_with_pad:
        return run_BS
    before_BS = torch.cat([run_BS.new_zeros(run_BS.shape[0], 1), run_BS[:, :-1]], -1)
    return run_BS & before_BS


def _without(shape: torch.Size, dimension: int) -> list[int]:
    sizes = list(shape)
    del sizes[dimension]
    return sizes


def _between_ignored(labels: Tensor, before: int, after: int, positions: int) -> Tensor:
    """Copy labels between so many positions without a label."""
    shape, total = list(labels.shape), labels.shape[positions]
    shape[positions] = before + total + after
    wide = labels.new_full(shape, IGNORED)
    wide.narrow(positions, before, total).copy_(labels)
    return wide
