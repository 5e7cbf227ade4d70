"""Tests of the passes of one micro-batch on a small model: what is entered, what is left out and why, and what it costs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

import costs
from probe.capture.arguments import by_name
from probe.capture.microbatch import MicroBatch
from probe.capture.observers.root_call import RootCall
from probe.counterfactual import passes
from probe.counterfactual.conditions import Condition
from probe.counterfactual.effects import SUMS
from probe.counterfactual.passes import JOINED, NO_LOGITS, OTHER_ROWS, Experiment, Outcome, run_passes
from probe.counterfactual.scoring import NOT_CALLED, HeadRows, Samples, distribution, divergence, row_losses
from probe.records import Site
from probe.sites.facts import ModelFacts
from probe.sites.reference import INPUT_ONLY
from waiting import NoWaiting

pytestmark = pytest.mark.pure  # of torch and probe alone: the same with every transformers

TEXT = Site("head", "lm_head", "test", modality="text")
FACTS = ModelFacts("Test", "whisper", True, 7, 0, (), (), label_shift=0)
CONDITIONS = (Condition("input_features", "features"),)


class Model(nn.Module):
    """Predicts a label for each frame from the frame, through a head; ``output`` makes what it returns."""

    def __init__(self, output: Callable[[Tensor], Any] = lambda logits: {"logits": logits}) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.head = nn.Linear(4, 7)
        self.output = output
        self.calls = 0

    def forward(self, input_features: Tensor, labels: Tensor) -> Any:
        self.calls += 1
        return self.output(self.head(input_features.transpose(1, 2)))


def batch(samples: int = 3, frames: int = 5) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    features = torch.rand(samples, 4, frames, generator=generator)
    return {"input_features": features, "labels": torch.randint(7, (samples, frames), generator=generator)}


def made(model: nn.Module, inputs: Mapping[str, Tensor], *, admit: Callable[[str, int], bool] = lambda part, nbytes: True) -> Outcome:
    """Run the passes of one micro-batch."""
    call = RootCall(model, (), dict(inputs), MicroBatch(0, {}, by_name(model.forward, (), inputs)))
    heads = {} if not hasattr(model, "head") else {"head": TEXT}
    return run_passes(call, CONDITIONS, Experiment(heads, {"head": model.head}, FACTS, INPUT_ONLY), salt=1, reserve=admit)


def losses(model: Model, inputs: Mapping[str, Tensor], features: Tensor) -> Tensor:
    """Each sample's summed cross-entropy."""
    logits = model.head(features.transpose(1, 2))
    return -logits.log_softmax(-1).gather(-1, inputs["labels"].unsqueeze(-1)).sum((1, 2)).detach().double()


def test_the_table_holds_every_pass() -> None:
    """Loss and tokens as they are, then loss and tokens of each intervention in the order in which it was made."""
    model, inputs = Model(), batch()
    outcome = made(model, inputs)
    assert outcome.made == {"text": ("swap", "silence", "reverse")} and outcome.known == {"text": True} and outcome.reasons == {}
    features = inputs["input_features"]
    changed = [features.roll(-1, 0), torch.full_like(features, -1.5), features.flip(-1)]
    expected = [losses(model, inputs, each) for each in (features, *changed)]
    table = outcome.tables["text"]
    for column, each in zip((0, 2, 4, 6), expected, strict=True):
        torch.testing.assert_close(table[:, column], each, rtol=1e-6, atol=1e-6)
        assert table[:, column + 1].tolist() == [5, 5, 5]
    swap = dict(zip(SUMS, outcome.sums["text", "swap"].tolist(), strict=True))
    assert swap["changed"] - swap["loss"] == pytest.approx(float((expected[1] - expected[0]).sum()), rel=1e-6)
    assert swap["divergence_tokens"] == 15
    assert model.calls == 4


def test_an_intervention_that_is_not_defined_is_left_out() -> None:
    """With one sample there is no swap; the others are made."""
    outcome = made(Model(), batch(samples=1))
    assert outcome.made == {"text": ("silence", "reverse")}
    assert "one sample" in outcome.reasons["swap"]
    assert set(outcome.sums) == {("text", "silence"), ("text", "reverse")}


def test_nothing_runs_where_nothing_is_defined(monkeypatch: pytest.MonkeyPatch) -> None:
    """The pass as it is serves the others: without any of them it is not made."""
    monkeypatch.setattr(passes, "intervene", lambda what, *args, **kwargs: f"no {what}")
    model = Model()
    outcome = made(model, batch())
    assert model.calls == 0 and outcome.sums == {}
    assert outcome.reasons == {"swap": "no swap", "silence": "no silence", "reverse": "no reverse"}


def test_a_sample_that_is_not_reached_is_not_counted() -> None:
    """Two equal clips beside a third: each of the two takes the third's content, but a clip without another to take keeps its own."""
    inputs = batch(samples=2)
    inputs["input_features"][1] = inputs["input_features"][0]
    outcome = made(Model(), inputs)
    swap = dict(zip(SUMS, outcome.sums["text", "swap"].tolist(), strict=True))
    assert (swap["samples"], swap["tokens"], swap["divergence_tokens"]) == (0, 0, 0)
    assert dict(zip(SUMS, outcome.sums["text", "silence"].tolist(), strict=True))["samples"] == 2


