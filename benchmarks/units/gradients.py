"""Gradients and updates against the optimizer's own step, by the number of parameter tensors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback

import probe
from benchmarks.units.parts import Stopwatch, watched
from benchmarks.units.targets import Target
from benchmarks.units.timing import Estimate, estimate, now, ratio
from benchmarks.units.training import quiet, trainer

TENSORS = (10, 100, 1000)
ELEMENTS = 16_384
WARM_UP = 2
PARTS = ("gradients", "updates")


@dataclass(frozen=True)
class GradientRow:
    """One number of tensors: a step of AdamW as the Trainer sets it up, what reading gradients and updates takes, and their ratio."""

    tensors: int
    optimizer_ms: float
    probe_ms: float
    over_optimizer: Estimate


class Many(nn.Module):
    """A model of many square weights, each used once, in groups that look like layers."""

    def __init__(self, tensors: int) -> None:
        """Make ``tensors`` weights of 16,384 elements."""
        super().__init__()
        side = int(ELEMENTS**0.5)
        self.layers = nn.ModuleList(nn.Linear(side, side, bias=False) for _ in range(tensors))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Return a loss that every weight has a share in."""
        return {"loss": torch.stack([layer(x).square().mean() for layer in self.layers]).mean()}


def gradient_costs(device: torch.device, *, tensors: tuple[int, ...] = TENSORS, rounds: int = 10) -> list[GradientRow]:
    """Measure each number of tensors."""
    return [_one(device, count, rounds) for count in tensors]


def _one(device: torch.device, tensors: int, rounds: int) -> GradientRow:
    torch.manual_seed(0)
    model, batch = Many(tensors).to(device), {"x": torch.randn(2, int(ELEMENTS**0.5))}
    watch = Stopwatch(device)
    clock = _Clock(watch, device)
    with watched(watch.around), probe.attach(model, every=1, settings=quiet()):
        trainer(model, batch, steps=rounds + WARM_UP, device=device, optimizer="adamw_torch", callbacks=[clock]).train()
    own, read = clock.optimizer[WARM_UP:], clock.probe[WARM_UP:]
    return GradientRow(tensors, estimate(own).median * 1e3, estimate(read).median * 1e3, ratio(read, own))


class _Clock(TrainerCallback):
    """Notes, step by step, the time of the optimizer's step and that of the parts that read gradients and weights."""

    def __init__(self, watch: Stopwatch, device: torch.device) -> None:
        self.optimizer: list[float] = []
        self.probe: list[float] = []
        self._watch, self._device = watch, device
        self._begin = 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        optimizer = kwargs["optimizer"]
        optimizer = getattr(optimizer, "optimizer", optimizer)  # accelerate's wrapper
        optimizer.register_step_pre_hook(lambda *_: self._start())
        optimizer.register_step_post_hook(lambda *_: self.optimizer.append(now(self._device) - self._begin))

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._watch.clear()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.probe.append(sum(self._watch.seconds[part] for part in PARTS))

    def _start(self) -> None:
        self._begin = now(self._device)


def target(rows: list[GradientRow]) -> Target:
    """Judge growth from the second-largest number of tensors to the largest: time a tensor must not grow."""
    less, more = rows[-2:]
    growth = (more.probe_ms / more.tensors) / (less.probe_ms / less.tensors)
    met = growth <= 1.25
    return Target(
        "growth: gradients and updates, linear in the number of parameter tensors",
        "time a tensor grows by a factor of at most 1.25",
        f"{growth:.2f} from {less.tensors} to {more.tensors} tensors; {more.over_optimizer.text()} times AdamW's step at {more.tensors}",
        met,
        "" if met else "more is done by each tensor than by the fixed number of grouped operations",
    )
