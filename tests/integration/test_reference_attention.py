"""Mass on reference audio, end to end: what a record says of a real training step equals what eager attention gives on a copy."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from statistics import fmean
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import TrainerCallback

import models
from modality_by_hand import by_hand
from models.case import Case
from probe.records import StepRecord
from probe.sites.modality import AUDIO, REFERENCE, TEXT
from watching import observed_run

SPEAKERS = [name for name in ("higgs_audio_v2", "original") if models.CASES[name].available()]
QUERIES = {"text": TEXT, "audio": AUDIO}


class Copies(TrainerCallback):
    """Keeps a copy of the model as each step finds it."""

    def __init__(self) -> None:
        self.models: list[nn.Module] = []

    def on_step_begin(self, args: Any, state: Any, control: Any, model: nn.Module, **kwargs: Any) -> None:
        self.models.append(copy.deepcopy(model))


class Probabilities(TorchFunctionMode):
    """Collects softmax(q·kᵀ/√d + mask) of every call of ``scaled_dot_product_attention``, in float64."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Tensor] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__name__", "") == "scaled_dot_product_attention":
            q, k = args[0].double(), args[1].double()
            self.seen.append((q @ k.mT / math.sqrt(q.shape[-1])).masked_fill(~kwargs["attn_mask"], -torch.inf).softmax(-1))
        return func(*args, **kwargs)


def quiet(case: Case) -> Case:
    """Return the case without anything random."""

    def build(seed: int) -> nn.Module:
        model = case.build(seed)
        for module in model.modules():
            for rate in ("dropout", "attention_dropout", "layerdrop"):
                if isinstance(getattr(module, rate, None), float):
                    setattr(module, rate, 0.0)
        return model

    return replace(case, build=build)


def trained(
    case: Case, change: Callable[[dict[str, Any]], None] | None = None
) -> tuple[tuple[StepRecord, ...], list[nn.Module], list[Any]]:
    """Train two steps of three samples, every row sampled; return records, the model before each step, and the batches.

    ``change`` is done to each batch, if given.
    """
    batches: list[Any] = []
    copies = Copies()

    def collate(samples: Sequence[Any]) -> Any:
        batch = case.collate(samples)
        if change is not None:
            change(batch)
        batches.append(batch)
        return batch

    _, records = observed_run(
        replace(quiet(case), collate=collate),
        options={"rows": 10_000},
        max_steps=2,
        samples=6,
        per_device_train_batch_size=3,
        built=lambda trainer: trainer.add_callback(copies),
    )
    return records, copies.models, batches


def eager(case: Case, model: Any, batch: Any) -> list[Tensor]:
    """Return the probabilities (B, H, S, S) of each joint layer in evaluation."""
    given = {name: batch[name] for name in batch.keys()}  # noqa: SIM118  (the original's batch is no mapping)
    if case.name == "original":
        with torch.no_grad(), Probabilities() as mode:
            model.eval()(**given)
        return mode.seen
    model.set_attn_implementation("eager")
    with torch.no_grad():
        return list(model.eval()(**given, output_attentions=True).attentions)


def mass(p_BHSK: Tensor, codes_BS: Tensor, queries: int, keys: Callable[[Tensor], Tensor]) -> float:
    """Return the mean mass that rows of one modality put on keys, over rows that see such a key; plain loops over rows."""
    values = []
    for b, codes in enumerate(codes_BS):
        for s in range(len(codes)):
            visible = keys(codes) & (p_BHSK[b, :, s].amax(0) > 0)
            if codes[s] == queries and visible.any():
                values.append(float(p_BHSK[b, :, s][:, keys(codes)].sum(-1).mean()))
    return fmean(values)


