"""A fixed sample of the elements of many tensors: which elements, and how they are taken in one tensor operation.

Shapes: N tensors, R sampled elements.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from probe.measure.norms import real_view


@dataclass(frozen=True, slots=True)
class Spot:
    """The sampled elements of one tensor: ``count`` of them, ``stride`` apart in memory, from ``offset`` on."""

    count: int
    stride: int
    offset: int


def share_out(sizes: Sequence[int], most: int) -> list[int]:
    """Share ``most`` out evenly: nobody gets more than its size, and what one cannot use goes to the others."""
    shares, left = [0] * len(sizes), most
    order = sorted(range(len(sizes)), key=sizes.__getitem__)
    for rank, index in enumerate(order):
        shares[index] = min(sizes[index], left // (len(sizes) - rank))
        left -= shares[index]
    return shares


def choose_spots(sizes: Sequence[int], groups: Sequence[int], *, most: int) -> tuple[Spot, ...]:
    """Choose which elements of each tensor are sampled, at most ``most`` in all; the same for the same sizes.

    Each group gets the same number, and within a group each tensor, as far as they have as many elements. A tensor that is not taken
    whole is gone through at a stride that has no divisor in common with its size, so that no column or row of a matrix is preferred.

    Args:
        sizes: Elements of each tensor (N).
        groups: The group of each, any integers.
        most: Bound of all counts together.
    """
    members: dict[int, list[int]] = {}
    for index, group in enumerate(groups):
        members.setdefault(group, []).append(index)
    shares = share_out([sum(sizes[i] for i in each) for each in members.values()], most)
    spots = [Spot(0, 1, 0)] * len(sizes)
    for each, share in zip(members.values(), shares):
        for index, quota in zip(each, share_out([sizes[i] for i in each], share)):
            spots[index] = _spot(sizes[index], quota)
    return tuple(spots)


def _spot(size: int, quota: int) -> Spot:
    if quota <= 0 or size <= quota:
        return Spot(max(0, min(size, quota)), 1, 0)
    stride = -(-size // quota)
    while math.gcd(stride, size) != 1:
        stride += 1
    offset = (size - 1) % stride // 2
    return Spot((size - 1 - offset) // stride + 1, stride, offset)


def can_take(tensor: Tensor) -> bool:
    """Tell whether a tensor's elements lie side by side in memory, in whatever order of dimensions, so that strides reach all."""
    if tensor.layout is not torch.strided:
        return False
    return tensor.is_contiguous() or tensor.permute(sorted(range(tensor.dim()), key=tensor.stride, reverse=True)).is_contiguous()


def take(tensors: Sequence[Tensor], spots: Sequence[Spot]) -> Tensor:
    """Return the sampled elements of all tensors, one tensor after the other, in float64 (float32 on MPS).

    Views and one concatenation: the number of kernels does not depend on N. Of narrower dtypes every value is exact. No sync.

    Args:
        tensors: On one device; each as :func:`can_take` asks for.
        spots: What to take of each (counts of 0 are allowed).

    Returns:
        Shape (R,). Elements are in the order of memory: two tensors correspond if their strides are equal.
    """
    views = []
    for tensor, spot in zip(tensors, spots):
        real = real_view(tensor)
        views.append(real.as_strided((spot.count,), (spot.stride,), real.storage_offset() + spot.offset))
    device = views[0].device
    return torch.cat(views).to(torch.float32 if device.type == "mps" else torch.float64)


def elements(tensor: Tensor) -> int:
    """Return the number of elements as :func:`take` counts them: a complex one is two."""
    return tensor.numel() * (2 if tensor.is_complex() else 1)
