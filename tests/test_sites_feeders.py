"""What feeds a head: found in every model whose head reads the output of a module, unknown elsewhere."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

import models
from models.case import Case
from probe.capture.observer import main_tensor
from probe.sites.discovery import discover
from probe.sites.feeders import input_width

CASES = [pytest.param(case, id=case.name) for case in models.available_cases()]


@pytest.mark.parametrize("case", CASES)
def test_the_feeders_output_is_the_heads_input(case: Case) -> None:
    """What goes into a head in a forward is the last output of the module that is named as its feeder."""
    model = case.build(1).eval()
    found = discover(model)
    if case.name == "original":
        assert found.feeders == {}  # a norm's output, called by nobody's name
        return
    assert set(found.feeders) == set(case.heads)
    modules = {**found.modules, **found.watched}
    seen: dict[str, Tensor] = {}
    for head, feeder in found.feeders.items():
        modules[head].register_forward_pre_hook(lambda module, args, head=head: seen.update({head: args[0]}))
        modules[feeder].register_forward_hook(lambda module, args, output, name=feeder: seen.update({name: main_tensor(output)}))
        assert input_width(modules[head]) == modules[head].in_features
    with torch.no_grad():
        model(**case.collate([case.dataset(3, 1)[index] for index in range(3)]))
    for head, feeder in found.feeders.items():
        assert torch.equal(seen[head].flatten(), seen[feeder].flatten())


@pytest.mark.parametrize(
    "modules", [{"target_modules": ["q_proj", "lm_head"]}, {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}]
)
def test_through_peft(modules: dict[str, Any]) -> None:
    """PEFT round the model, LoRA on the head or a copy of the head change nothing of it."""
    model = models.CASES["llama"].build(1)
    width = model.lm_head.in_features
    found = discover(peft.get_peft_model(model, peft.LoraConfig(r=2, **modules)))
    assert found.feeders == {"lm_head": "model"}
    assert found.watched["model"] is model.model
    assert input_width(found.modules["lm_head"]) == width


def test_watched_modules_are_no_sites() -> None:
    """What feeds a head is watched without being shown among the sites."""
    found = discover(models.CASES["llama"].build(1))
    assert "model" in found.watched
    assert "model" not in [site.name for site in found.sites.sites]


class Handmade(nn.Module):
    """A decoder and a head that somebody wrote."""

    def __init__(self, **children: nn.Module) -> None:
        super().__init__()
        for name, child in children.items():
            self.add_module(name, child)
        self.lm_head = nn.Linear(8, 32)
        self.config = SimpleNamespace(model_type="handmade")


def test_handmade_models() -> None:
    """In a hand-written model a child with a usual name feeds the head; a model type that scales in between has no feeder."""
    assert discover(Handmade(embed=nn.Embedding(32, 8), backbone=nn.Linear(8, 8))).feeders == {"lm_head": "backbone"}
    assert discover(Handmade(embed=nn.Embedding(32, 8), body=nn.Linear(8, 8))).feeders == {}
    scaling = Handmade(decoder=nn.Linear(8, 8))
    scaling.config.model_type = "t5"
    assert discover(scaling).feeders == {}
    inside = nn.ModuleDict({"lm": Handmade(model=nn.Linear(8, 8)), "other": nn.Linear(2, 2)})
    assert discover(inside).feeders == {"lm.lm_head": "lm.model"}
