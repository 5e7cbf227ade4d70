"""transformers' own map of attention layers is read in every form that it takes, and its absence is no error."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import transformers
from torch import nn

import models
from probe.foreign.recorders import attention_recorders


class SelfAttn(nn.Module): ...


class CrossAttn(nn.Module): ...


@dataclass
class Recorder:
    """The fields of transformers' OutputRecorder."""

    target_class: type[nn.Module] | None
    index: int = 0
    layer_name: str | None = None
    class_name: str | None = None


class Model(nn.Module):
    def __init__(self, recorded: Any) -> None:
        super().__init__()
        self._can_record_outputs = recorded


def _hits(recorded: Any, module: nn.Module, name: str) -> list[bool]:
    return [entry.cross for entry in attention_recorders(Model(recorded)) if entry.matches(module, name)]


@pytest.mark.parametrize(
    "entry",
    [
        SelfAttn,
        [CrossAttn, SelfAttn],
        Recorder(SelfAttn),
        [Recorder(SelfAttn, layer_name=".attn")],
        Recorder(None, class_name="0.attn"),
        "attn",
    ],
    ids=["class", "list", "recorder", "layer name", "class name", "text"],
)
def test_every_form_of_entry_matches_its_layer(entry: Any) -> None:
    """A class, a list, a recorder by class, by layer or by name, and plain text."""
    assert _hits({"attentions": entry, "hidden_states": nn.Module}, SelfAttn(), "layers.0.attn") == [False]
    assert _hits({"attentions": entry, "hidden_states": nn.Module}, nn.Linear(2, 2), "layers.0.mlp") == []


def test_layer_name_tells_self_from_cross() -> None:
    """One class in both entries: the part of the name decides, whole parts only."""
    recorded = {"attentions": Recorder(SelfAttn, layer_name=".attn"), "cross_attentions": Recorder(SelfAttn, layer_name=".crossattn")}
    assert _hits(recorded, SelfAttn(), "h.0.attn") == [False]
    assert _hits(recorded, SelfAttn(), "h.0.crossattn") == [True]


@pytest.mark.parametrize("recorded", [None, {}, {"hidden_states": SelfAttn}, {"attentions": None}, "odd", {"attentions": Recorder(None)}])
def test_no_map_is_no_error(recorded: Any) -> None:
    """Models of older versions have none; remote code may have something odd there."""
    assert attention_recorders(Model(recorded)) == ()


def test_the_installed_transformers_is_read() -> None:
    """Where the installed version has such maps, Llama's names its attention class; before 4.5x there are none."""
    model = models.CASES["llama"].build(0)
    entries = attention_recorders(model)
    if getattr(type(model), "_can_record_outputs", None) is None:
        assert transformers.__version__.startswith("4.")
        assert entries == ()
    else:
        assert [entry.target for entry in entries] == [type(model.model.layers[0].self_attn)]