def test_a_head_that_is_not_called() -> None:
    """Its losses come from what the output offers, without divergence; or there is nothing to make passes for, and only one is run."""

    class Fused(Model):
        def forward(self, input_features: Tensor, labels: Tensor) -> Any:
            self.calls += 1
            logits = self.head.forward(input_features.transpose(1, 2))
            return self.output(logits.log_softmax(-1).gather(-1, labels.unsqueeze(-1)).squeeze(-1))

    inputs = batch()
    offered = made(Fused(lambda log_probs: {"log_probs": log_probs}), inputs)
    torch.testing.assert_close(offered.tables["text"], made(Model(), inputs).tables["text"], rtol=1e-6, atol=1e-6)
    assert offered.reasons == {"text/divergence": NO_LOGITS}
    silent = Fused(lambda log_probs: {})
    outcome = made(silent, inputs)
    assert (outcome.sums, outcome.reasons[""], silent.calls) == ({}, NOT_CALLED, 1)


def test_samples_that_cannot_be_told_apart() -> None:
    """Rows that are not the samples' in order are one sample, which the outcome says."""
    model = Model()
    inputs = {**batch(), "labels": torch.randint(7, (6, 5), generator=torch.Generator().manual_seed(0))}
    model.forward = lambda input_features, labels: {"logits": model.head(torch.cat([input_features] * 2).transpose(1, 2))}  # type: ignore[method-assign]
    outcome = made(model, inputs)
    assert outcome.known == {"text": False} and outcome.reasons["text/samples"] == JOINED
    assert outcome.tables["text"].shape == (1, 8)
    assert dict(zip(SUMS, outcome.sums["text", "swap"].tolist(), strict=True))["tokens"] == 30


def test_other_rows_under_an_intervention_are_named() -> None:
    """A model whose number of rows depends on its audio cannot be compared row by row."""
    model = Model()
    short: list[int] = []

    def forward(input_features: Tensor, labels: Tensor) -> dict[str, Tensor]:
        short.append(1)
        frames = 5 if len(short) == 1 else 4
        return {"logits": model.head(input_features.transpose(1, 2)[:, :frames]), "expanded_labels": labels[:, :frames]}

    model.forward = forward  # type: ignore[method-assign,assignment]
    outcome = made(model, batch())
    assert outcome.sums == {}
    assert outcome.reasons == dict.fromkeys(("text/swap", "text/silence", "text/reverse"), OTHER_ROWS)


def test_the_budget_is_asked() -> None:
    """Four bytes a row, then four a row and entry of the vocabulary for the divergence; without the first nothing is made."""
    asked: list[tuple[str, int]] = []

    def admit(refused: str | None) -> Callable[[str, int], bool]:
        def asking(part: str, nbytes: int) -> bool:
            asked.append((part, nbytes))
            return part != refused

        return asking

    full = made(Model(), batch(), admit=admit(None))
    assert asked == [("", 4 * 15), ("text/divergence", 4 * 7 * 15)]
    narrow = made(Model(), batch(), admit=admit("text/divergence"))
    assert torch.equal(narrow.tables["text"], full.tables["text"])
    assert dict(zip(SUMS, narrow.sums["text", "swap"].tolist(), strict=True))["divergence_tokens"] == 0
    model = Model()
    assert made(model, batch(), admit=admit("")).sums == {} and model.calls == 1


def test_what_is_kept_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a large vocabulary as many rows are kept as fit, of a small one 64."""
    asked: list[int] = []
    monkeypatch.setattr(passes, "KEPT_MIB", 10 * 4 * 7 / 2**20)
    made(Model(), batch(samples=40), admit=lambda part, nbytes: asked.append(nbytes) is None)
    assert asked[1] == 10 * 4 * 7
    monkeypatch.undo()
    made(Model(), batch(samples=40), admit=lambda part, nbytes: asked.append(nbytes) is None)
    assert asked[3] == 64 * 4 * 7


def test_one_pass_is_held_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """When the inputs of a pass are made, and when it begins, the memory of those before is free: their logits, their changed inputs."""
    model, inputs = Model(), batch()
    earlier: list[StorageWeakRef] = []
    alive: list[int] = []
    forward, intervene = model.forward, passes.intervene

    def look() -> None:
        alive.append(sum(not storage.expired() for storage in earlier))

    def noting(input_features: Tensor, labels: Tensor) -> Any:
        look()
        output = forward(input_features, labels)
        earlier.append(StorageWeakRef(output["logits"].untyped_storage()))
        if input_features is not inputs["input_features"]:
            earlier.append(StorageWeakRef(input_features.untyped_storage()))
        return output

    def changing(*args: Any, **kwargs: Any) -> Any:
        look()
        return intervene(*args, **kwargs)

    model.forward = noting  # type: ignore[method-assign]
    monkeypatch.setattr(passes, "intervene", changing)
    assert made(model, inputs).sums
    assert len(earlier) == 7 and alive == [0] * 7


def test_nothing_waits_for_the_device() -> None:
    """Between the first intervention and the last sum no operator needs a value on the host."""
    model, inputs = Model(), batch()
    with NoWaiting() as mode:
        outcome = made(model, inputs)
    assert mode.operators > 50 and outcome.sums


def test_scoring_is_bounded_in_memory() -> None:
    """Logits of 30 MiB in bfloat16 (60 in float32) are scored within two chunks of 8 MiB, and compared within some more."""
    logits = torch.randn(2, 64, 120_000).to(torch.bfloat16)
    labels = torch.zeros(2, 64, dtype=torch.int64)
    assert costs.peak_mib(lambda: row_losses(logits, labels)) < 18
    rows = HeadRows(row_losses(logits, labels), Samples(2, True), logits)
    kept = distribution(rows, most=16, salt=0)
    assert kept is not None and kept.log_p_RV.numel() * 4 <= 8 * 2**20
    assert costs.peak_mib(lambda: divergence(kept, rows)) < 18
