"""A stand-in for fused losses (Liger, TRL): the loss is computed from the head's weights without a call of the head; no logits come out."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional


class _Weights(nn.Module):
    """Multiplies by another module's weights, as a fused kernel would, without owning or calling that module."""

    def __init__(self, head: nn.Linear) -> None:
        super().__init__()
        self._head = (head,)

    def forward(self, hidden: Tensor) -> Tensor:
        head = self._head[0]
        return functional.linear(hidden, head.weight, head.bias)


def without_head(model: nn.Module) -> None:
    """Replace the forward of this instance by one that never calls the LM head and returns ``logits=None``.

    The model's own loss, gradients and random numbers are as before, bit for bit. Works for a model whose output embeddings are an
    ``nn.Linear``.
    """
    head = model.get_output_embeddings()
    assert isinstance(head, nn.Linear)
    owner, name = next((owner, name) for owner in model.modules() for name, child in owner.named_children() if child is head)
    forward = model.forward

    def fused(*args: Any, **kwargs: Any) -> Any:
        owner._modules[name] = _Weights(head)
        try:
            output = forward(*args, **kwargs)
        finally:
            owner._modules[name] = head
        if model.training and torch.is_grad_enabled():
            output["logits"] = None
        return output

    model.forward = fused
