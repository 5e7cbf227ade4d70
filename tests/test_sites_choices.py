"""The user's own sites: modules, names and patterns replace or add; what matches nothing is an error with the nearest names."""

from __future__ import annotations

from typing import Any

import peft
import pytest
from torch import nn

import models
from probe.errors import ProbeTypeError, SiteError
from probe.sites.choices import choices_below, named_choices
from probe.sites.discovery import Discovery, discover


@pytest.fixture
def whisper() -> nn.Module:
    return models.CASES["whisper"].build(0)


def names(found: Discovery, role: str) -> list[str]:
    return [site.name for site in found.sites if site.role == role]


@pytest.mark.parametrize("choice", ["model.decoder", "module.model.decoder", ["model.decoder"], "model.d?coder", "model.*[r]"])
def test_names_and_patterns_replace_what_was_found(whisper: nn.Module, choice: Any) -> None:
    """An exact name, one with a wrapper's prefix, a list and patterns; the found encoder is gone unless it matches."""
    found = discover(whisper, choices={"audio_encoder": choice})
    assert "model.decoder" in names(found, "audio_encoder")
    assert ("model.encoder" in names(found, "audio_encoder")) == (choice == "model.*[r]")
    assert "chosen by the user" in found.sites["model.decoder"].found_by


def test_modules_are_taken_as_they_are(whisper: nn.Module) -> None:
    """A module of the model is its own name."""
    found = discover(whisper, choices={"projector": whisper.model.encoder.layer_norm})
    assert names(found, "projector") == ["model.encoder.layer_norm"]
    assert "projector" not in found.sites.missing


def test_auto_in_a_list_keeps_what_was_found(whisper: nn.Module) -> None:
    """ "auto" stands for the rules' sites, which keep the rule that found them; other roles are untouched."""
    plain = discover(whisper)
    found = discover(whisper, choices={"lm_head": ["auto", "model.decoder.layer_norm", "proj_*"]})
    assert names(found, "lm_head") == ["model.decoder.layer_norm", "proj_out"]
    assert found.sites["proj_out"] == plain.sites["proj_out"]
    assert names(found, "attention") == names(plain, "attention")
    assert discover(whisper, choices={"lm_head": "auto"}).sites == plain.sites


def test_custom_adds(whisper: nn.Module) -> None:
    """Role "custom" leaves all other sites as they are; a module that has a site already keeps its role."""
    plain = discover(whisper)
    found = discover(whisper, choices={"custom": ["model.decoder.layers.*.fc1", "model.encoder"]})
    assert names(found, "custom") == ["model.decoder.layers.0.fc1", "model.decoder.layers.1.fc1"]
    assert [site for site in found.sites if site.role != "custom"] == list(plain.sites)
    assert found.modules["model.decoder.layers.1.fc1"] is whisper.model.decoder.layers[1].fc1


def test_a_chosen_role_wins_over_a_found_one(whisper: nn.Module) -> None:
    """A module that was found in one role and chosen for another has the chosen one, and one site only."""
    found = discover(whisper, choices={"projector": "proj_out"})
    assert names(found, "projector") == ["proj_out"]
    assert names(found, "lm_head") == []
    assert [site.name for site in found.sites].count("proj_out") == 1


def test_of_two_chosen_roles_the_more_specific_wins(whisper: nn.Module) -> None:
    """One module, two chosen roles: a head is more specific than a projector."""
    found = discover(whisper, choices={"projector": "proj_out", "lm_head": "proj_out"})
    assert (names(found, "lm_head"), names(found, "projector")) == (["proj_out"], [])


def test_kinds_of_chosen_attention_follow_the_same_rule(whisper: nn.Module) -> None:
    """Chosen attention layers have the kind that they would have been found with."""
    plain = discover(whisper)
    found = discover(whisper, choices={"attention": "*.layers.0.*_attn"})
    assert {site.name: site.kind for site in found.sites.of("attention")} == {
        site.name: site.kind for site in plain.sites.of("attention") if ".layers.0." in site.name
    }
    assert {site.kind for site in found.sites.of("attention")} == {"encoder", "decoder", "cross"}


