"""Under torch.compile: sampled steps run eagerly and are seen, or stay compiled and report; nothing is recompiled either way."""

from __future__ import annotations

import copy
import os
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional
from transformers import TrainerCallback

import probe
from models import CASES
from models.running import assert_identical, run
from probe.attachment import REGISTRY
from probe.capture.in_graph import ReportingHook

WIDTH = 40


def of_one_shape(samples: Any) -> dict[str, Tensor]:
    """Pad every batch to the same width, so that one graph serves all steps and a recompile can only be the probe's."""
    batch = CASES["llama"].collate(samples)
    fill = {"input_ids": CASES["llama"].tokenizer().pad_token_id, "attention_mask": 0, "labels": -100}
    return {name: functional.pad(tensor, (0, WIDTH - tensor.shape[1]), value=fill[name]) for name, tensor in batch.items()}


LLAMA = replace(CASES["llama"], collate=of_one_shape)
COMPILED = {"torch_compile": True, "torch_compile_backend": "eager"}


@pytest.fixture(autouse=True)
def _fresh() -> Any:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    for attached in REGISTRY.all():
        attached.detach()
    torch._dynamo.reset()
    for name in [name for name in os.environ if name.startswith("ACCELERATE_DYNAMO_")]:
        del os.environ[name]  # transformers 4 leaves it to accelerate there, and later Trainers would compile their models, too


def graphs() -> int:
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def records(result: Any) -> Any:
    return probe.load(result.trainer.args.output_dir).records


def test_sampled_steps_are_seen_and_nothing_is_recompiled(capsys: pytest.CaptureFixture[str]) -> None:
    """The window sees every site in exactly the sampled steps; no more graphs are compiled than without the probe."""
    plain = run(LLAMA, max_steps=6, **COMPILED)
    expected = graphs()
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    observed = run(LLAMA, attach=lambda model: probe.attach(model, every=3), max_steps=6, **COMPILED)
    assert 1 <= graphs() <= expected
    assert [record.step for record in records(observed)] == [1, 3, 6]
    for record in records(observed):
        assert [row.calls for row in record.attention] == [1, 1]
        assert [head.calls for head in record.heads] == [1]
    assert observed.losses == pytest.approx(plain.losses, abs=2e-3)
    assert capsys.readouterr().out.count("sampled steps of this compiled model run eagerly") == 1


def test_off_leaves_a_compiled_model_alone_and_says_why() -> None:
    """compile='off': bit-identical, no graph more, and the reason stands where the numbers would; loss and gradients are measured."""
    plain = run(LLAMA, max_steps=3, **COMPILED)
    expected = graphs()
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    observed = run(LLAMA, attach=lambda model: probe.attach(model, every=1, compile="off"), max_steps=3, **COMPILED)
    assert graphs() == expected
    assert observed.losses == plain.losses
    last = records(observed)[-1]
    assert "compile='off'" in last.not_measured["model"]
    assert "probe/text/loss" not in last.metrics
    assert "compile='off'" in last.not_measured["probe/text/loss"]
    assert "compile='off'" in last.not_measured["site:lm_head"]
    assert not [why for why in last.not_measured.values() if "not called" in why]
    assert last.metrics["probe/loss"] == pytest.approx(observed.losses[-1], abs=1e-4)
    assert "probe/grad/norm" in last.metrics


def test_regional_compile_is_seen_too() -> None:
    """Layers compiled one by one are recognised without any Trainer argument."""

    def attach(model: Any) -> Any:
        for layer in model.model.layers:
            layer.compile(backend="eager")
        return probe.attach(model, every=2)

    observed = run(LLAMA, attach=attach, max_steps=4)
    assert [[row.calls for row in record.attention] for record in records(observed)] == [[1, 1]] * 3


def compiled_layers(model: Any) -> None:
    for layer in model.model.layers:
        layer.compile(backend="aot_eager")


