"""L2 norms of many tensors, such as the gradients of each part of the model: squares added up by group."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from probe.errors import ProbeValueError
from probe.foreign.torch_private import foreach_norm
from probe.measure.chunks import accumulator, pieces
from probe.measure.from_host import from_host

# The CPU's norm adds up in float32 without pairing: 2e-5 off over 2**20 elements, below 2e-7 over this many.
_PIECE = 1 << 15
# Rows of this many are what the CPU is fastest at, three times as fast as one piece after the other.
_ROW = 1 << 13
_ROWS_OF = (torch.float32, torch.float64)


def squares_by_group(tensors: Sequence[Tensor], groups: Sequence[int], count: int) -> tuple[Tensor, Tensor]:
    """Return for each group the sum of the squares of all elements of its tensors.

    The norms are taken in one fused call for each device and dtype, in float32 or wider, and squared and added in float64; the number
    of tensor operations does not depend on the number of groups. On a CPU, where the fused call is a loop that widens whole tensors,
    long ones are cut into rows, or into short pieces where they are not contiguous or of low precision. As in ``clip_grad_norm_``,
    float32 values beyond about 1e19 count as infinite. No sync.

    Args:
        tensors: Float or complex, dense, of any shapes, dtypes and devices; at least one.
        groups: The group of each tensor, 0 … ``count - 1``.
        count: Number of groups (G).

    Returns:
        Two float64 (G,) tensors (float32 on MPS) on the first device that is not the CPU, or else there: the sums of squares without
        the tensors that are not finite, and how many of these there are (on a CPU the pieces of those that are cut into pieces). 0 for
        a group without any.

    Raises:
        ProbeValueError: if there is no tensor, or one is sparse.
    """
    if not tensors:
        raise ProbeValueError("squares of no tensors: expected at least one")
    kinds: dict[tuple[torch.device, torch.dtype], list[tuple[int, Tensor]]] = {}
    for tensor, group in zip(tensors, groups):
        real = real_view(tensor)
        kinds.setdefault((real.device, real.dtype), []).append((group, real))
    # The CPU's part may travel to another device without waiting; the other way round it may not.
    home = next((device for device, _ in kinds if device.type != "cpu"), tensors[0].device)
    total = torch.zeros((2, count), dtype=accumulator(home), device=home)
    for (device, _), members in kinds.items():
        total += add_norms(*_norms(members, device), count).to(home, total.dtype, non_blocking=True)
    return total[0], total[1]


def norm_of(tensor: Tensor) -> Tensor:
    """Return the L2 norm of one tensor: 0-dim, float32 or wider, on its device. Off the CPU one tensor operation. No sync."""
    real = real_view(tensor)
    norms, _ = _norms([(0, real)], real.device)
    return norms[0] if len(norms) == 1 else torch.linalg.vector_norm(torch.stack(norms).double())


def add_norms(norms: Sequence[Tensor], groups: Sequence[int], count: int) -> Tensor:
    """Square norms and add them up by group, in float64.

    Args:
        norms: 0-dim tensors of one device, of any dtypes; at least one.
        groups: The group of each.
        count: Number of groups (G).

    Returns:
        Float64 (2, G) (float32 on MPS): sums of the squares of the finite norms, and how many are not finite. No sync.
    """
    device = norms[0].device
    values_N = torch.stack(list(norms)).to(accumulator(device))
    finite_N = torch.isfinite(values_N)
    rows = torch.stack([values_N.square().masked_fill(~finite_N, 0.0), (~finite_N).to(values_N.dtype)])
    total = torch.zeros((2, count), dtype=values_N.dtype, device=device)
    return total.index_add_(1, from_host(groups, torch.int64, device), rows)


def real_view(tensor: Tensor) -> Tensor:
    """Return a dense tensor detached, complex numbers as pairs of reals.

    Raises:
        ProbeValueError: if it is sparse.
    """
    if tensor.layout is not torch.strided:
        raise ProbeValueError(f"the norm of a tensor with layout {tensor.layout}: expected a dense tensor")
    tensor = tensor.detach() if tensor.requires_grad else tensor
    return torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor


def _norms(members: Sequence[tuple[int, Tensor]], device: torch.device) -> tuple[list[Tensor], list[int]]:
    """Return the norms of tensors of one device and dtype, or of their pieces, and the group of each."""
    if device.type != "cpu":
        return foreach_norm([tensor for _, tensor in members]), [group for group, _ in members]
    short: list[tuple[int, Tensor]] = []
    norms, groups = [], []
    for group, x in members:
        if x.numel() <= _PIECE:
            short.append((group, x))
        elif x.dtype in _ROWS_OF and x.is_contiguous():
            norms.append(_norm_by_rows(x))
            groups.append(group)
        else:
            short += [(group, piece) for piece in pieces(x, _PIECE)]
    fused = foreach_norm([tensor for _, tensor in short]) if short else []
    return [*fused, *norms], [*(group for group, _ in short), *groups]


def _norm_by_rows(x: Tensor) -> Tensor:
    """Return the norm of a contiguous tensor, float64 and 0-dim: of rows first, then of their norms."""
    flat = x.view(-1)
    whole = x.numel() // _ROW * _ROW
    norms = [torch.linalg.vector_norm(flat[:whole].view(-1, _ROW), dim=1)]
    if whole < x.numel():
        norms.append(torch.linalg.vector_norm(flat[whole:]).view(1))
    norm: Tensor = torch.linalg.vector_norm(torch.cat(norms).double())
    return norm