def test_kind_follows_a_chosen_encoder() -> None:
    """What lies inside an encoder that the user named attends as an encoder's layers do, and makes the rest joint."""
    model = models.CASES["llama"].build(0)
    found = discover(model, choices={"audio_encoder": "model.layers.0"})
    kinds = {site.name: site.kind for site in found.sites.of("attention")}
    assert kinds == {"model.layers.0.self_attn": "encoder", "model.layers.1.self_attn": "joint"}


def test_chosen_heads_and_branches_have_a_modality() -> None:
    """Heads and branches that the user names are told apart as found ones are."""
    model = models.CASES["original"].build(0)
    plain = discover(model)
    found = discover(model, choices={"lm_head": "*lm_head", "feed_forward": ["*.layers.1.audio_mlp", "*.layers.1.mlp"]})
    for role in ("lm_head", "feed_forward"):
        assert {(site.name, site.modality, site.codebooks) for site in found.sites.of(role)} == {
            (site.name, site.modality, site.codebooks) for site in plain.sites.of(role)
        }


def test_an_empty_list_leaves_the_role_empty(whisper: nn.Module) -> None:
    """Switched off on purpose, and said so; "auto" that finds nothing has the usual reason."""
    found = discover(whisper, choices={"attention": [], "projector": ["auto"]})
    assert names(found, "attention") == []
    assert "on purpose" in found.sites.missing["attention"]
    assert "cross-attention" in found.sites.missing["projector"]


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        ("model.encodr", r"'model\.encodr'.*nearest.*'model\.encoder'"),
        ("model.encodr.*", r"nearest.*'model\.encoder'"),
        (["auto", "zzzz"], "no module is called 'zzzz'"),
        ("", "no module is called ''"),
        (nn.Linear(2, 2), "Linear is not a module of the model"),
    ],
)
def test_what_matches_nothing_is_an_error(whisper: nn.Module, choice: Any, message: str) -> None:
    """Names, patterns and modules that are not there: SiteError, with the nearest names where there are any."""
    with pytest.raises(SiteError, match=message):
        discover(whisper, choices={"audio_encoder": choice})
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in whisper.modules())


def test_the_root_is_not_to_be_chosen(whisper: nn.Module) -> None:
    """The whole model has its own site already."""
    with pytest.raises(SiteError, match="role 'model'"):
        discover(whisper, choices={"custom": whisper})


def test_other_types_and_roles_are_refused(whisper: nn.Module) -> None:
    """A number is no site; a role that does not exist is named with those that do."""
    with pytest.raises(ProbeTypeError, match="int 3"):
        discover(whisper, choices={"custom": [3]})
    with pytest.raises(SiteError, match=r"'encoder'.*audio_encoder"):
        discover(whisper, choices={"encoder": "model.encoder"})


def test_a_module_chosen_before_peft_leads_to_what_runs_now() -> None:
    """Modules that PEFT replaced after the choice: the site is the copy, or the LoRA layer, that runs in their place."""
    model = models.CASES["llama"].build(0)
    head, projection = model.lm_head, model.model.layers[0].self_attn.q_proj
    choices = {"lm_head": head, "custom": [projection]}
    tuned = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"]))
    found = discover(tuned, choices=choices)
    assert found.modules["lm_head"] is model.lm_head.modules_to_save["default"]
    assert found.modules["model.layers.0.self_attn.q_proj"] is model.model.layers[0].self_attn.q_proj


def test_modules_become_names_and_names_move_below_a_prefix() -> None:
    """A choice made for one module holds for a model that contains it; no module is kept."""
    model = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.Linear(2, 2)))
    choices = named_choices(model, {"custom": [model[1][0], "auto", "0"], "lm_head": model[0]})
    assert choices == {"custom": ["1.0", "auto", "0"], "lm_head": ["0"]}
    assert choices_below("inner", choices) == {"custom": ["inner.1.0", "auto", "inner.0"], "lm_head": ["inner.0"]}
    assert choices_below("", choices) is choices
    assert named_choices(model, "auto") == choices_below("inner", "auto") == "auto"
    with pytest.raises(SiteError, match="not a module of the model"):
        named_choices(model, {"custom": nn.Linear(1, 1)})
