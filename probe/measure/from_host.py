"""Short lists of numbers that the host knows, as tensors on a device, without waiting."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def from_host(values: Sequence[float] | Sequence[Sequence[float]], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return host numbers as a tensor on ``device``. No sync: to CUDA they go from page-locked memory, whose copy does not wait.

    Args:
        values: Numbers, or rows of as many numbers each.
        dtype: Of the tensor.
        device: Where it is wanted.
    """
    tensor = torch.tensor(values, dtype=dtype)
    if device.type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)
