"""The division of a model's parameters: every one once, by part and by layer, in the order of the forward, through wrappers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import models
from models.case import Case
from probe.sites.discovery import discover
from probe.sites.parts import MOST_LAYERS, PARTS, Division, Unit, count, divide

CASES = [pytest.param(case, id=case.name) for case in models.available_cases()]


def divided(model: nn.Module, **choices: Any) -> Division:
    return divide(model, discover(model, choices=choices or "auto").sites.sites)


def elements(division: Division, *, by: str) -> dict[str, int]:
    found: dict[str, int] = {}
    for unit in count(division):
        found[getattr(unit, by)] = found.get(getattr(unit, by), 0) + unit.elements
    return found


@pytest.mark.parametrize("case", CASES)
def test_every_parameter_is_in_one_unit(case: Case) -> None:
    """Each parameter of the model is there once, tied or not, and parts and layers both add up to the model."""
    model = case.build(0)
    division = divided(model)
    assert sorted(id(weight.parameter) for weight in division.weights) == sorted(map(id, model.parameters()))
    total = sum(p.numel() for p in model.parameters())
    assert sum(elements(division, by="part").values()) == sum(elements(division, by="layer").values()) == total
    assert set(elements(division, by="part")) <= set(PARTS)
    assert len(set(division.units)) == len(division.units)


@pytest.mark.parametrize("case", CASES)
def test_every_layer_is_a_layer_of_the_model(case: Case) -> None:
    """There is one row for each layer with attention, and its parameters are exactly those of that module."""
    model = case.build(0)
    names = {site.rpartition(".")[0] for kind in case.attention.values() for site in kind}
    found = elements(divided(model), by="layer")
    assert names == set(found) - set(PARTS)
    for name in names:
        assert found[name] == sum(p.numel() for p in model.get_submodule(name).parameters())


def test_forward_order() -> None:
    """Encoder, projector, embedding, decoder layers, what is round them, heads: in this order, whatever the order of attributes."""
    model = models.CASES["original"].build(0)
    layers = list(dict.fromkeys(unit.layer for unit in divided(model).units))
    tower, decoder = "model.audio_tower", "model.layers"
    assert layers[:5] == ["audio_encoder", f"{tower}.layers.0", f"{tower}.layers.1", "projector", "embedding"]
    assert layers[5:] == [f"{decoder}.0", f"{decoder}.1", "rest", "lm_head"]


def test_branches_and_embeddings() -> None:
    """In a layer of two feed-forward branches each branch is a part of its own; so are the tables of tokens and of audio codes."""
    model = models.CASES["original"].build(0)
    by_part = elements(divided(model), by="part")
    dual = models.CASES["original"].dual_layers
    for part, key in (("text_branch", "mlp"), ("audio_branch", "audio_mlp")):
        assert by_part[part] == sum(p.numel() for layer in dual for p in model.get_submodule(f"{layer}.{key}").parameters())
    tables = [m for name, m in model.named_modules() if isinstance(m, nn.Embedding) and "position" not in name]
    assert by_part["embedding"] == sum(p.numel() for table in tables for p in table.parameters())


def test_a_tied_head_takes_the_embedding_with_it() -> None:
    """The embedding that is also the head belongs to the head, and positions belong to the rest."""
    by_part = elements(divided(models.CASES["whisper"].build(0)), by="part")
    assert set(by_part) == {"audio_encoder", "lm_head", "rest"}


class Expert(nn.Module):
    """A layer with attention and a list of experts."""

    def __init__(self) -> None:
        super().__init__()
        self.self_attn = nn.ModuleDict({name: nn.Linear(4, 4) for name in ("q_proj", "k_proj", "v_proj", "o_proj")})
        self.experts = nn.ModuleList([nn.Linear(4, 4) for _ in range(3)])


class Towers(nn.Module):
    """Two towers in a list, each with layers; and a list of heads that no attention is in."""

    def __init__(self, layers: int = 2) -> None:
        super().__init__()
        towers = [nn.ModuleDict({"layers": nn.ModuleList([Expert() for _ in range(layers)]), "norm": nn.LayerNorm(4)}) for _ in range(2)]
        self.towers = nn.ModuleList(towers)
        self.extras = nn.ModuleList([nn.Linear(4, 2), nn.Linear(4, 2)])


def names_of(model: nn.Module) -> list[str]:
    attention = [name for name, _ in model.named_modules() if name.endswith("self_attn")]
    return list(dict.fromkeys(unit.layer for unit in divided(model, attention=attention).units))


def test_lists_in_lists() -> None:
    """Experts belong to their layer, towers that hold layers are no layers, and a list without attention is one of layers."""
    layers = [f"towers.{tower}.layers.{index}" for tower in range(2) for index in range(2)]
    assert names_of(Towers()) == [*layers, "extras.0", "extras.1", "rest"]


def test_more_layers_than_can_be_shown_are_not_told_apart() -> None:
    """Beyond the bound there are parts only, so that the numbers of a step stay few."""
    model = nn.Module()
    model.blocks = nn.ModuleList([nn.Linear(1, 1) for _ in range(MOST_LAYERS)])
    assert len(divided(model).units) == MOST_LAYERS
    model.blocks.append(nn.Linear(1, 1))
    assert divided(model).units == (Unit("rest", "rest"),)


def test_hand_written_adapters() -> None:
    """Modules and parameters whose name begins with lora_ are adapters, wherever they are; their layer stays their layer."""
    model = models.CASES["whisper"].build(0)
    layer = model.model.encoder.layers[0]
    layer.self_attn.q_proj.lora_A = nn.Linear(32, 2, bias=False)
    layer.self_attn.q_proj.lora_B = nn.Parameter(torch.zeros(32, 2))
    found = {(unit.part, unit.layer): unit.elements for unit in count(divided(model))}
    assert found[("adapters", "model.encoder.layers.0")] == 2 * 64


@pytest.mark.parametrize("name", ["whisper", "llama"])
def test_adapters_of_peft(name: str) -> None:
    """LoRA's weights are adapters, a saved copy of a head is the head, and the frozen base keeps its parts; names are the model's own."""
    peft = pytest.importorskip("peft")
    model = models.CASES[name].build(0)
    head = models.CASES[name].heads[0]
    before = elements(divided(model), by="part")
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], modules_to_save=[head] if name == "llama" else None)
    wrapped = peft.get_peft_model(model, config)
    division = divided(wrapped)
    after = {unit.part: 0 for unit in count(division)}
    training = dict(after)
    for unit in count(division):
        after[unit.part] += unit.elements
        training[unit.part] += unit.trainable
    lora = sum(p.numel() for n, p in wrapped.named_parameters() if "lora_" in n)
    assert after["adapters"] == training["adapters"] == lora
    copies = before["lm_head"] if name == "llama" else 0
    assert after["lm_head"] == before["lm_head"] + copies
    assert training["lm_head"] == copies
    assert training["rest"] == 0
    assert set(elements(division, by="layer")) - set(PARTS) <= {n for n, _ in model.named_modules()}


@pytest.mark.parametrize("method", ["prompt", "prefix", "ia3", "adaption"])
def test_other_adapters_of_peft(method: str) -> None:
    """What PEFT adds beside LoRA (prompts, prefixes, scales) are adapters, too, and nothing else is."""
    peft = pytest.importorskip("peft")
    configs = {
        "prompt": lambda: peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
        "prefix": lambda: peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
        "adaption": lambda: peft.AdaptionPromptConfig(task_type="CAUSAL_LM", adapter_len=2, adapter_layers=1),
        "ia3": lambda: peft.IA3Config(target_modules=["k_proj"], feedforward_modules=[]),
    }
    wrapped = peft.get_peft_model(models.CASES["llama"].build(0), configs[method]())
    trainable = {id(p) for p in wrapped.parameters() if p.requires_grad}
    division = divided(wrapped)
    adapters = {id(w.parameter) for w in division.weights if division.units[w.unit].part == "adapters"}
    assert trainable == adapters != set()


def test_tables_of_positions_are_no_embeddings() -> None:
    """Whatever they are called in the usual models, learned positions belong to the rest, and tables of tokens do not."""
    model = nn.Module()
    for name in ("wpe", "embed_positions", "position_embeddings", "wte", "embed_tokens"):
        setattr(model, name, nn.Embedding(3, 2))
    assert elements(divided(model), by="part") == {"embedding": 12, "rest": 18}


def test_what_trains_is_counted_as_it_is_now() -> None:
    """Freezing a part later changes the counts of the next step; the dtype is that of most elements that train."""
    model = models.CASES["whisper"].build(0)
    division = divided(model)
    encoder = model.model.encoder
    encoder.requires_grad_(False)
    frozen = [unit for unit in count(division) if unit.part == "audio_encoder"]
    assert {(unit.trainable, unit.tensors, unit.dtype) for unit in frozen} == {(0, 0, "")}
    encoder.layers[0].to(torch.bfloat16).requires_grad_(True)
    encoder.layers[0].self_attn.k_proj.float()
    (unit,) = [unit for unit in count(division) if unit.layer == "model.encoder.layers.0"]
    assert (unit.dtype, unit.tensors) == ("bfloat16", len(list(encoder.layers[0].parameters())))
