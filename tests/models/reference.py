"""Independent references for tests: a batch of a case, what a module returned, and cross-entropy in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from models.case import Case
from models.samples import IGNORED


def batch_of(case: Case, count: int = 4, *, seed: int = 7) -> Any:
    """Return one batch of the first samples of a case."""
    data = case.dataset(count, seed)
    return case.collate([data[index] for index in range(count)])


def outputs_of(module: nn.Module, forward: Callable[[], Any]) -> list[Any]:
    """Return what the module returned in each call of it during ``forward``."""
    seen: list[Any] = []
    handle = module.register_forward_hook(lambda _module, _args, output: seen.append(output))
    forward()
    handle.remove()
    return seen


def cross_entropy(logits: Tensor, labels: Tensor, shift: int) -> float:
    """Return the mean cross-entropy in float64 of logits (B, S, V) against labels (B, S)."""
    if shift:
        logits, labels = logits[:, :-1], labels[:, 1:]
    chosen = labels != IGNORED
    log_probabilities = torch.log_softmax(logits.double()[chosen], dim=-1)
    return float(-log_probabilities[torch.arange(int(chosen.sum())), labels[chosen]].mean().detach())
