"""How many operations a sampled step adds, counted with more and fewer layers: what one layer adds, and what is fixed."""

from __future__ import annotations

from dataclasses import dataclass

import torch

import probe
from benchmarks.units.training import quiet, trainer
from benchmarks.units.workloads import llama
from costs import kernels

LAYERS = (4, 12)
STEPS = 2


@dataclass(frozen=True)
class Launches:
    """Operations that launch work (views apart), added to one sampled step: ``a_layer`` by each layer, ``fixed`` whatever the layers."""

    a_layer: float
    fixed: float


def launches(layers: tuple[int, int] = LAYERS) -> Launches:
    """Count on the CPU, in an unmodified Trainer, everything on but counterfactual passes."""
    few, many = (_added(count) for count in layers)
    slope = (many - few) / (layers[1] - layers[0])
    return Launches(slope, few - slope * layers[0])


def _added(layers: int) -> float:
    device = torch.device("cpu")

    def run(observe: bool) -> None:
        model, batch = llama(vocabulary=300, rows=1, tokens=32, width=64, layers=layers).make()
        if observe:
            with probe.attach(model, every=1, settings=quiet()):
                trainer(model, batch, steps=STEPS, device=device).train()
        else:
            trainer(model, batch, steps=STEPS, device=device).train()

    return (kernels(lambda: run(True)) - kernels(lambda: run(False))) / STEPS
