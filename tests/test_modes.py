"""Modes of modules: which are in eval mode, which drop out, which adapters are off; in training and in evaluations."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn
from transformers import Trainer

import models
from probe.capture.observers.modes import ModeWatcher, read_modes
from probe.records import Modes, StepRecord
from probe.sites.adapters import adapter_layers, is_switched_off
from probe.sites.dropout import config_dropout, dropout_layers
from watching import observed_run

peft = pytest.importorskip("peft")
SEED = 4


class Drops(nn.Module):
    """Calls dropout as a function."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.attention_dropout, self.classifier_dropout, self.uses_dropout = rate, 0.5, True
        self.linear = nn.Linear(2, 2)


def tree() -> nn.Module:
    """Two branches: one with dropout layers and functions, one frozen, and a part without parameters."""
    branch = nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.1), nn.Dropout(0.0), nn.Dropout2d(0.2), Drops(0.3), Drops(0.0))
    frozen = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.Linear(2, 2)))
    frozen.requires_grad_(False)
    return nn.ModuleDict({"branch": branch, "frozen": frozen, "bare": nn.Sequential(nn.ReLU())}).train()


def test_a_model_in_training_mode() -> None:
    """Nothing is in eval mode; dropout layers are torch's and those that call a function, with a probability above 0."""
    assert read_modes(tree()) == Modes(dropout_modules=3, dropout_active=3)


def test_only_the_outermost_modules_in_eval_mode_are_named() -> None:
    """A branch is named and not what is in it; frozen modules and those without parameters are named apart."""
    model = tree()
    for name in ("branch", "frozen", "bare"):
        model[name].eval()
    model["branch"][1].train()
    assert read_modes(model) == Modes(("branch",), ("frozen", "bare"), dropout_modules=3, dropout_active=1)
    model["frozen"][1][0].weight.requires_grad_(True)
    assert read_modes(model).in_eval_mode == ("branch", "frozen")
    assert read_modes(model.eval()).in_eval_mode == ("",)


def test_a_module_deep_inside_is_named_by_its_canonical_name() -> None:
    """Names are those of sites: prefixes of wrappers are left out."""
    inner = tree()
    inner["branch"][0].eval()
    wrapped = torch.nn.Sequential()
    wrapped.add_module("module", inner)
    assert read_modes(wrapped).in_eval_mode == ("branch.0",)


def test_a_shared_module_is_named_once() -> None:
    """A module that stands in two places is one module."""
    shared = nn.Linear(2, 2).eval()
    model = nn.ModuleDict({"one": nn.Sequential(shared), "two": nn.Sequential(shared)})
    assert read_modes(model).in_eval_mode == ("one.0",)


def lora(model: nn.Module, dropout: float = 0.0) -> Any:
    return peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], lora_dropout=dropout))


def test_adapters_and_how_they_are_switched_off() -> None:
    """LoRA layers are counted once each; disabled, merged, and without an active adapter they are off; ``modules_to_save`` is none."""
    case = models.CASES["llama"]
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], modules_to_save=["lm_head"], lora_dropout=0.2)
    model = peft.get_peft_model(case.build(SEED), config).train()
    found = read_modes(model)
    assert (found.adapters, found.adapters_disabled) == (4, 0)
    assert found.dropout_modules == 2 + 4
    assert len(adapter_layers(case.build(SEED))) == 0
    layers = adapter_layers(model)
    layers[0].enable_adapters(False)
    layers[1].merge()
    layers[2].set_adapter([])
    assert [is_switched_off(layer) for layer in layers] == [True, True, True, False]
    assert read_modes(model).adapters_disabled == 3


@pytest.mark.parametrize("case", [pytest.param(case, id=case.name) for case in models.available_cases()])
def test_the_models_of_the_tests(case: models.case.Case) -> None:
    """Every model has dropout that is active in training and not in evaluation, and a rate in its config (or layers of its own)."""
    model = case.build(SEED)
    layers = dropout_layers(model.train())
    assert layers
    assert all(layer.training for layer in layers)
    assert read_modes(model).dropout_active == len(layers)
    assert read_modes(model.eval()).dropout_active == 0
    assert config_dropout(model) == (None if case.name == "original" else 0.1)


class StaysInEval(Trainer):
    """Its training steps leave modes as they are."""

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> torch.Tensor:
        model.get_submodule("model.layers.1").eval()
        loss = self.compute_loss(model, self._prepare_inputs(inputs))
        self.accelerator.backward(loss)
        return loss.detach()


class DropsInEvaluation(Trainer):
    """Evaluates in training mode."""

    def prediction_step(self, model: nn.Module, *args: Any, **kwargs: Any) -> Any:
        model.train()
        return super().prediction_step(model, *args, **kwargs)


def modes_of(records: tuple[StepRecord, ...]) -> list[Modes]:
    found = [record.modes for record in records]
    assert all(modes is not None for modes in found)
    return [modes for modes in found if modes is not None]


def test_a_module_that_a_training_leaves_in_eval_mode_is_in_the_record() -> None:
    """The modes are those inside the training forward; the layer's own dropout is not active there."""
    case = replace(models.CASES["llama"], trainer_class=StaysInEval)
    _, records = observed_run(case, seed=SEED, max_steps=2)
    for modes in modes_of(records):
        assert modes.in_eval_mode == ("model.layers.1",)
        assert (modes.dropout_modules, modes.dropout_active, modes.dropout_in_evaluation) == (2, 1, None)


@pytest.mark.parametrize(("trainer", "active"), [(Trainer, 0), (DropsInEvaluation, 2)])
def test_dropout_in_evaluations(trainer: type[Trainer], active: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each evaluation is looked at once, also between sampled steps; before the first one nothing is known."""
    looked: list[nn.Module] = []
    evaluating = ModeWatcher.evaluating
    monkeypatch.setattr(ModeWatcher, "evaluating", lambda self, model: (looked.append(model), evaluating(self, model))[1])
    case = replace(models.CASES["llama"], trainer_class=trainer)
    result, records = observed_run(case, options={"every": 3}, seed=SEED, max_steps=6, samples=12, eval_strategy="steps", eval_steps=2)
    found = {record.step: modes.dropout_in_evaluation for record, modes in zip(records, modes_of(records), strict=True)}
    assert found == {1: None, 3: active, 6: active}
    assert len(result.trainer.get_eval_dataloader()) == 3
    assert looked == [result.model] * 3


def test_adapters_of_a_training() -> None:
    """The record counts adapters, those that are off, and those whose output weights are still all 0."""
    case = models.CASES["llama"]
    adapted = replace(case, build=lambda seed: lora(case.build(seed)))
    _, records = observed_run(adapted, seed=SEED, max_steps=3, warmup_steps=1)
    assert [(m.adapters, m.adapters_disabled, m.adapters_zero) for m in modes_of(records)] == [(4, 0, 4), (4, 0, 4), (4, 0, 0)]
    assert modes_of(records)[0].in_eval_mode == ()
