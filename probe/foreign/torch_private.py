"""The private names of torch that the package uses, each with the versions it was checked on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def foreach_norm(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Return the L2 norms of tensors of one device and dtype as 0-dim tensors, in one fused call.

    Narrower floats than float32 are accumulated and returned in float32 (on a CPU, which widens a copy anyway, in float64).
    ``torch._foreach_norm`` is what ``clip_grad_norm_`` itself calls; public torch has only the loop, one kernel launch a tensor.
    No sync. Checked on torch 2.13.0.
    """
    first, dtype = tensors[0], None
    if first.is_floating_point() and first.itemsize < 4:
        dtype = torch.float64 if first.device.type == "cpu" else torch.float32
    norms: tuple[Tensor, ...] = torch._foreach_norm(list(tensors), 2, dtype)
    return list(norms)


def foreach_largest(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Return the largest absolute value of each tensor of one device and dtype as 0-dim tensors, in one fused call.

    The L-infinity norm: unlike squares it does not underflow, so 0 means that every element is. No sync. Checked on torch 2.13.0.
    """
    norms: tuple[Tensor, ...] = torch._foreach_norm(list(tensors), torch.inf)
    return list(norms)


def gradients_unscaled(scaler: Any) -> bool:
    """Say whether a ``GradScaler`` has divided its factor out of the gradients since its last update (as clipping asks it to).

    ``_per_optimizer_states`` holds a stage for each optimizer, 1 once ``unscale_`` was called; public torch does not tell. No sync.
    Checked on torch 2.13.0.
    """
    states = getattr(scaler, "_per_optimizer_states", None) or {}
    return any(getattr(state.get("stage"), "value", 0) >= 1 for state in states.values())


def in_backward() -> bool:
    """Say whether autograd is running backward in this thread: true in gradient hooks and in the recompute of a checkpoint.

    Public torch does not tell a recomputed forward from the first one, and looking through the stack costs 1.2 ms a hook against
    0.14 µs here. Checked on torch 2.13.0.
    """
    return bool(torch._C._current_graph_task_id() != -1)


def loss_scale(scaler: Any) -> Tensor | None:
    """Return the scale of a ``GradScaler`` as its own 0-dim tensor on the device, or None if there is none (yet).

    ``GradScaler.get_scale`` would wait for the device; ``_scale`` does not. None without a scaler, with a disabled one, and before its
    first use. Checked on torch 2.13.0.
    """
    scale = getattr(scaler, "_scale", None)
    return scale if isinstance(scale, Tensor) else None


def identity(tensor: Tensor) -> tuple[object, ...] | None:
    """Return what tells the elements of a tensor from others while it is alive: where they lie, in what form, and how often written to.

    Two equal identities are of the same elements with the same values. ``None`` where that cannot be told: without memory (on the
    ``meta`` device), and in inference mode, which counts no writes. ``Tensor._version`` counts them; public torch does not tell. Looks at
    no value. Checked on torch 2.13.0.
    """
    if tensor.is_inference() or not tensor.data_ptr():
        return None
    return (tensor.device, tensor.dtype, tuple(tensor.shape), tensor.stride(), tensor.data_ptr(), tensor._version)
