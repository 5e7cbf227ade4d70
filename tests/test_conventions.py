"""What configs say of padding and of logits: read where models keep it, unknown where they do not tell."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from torch import nn

from models import CASES
from probe.sites.conventions import logit_changes, padding_token
from probe.sites.facts import read_facts


def model(**config: Any) -> nn.Module:
    module = nn.Module()
    module.config = SimpleNamespace(**config)
    return module


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"pad_token_id": 0, "eos_token_id": 2}, (0, False)),
        ({"pad_token_id": 2, "eos_token_id": 2}, (2, True)),
        ({"pad_token_id": 2, "eos_token_id": [1, 2]}, (2, True)),
        ({"pad_token_id": 3}, (3, True)),
        ({"pad_token_id": None, "eos_token_id": 2}, (None, False)),
        ({"text_config": SimpleNamespace(pad_token_id=7, eos_token_id=1)}, (7, False)),
        ({"pad_token_id": -1, "text_config": {"pad_token_id": 8}}, (8, True)),
        ({}, (None, True)),
    ],
)
def test_padding_token(config: dict[str, Any], expected: tuple[int | None, bool]) -> None:
    """The outermost config that names a padding token wins; an unset or negative id is none."""
    assert padding_token(model(**config)) == expected


def test_padding_token_of_the_generation_config() -> None:
    """A model whose config is silent may tell in its generation config; a module without any config tells nothing."""
    silent = model()
    silent.generation_config = SimpleNamespace(pad_token_id=5, eos_token_id=5)
    assert padding_token(silent) == (5, True)
    assert padding_token(nn.Linear(2, 2)) == (None, True)


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"final_logit_softcapping": 30.0}, (1.0, 30.0)),
        ({"logit_scale": 0.0625}, (0.0625, None)),
        ({"logit_scale": None, "lm_head_multiplier": 2}, (2.0, None)),
        ({"logits_scaling": 8.0}, (0.125, None)),
        ({"logits_scaling": 8.0, "model_type": "hyperclovax"}, (8.0, None)),
        ({"text_config": SimpleNamespace(logits_scaling=4.0)}, (0.25, None)),
        ({"logit_scale": "inv_sqrt_d_model", "final_logit_softcapping": None}, (1.0, None)),
        ({}, (1.0, None)),
    ],
)
def test_logit_changes(config: dict[str, Any], expected: tuple[float, float | None]) -> None:
    """Factor and softcap under the names that configs have for them; what is no number changes nothing."""
    assert logit_changes(model(**config)) == expected


@pytest.mark.parametrize("name", ["whisper", "llama"])
def test_facts_hold_them(name: str) -> None:
    """The facts of a model hold its padding token, and that its logits are left as they are."""
    built = CASES[name].build(0)
    facts = read_facts(built)
    assert facts.padding_token == built.config.pad_token_id
    assert facts.padding_token is not None
    assert facts.ends_with_padding == (built.config.pad_token_id == built.config.eos_token_id)
    assert (facts.logit_factor, facts.logit_softcap) == (1.0, None)
