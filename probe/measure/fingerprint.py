"""Hashes of a batch's rows: which rows are equal, and one number for the whole batch, by integer arithmetic on bit patterns.

Every function stays on the device: no sync, no RNG. Sums and products of int64 wrap around, on every device alike, so that a hash is the
same wherever it is made.

Shapes: B rows.
"""

from __future__ import annotations

import torch
from torch import Tensor

from probe.measure.chunks import per_chunk

LARGEST = (1 << 53) - 1
"""Largest fingerprint: a float64 holds whole numbers up to this exactly."""

_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
# Source: G. L. Steele, D. Lea, C. H. Flood, "Fast splittable pseudorandom number generators" (2014): splitmix64, as signed numbers.
_GOLDEN, _FIRST, _SECOND = -0x61C8864680B583EB, -0x40A7B892E31B1A47, -0x6B2FB644ECCEEE15


def hash_rows(x: Tensor, *, salt: int = 0) -> Tensor:
    """Hash each row of a tensor: equal rows get equal hashes, and rows that differ in a bit, or in its place, others.

    A row's elements are multiplied with odd numbers made from their places and added up, in 64 bits. Two given rows that differ have
    equal hashes with a chance of about 2**-63 (2**-32 if they differ in nothing but the signs of float32 numbers).

    Args:
        x: (B, ...), any dtype; floats by their bit patterns, so 0.0 and -0.0 differ and a NaN equals itself.
        salt: Keeps tensors of different names apart: any integer.

    Returns:
        int64 (B,). Temporaries of at most 8 MiB, unless one row of ``x`` is more.
    """
    bits = _bits(x)
    width = bits.shape[1:].numel()
    salt = _wrapped(hash((salt, tuple(x.shape[1:]))))  # of whole numbers: the same in every process
    total_B = torch.full((x.shape[0],), salt, dtype=torch.int64, device=x.device)
    count = per_chunk(8 * max(width, 1))
    for start in range(0, width if x.shape[0] else 0, per_chunk(8)):
        places_N = torch.arange(start, min(width, start + per_chunk(8)), device=x.device)
        factors_N = _odd(places_N, salt)
        for first in range(0, x.shape[0], count):
            rows_bN = bits[first : first + count].reshape(-1, width)[:, start : start + factors_N.shape[0]]
            total_B[first : first + count] += rows_bN.to(torch.int64, copy=True).mul_(factors_N).sum(1)
    return total_B


def together(hashes_TB: Tensor) -> Tensor:
    """Return one hash a row of the hashes of several tensors, int64 (T, B) -> (B,); each tensor was hashed with a salt of its own."""
    return mix(hashes_TB).sum(0)


def equal_rows(hashes_B: Tensor) -> Tensor:
    """Return how many rows equal another one (two rows that equal each other count as two): 0-dim int64. Sorts B numbers."""
    sorted_B = hashes_B.sort().values
    same_B = sorted_B[1:] == sorted_B[:-1]
    one = same_B.new_zeros(1)
    return (torch.cat([same_B, one]) | torch.cat([one, same_B])).sum()


def fingerprint(hashes_B: Tensor) -> Tensor:
    """Return one number of rows, whatever their order: 0-dim int64. ``& LARGEST`` makes it one that a float64 holds."""
    return mix(hashes_B + _GOLDEN).sum()


def mix(value: Tensor) -> Tensor:
    """Return splitmix64's finaliser of int64 numbers: a bijection in which every bit depends on every other."""
    value = _shifted(value, 30).bitwise_xor_(value).mul_(_FIRST)
    value = value.bitwise_xor_(_shifted(value, 27)).mul_(_SECOND)
    return value.bitwise_xor_(_shifted(value, 31))


def _odd(places_N: Tensor, salt: int) -> Tensor:
    """Return an odd number for each place, by a shorter mixing: half of splitmix64's."""
    value_N = (places_N + salt).mul_(_FIRST)
    return value_N.bitwise_xor_(_shifted(value_N, 32)).mul_(_SECOND).bitwise_or_(1)


def _shifted(value: Tensor, by: int) -> Tensor:
    """Shift to the right and fill with zeros; torch's own shift of int64 copies the sign."""
    return (value >> by).bitwise_and_((1 << (64 - by)) - 1)


def _wrapped(number: int) -> int:
    """Return a Python integer as the int64 that has its lowest 64 bits."""
    return (number + (1 << 63)) % (1 << 64) - (1 << 63)


def _bits(x: Tensor) -> Tensor:
    x = x.detach()
    if x.is_complex():
        x = torch.view_as_real(x.resolve_conj())
    return x.view(_INTEGERS[x.element_size()]) if x.is_floating_point() or x.dtype == torch.bool else x
