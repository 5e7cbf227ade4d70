"""Under torch.compile: sampled steps run eagerly and are seen, other steps stay compiled, nothing is recompiled."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

import probe
from models import CASES
from models.running import run
from probe.attachment import REGISTRY

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
