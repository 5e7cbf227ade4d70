"""Text labels against token ids: where labels lie, which id they equal, and what opens every row alike.

Nothing waits for the device. Temporaries: a few tensors of the size of the labels.

Shapes: B batch, S tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

IGNORED = -100
COLUMNS = ("labelled", "on_padding", "padding_runs", "on_placeholders", "outside_vocabulary", "compared", "same", "next", "previous")


@dataclass(frozen=True, slots=True)
class Beside:
    """What labels are held against; ``None`` and empty where it is not known.

    Attributes:
        ids_BS: The token ids that the labels lie over.
        mask_BS: 0 where a token is padding.
        placeholders: Ids of ``ids_BS`` that stand for audio that is given to the model.
        padding: The id that pads.
        vocabulary: Ids from this one on do not exist.
    """

    ids_BS: Tensor | None = None
    mask_BS: Tensor | None = None
    placeholders: Sequence[int] = ()
    padding: int | None = None
    vocabulary: int | None = None


def check_labels(labels_BS: Tensor, beside: Beside) -> Tensor:
    """Count label positions.

    Args:
        labels_BS: int64, -100 where nothing is to be predicted.
        beside: What they are held against, on the same device.

    Returns:
        float64, one number for each of ``COLUMNS``, 0 where what it takes is not known. ``next`` and ``previous`` of the first and the
        last position are ids that are not there, which equal no label.
    """
    on = labels_BS != IGNORED
    zero = torch.zeros((), dtype=torch.int64, device=labels_BS.device)
    counts = dict.fromkeys(COLUMNS, zero)
    counts["labelled"] = on.sum()
    if beside.mask_BS is not None:
        counts["on_padding"] = (on & (beside.mask_BS == 0)).sum()
    if beside.padding is not None:
        pad_BS = labels_BS == beside.padding
        counts["padding_runs"] = (pad_BS[:, 1:] & pad_BS[:, :-1]).sum()
    if beside.vocabulary is not None:
        counts["outside_vocabulary"] = (on & ((labels_BS < 0) | (labels_BS >= beside.vocabulary))).sum()
    if beside.ids_BS is not None:
        ids_BS = beside.ids_BS
        for token in beside.placeholders:
            counts["on_placeholders"] = counts["on_placeholders"] + (on & (ids_BS == token)).sum()
        equal = {"same": ids_BS == labels_BS, "next": ids_BS[:, 1:] == labels_BS[:, :-1], "previous": ids_BS[:, :-1] == labels_BS[:, 1:]}
        over = {"same": on, "next": on[:, :-1], "previous": on[:, 1:]}
        counts.update({which: (equal[which] & over[which]).sum() for which in equal})
        counts["compared"] = counts["labelled"]
    return torch.stack([counts[name] for name in COLUMNS]).double()


def common_prefix(labels_BS: Tensor) -> Tensor:
    """Return how many labelled tokens open every row alike: 0-dim float64, -1 where that says nothing.

    A row begins at its first label and goes on to its first -100 after that; rows without labels do not count. It says nothing of fewer
    than two rows, or if all are equal throughout.
    """
    rows, width = labels_BS.shape
    nothing = torch.full((), -1.0, dtype=torch.float64, device=labels_BS.device)
    if rows < 2 or width == 0:
        return nothing
    on_BS = labels_BS != IGNORED
    has_B = on_BS.any(1)
    at_BS = on_BS.int().argmax(1, keepdim=True) + torch.arange(width, device=labels_BS.device)
    begun_BS = labels_BS.gather(1, at_BS.clamp(max=width - 1)).masked_fill(at_BS >= width, IGNORED)
    first_1S = begun_BS.index_select(0, has_B.int().argmax(0, keepdim=True))
    alike_BS = (begun_BS == first_1S) | ~has_B[:, None]
    prefix = (alike_BS & (first_1S != IGNORED)).all(0).int().cumprod(0).sum()
    tells = (has_B.sum() > 1) & ~alike_BS.all()
    return torch.where(tells, prefix.double(), nothing)
