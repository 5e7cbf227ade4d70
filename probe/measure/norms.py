"""The squared L2 norm of many tensors together, such as the gradients of one part of the model."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from probe.errors import ProbeValueError
from probe.foreign.torch_private import foreach_norm
from probe.measure.chunks import accumulator, pieces

# The CPU's norm adds up in float32 without pairing: 2e-5 off over 2**20 elements, below 2e-7 over this many.
_PIECE = 1 << 15


def sum_of_squares(tensors: Sequence[Tensor]) -> Tensor:
    """Return the sum of the squares of all elements of all tensors.

    The norms are taken in one fused call for each device and dtype, in float32 or wider, and squared and added in float64. On a CPU,
    where the fused call is a loop that widens whole tensors, they are cut into short pieces. As in ``clip_grad_norm_``, float32 values
    beyond about 1e19 give infinity. No sync.

    Args:
        tensors: Float or complex, dense, of any shapes, dtypes and devices; at least one.

    Returns:
        0-dim float64 (float32 on MPS), on the first device that is not the CPU, or else there.

    Raises:
        ProbeValueError: if there is no tensor, or one is sparse.
    """
    if not tensors:
        raise ProbeValueError("sum_of_squares of no tensors: expected at least one")
    groups: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    for tensor in tensors:
        if tensor.layout is not torch.strided:
            raise ProbeValueError(f"sum_of_squares of a tensor with layout {tensor.layout}: expected dense tensors")
        tensor = torch.view_as_real(tensor.detach().resolve_conj()) if tensor.is_complex() else tensor.detach()
        groups.setdefault((tensor.device, tensor.dtype), []).append(tensor)
    # The CPU's part may travel to another device without waiting; the other way round it may not.
    home = next((device for device, _ in groups if device.type != "cpu"), tensors[0].device)
    total = torch.zeros((), dtype=accumulator(home), device=home)
    for (device, _), group in groups.items():
        norms = foreach_norm(_short(group) if device.type == "cpu" else group)
        total += torch.stack(norms).to(accumulator(device)).square().sum().to(home, non_blocking=True)
    return total


def _short(tensors: list[Tensor]) -> list[Tensor]:
    return [piece for tensor in tensors for piece in (pieces(tensor, _PIECE) if tensor.numel() > _PIECE else (tensor,))]
