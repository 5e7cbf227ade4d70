"""How a model's class puts its loss together: the mean by the source of ``forward``, the heads by what is known of the class."""

from __future__ import annotations

from functools import wraps
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import MixtralConfig, MixtralForCausalLM

import models
from models.case import Case
from models.original import OriginalModel
from probe.records import Site
from probe.sites import reduction
from probe.sites.discovery import discover
from probe.sites.facts import core_model
from probe.sites.reduction import Reduction, Term, loss_mean, read_reduction


class HiggsAudioModel(OriginalModel):
    """The original-style model under the class name that such models have."""


class Own(nn.Module):
    def forward(self, x: Tensor, labels: Tensor, **kwargs: Any) -> Tensor:
        return nn.CrossEntropyLoss()(x, labels)


class Summed(nn.Module):
    def forward(self, x: Tensor, labels: Tensor, **kwargs: Any) -> Tensor:
        return nn.functional.cross_entropy(x, labels, reduction="sum")


class Counted(nn.Module):
    def forward(self, x: Tensor, labels: Tensor, **kwargs: Any) -> Tensor:
        return self.loss_function(x, labels, 8, **kwargs)


class ByName(nn.Module):
    def forward(self, x: Tensor, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
        return self.loss_function(x, labels, 8, num_items_in_batch=num_items_in_batch)


class Forgotten(nn.Module):
    def forward(self, x: Tensor, labels: Tensor, **kwargs: Any) -> Tensor:
        return self.loss_function(x, labels, 8)


class Mixed(nn.Module):
    def forward(self, x: Tensor, labels: Tensor, **kwargs: Any) -> Tensor:
        return self.loss_function(x, labels, 8, **kwargs) + nn.CrossEntropyLoss()(x, labels)


class Silent(nn.Module):
    def forward(self, x: Tensor, labels: Tensor, **kwargs: Any) -> Tensor:
        return (x - labels).square().mean()


class Delegates(nn.Module):
    """Hands its labels to a module inside it."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = nn.Module()
        self.inner.model = inner

    def forward(self, x: Tensor, labels: Tensor, **kwargs: Any) -> Tensor:
        return self.inner.model(x, labels=labels, **kwargs)


class DelegatesLess(Delegates):
    """Hands on the labels, and nothing else."""

    def forward(self, x: Tensor, labels: Tensor, **kwargs: Any) -> Tensor:
        return self.inner.model(x, labels=labels)


@pytest.mark.parametrize(
    ("module", "by"),
    [
        (Own(), "micro-batch"),
        (Counted(), "items"),
        (ByName(), "items"),
        (Forgotten(), "micro-batch"),
        (Delegates(Counted()), "items"),
        (Delegates(Own()), "micro-batch"),
        (DelegatesLess(Counted()), "micro-batch"),
        (Delegates(Delegates(Counted())), "items"),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_the_source_tells_the_mean(module: nn.Module, by: str) -> None:
    """A loss function that is given forward's keyword arguments counts items; a cross-entropy of its own takes the micro-batch's mean."""
    assert loss_mean(module) == (by, "")


@pytest.mark.parametrize(
    ("module", "why"),
    [
        (Summed(), "Summed.forward calls a cross-entropy without a mean"),
        (Mixed(), "Mixed.forward takes its mean in more than one way"),
        (Silent(), "Silent.forward calls no loss function that is known"),
        (Delegates(Silent()), "Silent.forward calls no loss function that is known"),
    ],
    ids=lambda value: value[:8] if isinstance(value, str) else type(value).__name__,
)
def test_what_the_source_does_not_tell_is_said(module: nn.Module, why: str) -> None:
    """What cannot be read is named, never guessed."""
    assert loss_mean(module) == (None, why)


class Loops(nn.Module):
    """Hands its labels to itself."""

    @property
    def again(self) -> nn.Module:
        return self

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        return self.again(x, labels=labels)


def test_handing_on_has_an_end() -> None:
    """Modules that hand labels on in a circle are given up on."""
    assert loss_mean(Loops()) == (None, "Loops.forward calls no loss function that is known")


def test_source_that_cannot_be_read() -> None:
    """A forward without source is no error."""
    module = Own()
    exec("def forward(self, x): return x", made := {})
    module.forward = made["forward"].__get__(module)
    assert loss_mean(module) == (None, "the source of Own.forward cannot be read")


def test_a_wrapped_forward_is_unwrapped() -> None:
    """accelerate and others put a wrapper round forward on the instance; the source is that of the function inside."""
    module = Own()
    plain = module.forward.__func__

    @wraps(plain)
    def wrapped(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return plain(self, *args, **kwargs)

    module.forward = wrapped.__get__(module)
    assert loss_mean(module) == ("micro-batch", "")


def of(case: Case) -> Reduction:
    model = case.build(0)
    found = discover(model, choices={})
    return read_reduction(model, found.sites.sites, found.facts)


@pytest.mark.parametrize("case", [c for c in models.available_cases() if c.name != "original"], ids=lambda case: case.name)
def test_source_and_table_agree(case: Case) -> None:
    """In the installed version the source of every known class says what the table says, so either would do."""
    core = core_model(case.build(0))
    assert loss_mean(core) == (reduction._KNOWN[type(core).__name__], "")
    found = of(case)
    assert found.reason == ""
    assert found.by == reduction._KNOWN[found.model_class]
    assert found.label_shift == case.shift


def test_one_head_is_its_own_loss() -> None:
    """A model with one head has one term of weight 1."""
    assert of(models.CASES["llama"]).terms == (Term("lm_head", None, "text", 1.0),)
    assert of(models.CASES["llama"]).together == ""


@pytest.mark.skipif(not models.CASES["higgs_audio_v2"].available(), reason="the installed transformers has no HiggsAudioV2")
def test_higgs_audio_v2_adds_its_codebooks() -> None:
    """Text plus the sum of the codebooks."""
    found = of(models.CASES["higgs_audio_v2"])
    assert found.together == "text + sum of 4 codebooks"
    assert set(found.terms) == {Term("text_lm_head", None, "text"), *(Term("audio_lm_head", book, "audio", 1.0) for book in range(4))}


def test_the_original_takes_the_mean_of_its_codebooks() -> None:
    """Text plus the mean of the codebooks, under the class name that such models have; under another name it is not known."""
    model = models.CASES["original"].build(0)
    found = discover(model, choices={})
    unknown = read_reduction(model, found.sites.sites, found.facts)
    assert unknown.reason == "how OriginalModel puts 2 heads together is not known"
    assert unknown.terms == ()
    model.model.__class__ = HiggsAudioModel
    found = discover(model, choices={})
    known = read_reduction(model, found.sites.sites, found.facts)
    assert (known.reason, known.by, known.together) == ("", "micro-batch", "text + mean of 3 codebooks")
    assert {(term.codebook, term.weight) for term in known.terms if term.modality == "audio"} == {(k, 1 / 3) for k in range(3)}


def test_codebooks_and_heads_of_unknown_classes() -> None:
    """Several heads, or one of several codebooks, are added up only where it is known how."""
    model = models.CASES["llama"].build(0)
    facts = discover(model, choices={}).facts
    text = Site("lm_head", "lm_head", "", modality="text")
    audio = Site("audio_head", "lm_head", "", modality="audio", codebooks=8)
    assert read_reduction(model, [audio], facts).reason == "how LlamaForCausalLM puts 8 codebooks together is not known"
    assert read_reduction(model, [text, audio], facts).reason == "how LlamaForCausalLM puts 2 heads together is not known"
    assert read_reduction(model, [], facts).reason == "no LM head was found"


def test_unknown_mean_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    """A class that neither source nor table tells of is not audited, and the reason says what could not be read."""
    model = models.CASES["llama"].build(0)
    found = discover(model, choices={})
    monkeypatch.setattr(type(model), "forward", Silent.forward)
    assert read_reduction(model, found.sites.sites, found.facts).by == "items"  # the table
    monkeypatch.setattr(reduction, "_KNOWN", {})
    why = read_reduction(model, found.sites.sites, found.facts).reason
    assert why.startswith("over what LlamaForCausalLM takes the mean of its loss is not known: ")
    assert why.endswith("LlamaForCausalLM.forward calls no loss function that is known")


def test_the_auxiliary_weight_is_the_configs() -> None:
    """A mixture of experts declares the weight of its auxiliary loss; other models have none."""
    torch.manual_seed(0)
    config = MixtralConfig(
        hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, num_key_value_heads=1, vocab_size=16,
        router_aux_loss_coef=0.25,
    )  # fmt: skip
    model = MixtralForCausalLM(config)
    found = discover(model, choices={})
    assert read_reduction(model, found.sites.sites, found.facts).auxiliary == 0.25
    assert of(models.CASES["llama"]).auxiliary == 0.0
