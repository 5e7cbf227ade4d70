"""The gradient that reaches the embeddings of reference audio: against autograd on the decoder's first input, row by row."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import Trainer

import models
from modality_by_hand import by_hand
from models.case import Case
from models.running import VARIANTS
from probe.sites.discovery import discover
from probe.sites.modality import REFERENCE
from watching import observed_run

NAME = "probe/reference/gradient_norm"
CLONERS = [pytest.param(case, id=case.name) for case in models.available_cases() if case.name in ("higgs_audio_v2", "original")]
OTHERS = [pytest.param(case, id=case.name) for case in models.available_cases() if case.name not in ("higgs_audio_v2", "original")]
SEED, STEPS = 5, 2


class Entrances:
    """Notes the gradients (B, S, D) that reach what the first decoder layer is given, and which rows are reference, by hand."""

    def __init__(self, case: Case) -> None:
        self.case = case
        self.batches: list[Any] = []
        self.gradients: list[Tensor] = []

    def watch(self, trainer: Trainer) -> None:
        layer = trainer.model.get_submodule(discover(trainer.model).entrance)
        forward, step = layer.forward, trainer.training_step

        def noting(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
            if hidden_states.requires_grad and torch._C._current_graph_task_id() == -1:
                hidden_states.register_hook(lambda gradient: self.gradients.append(gradient.double().clone()))
            return forward(hidden_states, *args, **kwargs)

        def stepping(model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            self.batches.append(inputs)
            return step(model, inputs, *args, **kwargs)

        layer.forward, trainer.training_step = noting, stepping

    def norms(self, micro_batches: int) -> list[float]:
        """Return the norm over the reference rows of each step."""
        squares = []
        for batch, gradient in zip(self.batches, self.gradients, strict=True):
            codes = by_hand(self.case, batch)
            assert codes.shape == gradient.shape[:2]
            squares.append(float(gradient[codes == REFERENCE].square().sum()))
        return [math.sqrt(sum(squares[start : start + micro_batches])) for start in range(0, len(squares), micro_batches)]


@pytest.mark.parametrize("variant", list(VARIANTS))
@pytest.mark.parametrize("case", CLONERS)
def test_norm(case: Case, variant: str) -> None:
    """In every way of training the norm is that of the rows which are reference, over all micro-batches of the step."""
    if variant in case.unsupported:
        pytest.skip(case.unsupported[variant])
    seen = Entrances(case)
    _, records = observed_run(case, seed=SEED, max_steps=STEPS, built=seen.watch, **VARIANTS[variant])
    expected = seen.norms(2 if variant == "accumulation" else 1)
    assert len(records) == len(expected) == STEPS
    for record, norm in zip(records, expected):
        assert norm > 0
        assert record.metrics[NAME] == pytest.approx(norm, rel=1e-5)
        assert NAME not in record.not_measured


@pytest.mark.parametrize("case", OTHERS)
def test_models_that_have_no_reference(case: Case) -> None:
    """Models that predict no audio, or hear it through cross-attention, say so."""
    _, records = observed_run(case, seed=SEED, max_steps=1)
    expected = {"whisper": "cross-attention", "llama": "text and audio in one sequence"}.get(case.name, "predicts no audio")
    assert expected in records[0].not_measured[NAME]
    assert NAME not in records[0].metrics


@pytest.mark.parametrize("case", CLONERS)
def test_nothing_before_the_decoder_trains(case: Case) -> None:
    """With all that makes embeddings frozen no gradient reaches them, which is said."""

    def built(trainer: Trainer) -> None:
        for name, parameter in trainer.model.named_parameters():
            parameter.requires_grad_(".layers." in name and "audio_tower" not in name)

    _, records = observed_run(case, seed=SEED, max_steps=1, built=built)
    assert "needs no gradient" in records[0].not_measured[NAME]