@pytest.mark.parametrize("name", SPEAKERS)
def test_mass_on_the_reference_is_that_of_eager_attention(name: str) -> None:
    """Of text and of target audio, over all joint layers; and audio as a whole includes the reference."""
    case = models.CASES[name]
    records, copies, batches = trained(case)
    for record, model, batch in zip(records, copies, batches, strict=True):
        codes, layers = by_hand(case, batch), eager(case, model, batch)
        assert len(layers) == len(case.attention["joint"])
        for who, queries in QUERIES.items():
            on_reference = fmean(mass(p, codes, queries, lambda row: row == REFERENCE) for p in layers)
            assert 0.01 < on_reference < 0.99
            assert record.metrics[f"probe/attention/{who}_to_reference"] == pytest.approx(on_reference, abs=2e-6)
            assert f"probe/attention/{who}_to_reference" not in record.not_measured
        on_audio = fmean(mass(p, codes, TEXT, lambda row: row >= AUDIO) for p in layers)
        assert record.metrics["probe/attention/text_to_audio"] == pytest.approx(on_audio, abs=2e-6)


@pytest.mark.skipif("higgs_audio_v2" not in SPEAKERS, reason="transformers has no Higgs Audio v2")
def test_every_head_s_mass_on_the_reference() -> None:
    """Known before the layers run, the mass is there for every head, too."""
    case = models.CASES["higgs_audio_v2"]
    records, copies, batches = trained(case)
    codes, layers = by_hand(case, batches[0]), eager(case, copies[0], batches[0])
    for row, p_BHSK in zip(records[0].attention, layers, strict=True):
        assert row.per_head is not None
        each = [mass(p_BHSK[:, head : head + 1], codes, TEXT, lambda row: row == REFERENCE) for head in range(row.heads)]
        assert row.per_head.text_to_reference == pytest.approx(each, abs=2e-6)


def without_labels(batch: dict[str, Any]) -> None:
    """Drop what tells reference from target."""
    del batch["audio_labels"]


def all_labelled(batch: dict[str, Any]) -> None:
    """Let the model learn the reference's codes, too."""
    batch["audio_labels"] = batch["audio_input_ids"].clone()


@pytest.mark.skipif("higgs_audio_v2" not in SPEAKERS, reason="transformers has no Higgs Audio v2")
@pytest.mark.parametrize(
    ("change", "why"),
    [
        (without_labels, "no audio labels among the inputs tell reference from target"),
        (all_labelled, "no run of audio in this step is without labels"),
    ],
)
def test_a_speaker_of_which_no_reference_is_known(change: Callable[[dict[str, Any]], None], why: str) -> None:
    """The key is absent and the reason there; the mass on audio as a whole is as if nobody had asked."""
    case = models.CASES["higgs_audio_v2"]
    records, copies, batches = trained(case, change)
    for record, model, batch in zip(records, copies, batches, strict=True):
        codes, layers = by_hand(case, batch), eager(case, model, batch)
        for who in QUERIES:
            assert f"probe/attention/{who}_to_reference" not in record.metrics
            assert record.not_measured[f"probe/attention/{who}_to_reference"] == why
        on_audio = fmean(mass(p, codes, TEXT, lambda row: row >= AUDIO) for p in layers)
        assert record.metrics["probe/attention/text_to_audio"] == pytest.approx(on_audio, abs=2e-6)


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("whisper", "the decoder reads the audio through cross-attention"),
        ("qwen2_audio", "the model predicts no audio: all its audio is input, see text_to_audio"),
        ("voxtral", "the model predicts no audio: all its audio is input, see text_to_audio"),
    ],
)
def test_a_listener_has_no_reference(name: str, why: str) -> None:
    """A model that predicts no audio says so; Whisper says where its audio is looked at."""
    case = models.CASES[name]
    if not case.available():
        pytest.skip("the installed transformers does not have it")
    records, _, _ = trained(case)
    for record in records:
        for who in QUERIES:
            assert f"probe/attention/{who}_to_reference" not in record.metrics
            assert record.not_measured[f"probe/attention/{who}_to_reference"] == why
