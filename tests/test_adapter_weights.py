"""Adapters whose output weight is all zero, counted on the device; of PEFT's kinds and of hand-written ones."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from probe.capture.buffer import StepBuffer
from probe.capture.observer import StepEnd
from probe.capture.observers.adapters import CELL, AdapterWatcher
from probe.sites.adapter_weights import adapter_outputs
from waiting import NoWaiting


class Attention(nn.Module):
    """A layer with two projections and an embedding, as adapters are put into."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj = nn.Linear(8, 8)
        self.v_proj = nn.Linear(8, 8)
        self.table = nn.Embedding(6, 8)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.q_proj(self.table(ids)) + self.v_proj(self.table(ids))


class Model(nn.Module):
    """Two such layers."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Attention(), Attention()])


def counted(model: nn.Module) -> tuple[int, int] | None:
    """Return how many adapter layers were read, and how many of them are zero."""
    made = AdapterWatcher(adapter_outputs(model))
    buffer = StepBuffer(budget_bytes=1 << 20, cells=made.cells())
    buffer.open(1)
    with NoWaiting():
        made.step_end(StepEnd(), buffer)
    if CELL.name not in buffer.totals.maxima:
        return None
    (zero,) = buffer.totals.maxima[CELL.name].tolist()
    return int(buffer.totals.counts[CELL.name][0]), int(zero)


def test_lora() -> None:
    """All are zero at the start; each whose output weight becomes anything else, however small, is not."""
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(Model(), peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj", "table"]))
    assert counted(model) == (6, 6)
    weights = [p for name, p in model.named_parameters() if "lora_B" in name or "lora_embedding_A" in name]
    assert len(weights) == 6
    for done, weight in enumerate(weights, start=1):
        with torch.no_grad():
            weight.view(-1)[-1] = 1e-40  # its square is 0 in float32
        assert counted(model) == (6, 6 - done)


def test_only_active_adapters_count() -> None:
    """A second adapter that is not active does not make a layer count as filled, and one that is does."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["q_proj"])
    model = peft.get_peft_model(Model(), config)
    model.add_adapter("other", config)
    for name, parameter in model.named_parameters():
        if "lora_B.other" in name:
            nn.init.ones_(parameter)
    assert counted(model) == (2, 2)
    model.set_adapter("other")
    assert counted(model) == (2, 0)


@pytest.mark.parametrize("kind", ["adalora", "vera", "hira"])
def test_other_kinds_begin_at_zero(kind: str) -> None:
    """Adapters of other kinds begin with an output weight of 0, and the layer's output is that of its base then, and only then."""
    peft = pytest.importorskip("peft")
    names = {"adalora": "AdaLoraConfig", "vera": "VeraConfig", "hira": "HiraConfig"}
    if not hasattr(peft, names[kind]):
        pytest.skip(f"this peft has no {names[kind]}")
    options: dict[str, Any] = {"adalora": {"total_step": 10, "init_r": 2}, "vera": {"r": 2}, "hira": {"r": 2}}[kind]
    base = Model()
    ids = torch.tensor([[0, 3, 5]])
    before = base.layers[0](ids)
    model = peft.get_peft_model(base, getattr(peft, names[kind])(target_modules=["q_proj", "v_proj"], **options))
    assert torch.allclose(model.base_model.model.layers[0](ids), before)
    assert counted(model) == (4, 4)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and ("lora_E" in name or "vera_lambda_b" in name or "hira_B" in name):
            nn.init.ones_(parameter)
    assert not torch.allclose(model.base_model.model.layers[0](ids), before)
    assert counted(model) == (4, 0)


def test_hand_written() -> None:
    """A module with a parameter or a layer called lora_B is an adapter layer."""
    model = Model()
    model.layers[0].q_proj.lora_B = nn.Parameter(torch.zeros(8, 2))
    model.layers[1].q_proj.lora_B = nn.Linear(2, 8, bias=False)
    assert counted(model) == (2, 1)


def test_no_adapters_and_sharded_ones() -> None:
    """Without adapters, or with none that this rank holds whole, nothing is counted."""
    assert counted(Model()) is None
    model = Model()
    model.layers[0].q_proj.lora_B = nn.Parameter(torch.zeros(8, 2))
    model.layers[1].q_proj.lora_B = nn.Parameter(torch.zeros(8, 2))
    model.layers[0].q_proj.lora_B.ds_id = 1
    assert counted(model) == (1, 1)
    model.layers[1].q_proj.lora_B.ds_id = 2
    assert counted(model) is None