@pytest.mark.parametrize("recomputing", [False, True], ids=["plain", "checkpointing"])
@pytest.mark.parametrize("regional", [False, True], ids=["whole", "layers"])
def test_in_graph_leaves_sampled_steps_compiled(regional: bool, recomputing: bool, capsys: pytest.CaptureFixture[str]) -> None:
    """Dropout on, everything is bit-identical on sampled steps too, with as many graphs; every site is counted once a micro-batch."""
    options: dict[str, Any] = {"max_steps": 4, "gradient_accumulation_steps": 2}
    backend = "aot_eager" if recomputing else "eager"  # whole models take long to compile
    options |= {} if regional else {"torch_compile": True, "torch_compile_backend": backend}
    options |= {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}} if recomputing else {}

    def attach(model: Any) -> Any:
        if regional:
            compiled_layers(model)
        return probe.attach(model, every=2, compile="in_graph")

    plain = run(LLAMA, attach=compiled_layers if regional else None, **options)
    expected = graphs()
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    observed = run(LLAMA, attach=attach, **options)
    assert graphs() == expected
    assert_identical(plain, observed)
    assert "run eagerly" not in capsys.readouterr().out
    assert [record.step for record in records(observed)] == [1, 2, 4]
    for record in records(observed):
        assert {row.site: row.calls for row in record.statistics} == dict.fromkeys(SITES, 2)
        assert record.metrics["probe/text/loss"] == pytest.approx(record.metrics["probe/loss"], rel=1e-4)
        assert record.metrics["probe/loss_audit/ratio"] == pytest.approx(1.0, rel=1e-4)
        assert "probe/grad/norm" in record.metrics
        assert record.metrics["probe/input/samples"] == 4
        assert not [why for why in record.not_measured.values() if "switched off" in why or "not called" in why]


SITES = ("model.layers.0.self_attn", "model.layers.1.self_attn", "lm_head")


def test_in_graph_measures_what_an_uncompiled_run_does() -> None:
    """Statistics and heads of the first step are those of the same step without torch.compile, within rounding."""
    eager = run(LLAMA, attach=lambda model: probe.attach(model, every=1), max_steps=1)
    inside = run(LLAMA, attach=lambda model: probe.attach(model, every=1, compile="in_graph"), max_steps=1, **COMPILED)
    (wanted,), (found,) = records(eager), records(inside)
    for one, other in zip(wanted.statistics, found.statistics):
        assert (one.site, one.calls, one.shape, one.elements) == (other.site, other.calls, other.shape, other.elements)
        assert [other.mean, other.rms, other.std] == pytest.approx([one.mean, one.rms, one.std], rel=1e-5, abs=1e-6)
    for name in ("loss", "token_accuracy", "top5_accuracy", "entropy", "calibration_error"):
        assert found.metrics[f"probe/text/{name}"] == pytest.approx(wanted.metrics[f"probe/text/{name}"], rel=1e-5)


def test_what_in_graph_does_not_see_is_named() -> None:
    """Attention rows and gradients of activations: the reason stands at the metric, at the layer and at the concern."""
    observed = run(LLAMA, attach=lambda model: probe.attach(model, every=1, compile="in_graph"), max_steps=1, **COMPILED)
    (record,) = records(observed)
    assert record.attention == () and record.activation_gradients == ()
    layers = [site for site in SITES if site != "lm_head"]
    for what in ("attention", "activation_gradients", "probe/attention/entropy", *(f"attention:{site}" for site in layers)):
        assert "compile='in_graph'" in record.not_measured[what]
    for site in SITES:
        assert "compile='in_graph'" in record.not_measured[f"activation_gradient:{site}"]
    assert not [what for what in record.not_measured if what.startswith("unseen")]


def test_in_graph_without_a_compiled_region_is_the_window() -> None:
    """On a model that is not compiled nothing stands between steps, and everything is seen."""
    found: list[int] = []

    class Lookout(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
            found.append(sum(isinstance(hook, ReportingHook) for module in model.modules() for hook in module._forward_hooks.values()))

    observed = run(
        LLAMA,
        attach=lambda model: probe.attach(model, every=1, compile="in_graph"),
        built=lambda trainer: trainer.add_callback(Lookout()),
        max_steps=2,
    )
    assert found == [0, 0]
    for record in records(observed):
        assert [row.calls for row in record.attention] == [1, 1]
        assert len(record.activation_gradients) == 3


def test_in_graph_takes_its_hooks_away_when_training_ends() -> None:
    """While it trains the model's state_dict is its own and it copies; afterwards each module's dictionary is as before."""
    states: list[list[str]] = []

    class Copier(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
            states.append(list(copy.deepcopy(model).state_dict()))

    plain = run(LLAMA, max_steps=2, **COMPILED)
    torch._dynamo.reset()
    observed = run(
        LLAMA,
        attach=lambda model: probe.attach(model, every=2, compile="in_graph"),
        built=lambda trainer: trainer.add_callback(Copier()),
        max_steps=2,
        **COMPILED,
    )
    assert states == [list(plain.state_dict)] * 2
    assert_identical(plain, observed)
    for one, other in zip(plain.model.modules(), observed.model.modules()):
        assert set(vars(one)) == set(vars(other))
        assert len(one._forward_hooks) == len(other._forward_hooks)  # some versions of transformers leave their own
    again = observed.trainer
    again.args.max_steps = 4
    again.train(resume_from_checkpoint=None)
    assert {row.site: row.calls for row in records(observed)[-1].statistics} == dict.fromkeys(SITES, 1)
