"""Heads that never run: losses that read the head's weight themselves, logits of some positions only, a head called twice.

Shapes: B samples, S tokens, D width, V vocabulary.
"""

from __future__ import annotations

import copy
import inspect
import re
import types
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import peft
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LlamaForCausalLM, Trainer, TrainerCallback
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils import ModelOutput

import models
import probe
from models.case import Case
from models.running import VARIANTS, assert_identical, run
from probe.attachment import REGISTRY
from probe.capture.observers import head_unseen
from probe.records import Head, StepRecord
from watching import observed_run

LLAMA, WHISPER = models.CASES["llama"], models.CASES["whisper"]
SEED = 5


@dataclass
class FusedOutput(ModelOutput):
    """What TRL's fused head returns: no logits, but what it made of them at each position that has a next one, (B, S - 1)."""

    loss: Tensor | None = None
    log_probs: Tensor | None = None
    entropy: Tensor | None = None
    is_top1: Tensor | None = None
    label_mask: Tensor | None = None


def core(model: nn.Module) -> nn.Module:
    return model.get_base_model() if isinstance(model, peft.PeftModel) else model


def weight_of(model: nn.Module) -> nn.Linear:
    head = model.get_output_embeddings()
    return getattr(head, "base_layer", head)


def like_liger(self: nn.Module, input_ids: Tensor, attention_mask: Tensor, labels: Tensor | None = None, **kwargs: Any) -> Any:
    """Llama's forward with a loss that is computed from the weight of a head that is not called."""
    hidden_BSD = self.model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
    if labels is None:
        return CausalLMOutputWithPast(logits=self.lm_head(hidden_BSD))
    logits_BSV = F.linear(hidden_BSD, weight_of(self).weight)
    return CausalLMOutputWithPast(loss=F.cross_entropy(logits_BSV[:, :-1].float().flatten(0, 1), labels[:, 1:].flatten()), logits=None)


def whisper_like_liger(self: nn.Module, input_features: Tensor, labels: Tensor, **kwargs: Any) -> Any:
    """Whisper's forward in the same way."""
    start = torch.full_like(labels[:, :1], self.config.decoder_start_token_id)
    ids = torch.cat([start, labels[:, :-1]], 1).masked_fill(torch.cat([start, labels[:, :-1]], 1) == -100, self.config.pad_token_id)
    hidden_BSD = self.model(input_features, decoder_input_ids=ids).last_hidden_state
    return CausalLMOutputWithPast(loss=F.cross_entropy(F.linear(hidden_BSD, self.proj_out.weight).flatten(0, 1), labels.flatten()))


def like_trl(self: nn.Module, input_ids: Tensor, attention_mask: Tensor, labels: Tensor, **kwargs: Any) -> Any:
    """Llama's forward as ``trl.trainer.utils.add_fused_lm_head`` makes it."""
    hidden_BSD = self.model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state[:, :-1]
    labels, mask = labels[:, 1:], labels[:, 1:] != -100
    log_p = F.linear(hidden_BSD, weight_of(self).weight).float().log_softmax(-1)
    log_probs = log_p.gather(-1, labels.clamp(min=0)[..., None]).squeeze(-1).masked_fill(~mask, 0)
    entropy = -(log_p.exp() * log_p).sum(-1).masked_fill(~mask, 0).detach()
    top1 = (log_p.argmax(-1) == labels) & mask
    return FusedOutput(loss=-log_probs.sum() / mask.sum(), log_probs=log_probs, entropy=entropy, is_top1=top1, label_mask=mask)


def fused(case: Case, forward: Callable[..., Any], *, lora: float | None = None) -> Case:
    """Return the case with its model's forward replaced on the instance, as Liger and TRL do; perhaps with LoRA of this dropout."""

    def build(seed: int) -> nn.Module:
        model = case.build(seed)
        model.forward = types.MethodType(forward, model)
        if lora is not None:
            config = peft.LoraConfig(r=4, lora_alpha=16, lora_dropout=lora, target_modules=["lm_head", "q_proj"], init_lora_weights=False)
            model = peft.get_peft_model(model, config)
        return model

    return replace(case, build=build)


class Copies(TrainerCallback):
    """Keeps a copy of the model as each step finds it, and the batches."""

    def __init__(self) -> None:
        self.models: list[nn.Module] = []

    def on_step_begin(self, args: Any, state: Any, control: Any, model: nn.Module, **kwargs: Any) -> None:
        self.models.append(copy.deepcopy(model).eval())


def watch(case: Case, *, accumulation: int = 1, **arguments: Any) -> list[tuple[StepRecord, nn.Module, list[dict[str, Tensor]]]]:
    """Train two steps and return each with the weights it found and its batches; dropout of the case must be off, or not matter."""
    copies, batches = Copies(), []

    def collate(samples: Any) -> Any:
        batches.append(case.collate(samples))
        return case.collate(samples)

    def built(trainer: Trainer) -> None:
        trainer.add_callback(copies)
        for module in trainer.model.modules():
            if hasattr(module, "attention_dropout") and isinstance(module.attention_dropout, float):
                module.attention_dropout = 0.0

    _, records = observed_run(
        replace(case, collate=collate),
        seed=SEED,
        max_steps=2,
        gradient_accumulation_steps=accumulation,
        samples=12,
        per_device_train_batch_size=3,
        built=built,
        **arguments,
    )
    return [
        (record, model, batches[i * accumulation : (i + 1) * accumulation]) for i, (record, model) in enumerate(zip(records, copies.models))
    ]


def logits_and_labels(model: nn.Module, batches: list[dict[str, Tensor]]) -> tuple[Tensor, Tensor]:
    """Return the labelled rows of the logits that the head itself gives, (N, V), and their labels."""
    found = []
    for batch in batches:
        inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
        with torch.no_grad():
            inner = core(model)
            head = inner.get_output_embeddings()
            logits = head(inner.model(**inputs).last_hidden_state)[:, :-1]
        labels = batch["labels"][:, 1:]
        found.append((logits[labels != -100], labels[labels != -100]))
    return torch.cat([logits for logits, _ in found]), torch.cat([labels for _, labels in found])


def scores(logits_NV: Tensor, labels_N: Tensor) -> dict[str, float]:
    """Score full logits in float64."""
    log_p = logits_NV.double().log_softmax(-1)
    return {
        "loss": F.nll_loss(log_p, labels_N).item(),
        "token_accuracy": (log_p.argmax(-1) == labels_N).double().mean().item(),
        "top5_accuracy": (log_p.topk(5).indices == labels_N[:, None]).any(-1).double().mean().item(),
        "entropy": -(log_p.exp() * log_p).sum(-1).mean().item(),
    }


def the_head(record: StepRecord) -> Head:
    (head,) = record.heads
    assert head.calls == 0
    assert head.shape == ()
    assert head.accuracy is not None
    return head


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("lora", [None, 0.0])
def test_a_loss_that_reads_the_weight_of_the_head(accumulation: int, lora: float | None) -> None:
    """Every score of a head that is never called is that of full logits in float64, LoRA included; it still counts no call."""
    for record, model, batches in watch(fused(LLAMA, like_liger, lora=lora), accumulation=accumulation):
        head, (logits, labels) = the_head(record), logits_and_labels(model, batches)
        expected = scores(logits, labels)
        assert {what: record.metrics[f"probe/text/{what}"] for what in expected} == pytest.approx(expected, rel=1e-5)
        assert head.accuracy.labelled == len(labels) > 20
        assert 0 < head.accuracy.calibration_error < 1
        assert head.evaluated == f"all {len(labels)} labelled positions: the model computed its loss without the head"
        assert head.alignment == "shifted by one"
        assert "the model computed its loss without the head" in record.not_measured["probe/text/top_token_share"]
        assert head.shown == ()


def test_an_encoder_decoder_without_its_head() -> None:
    """Whisper's head is evaluated on the decoder's output, without a shift."""
    for record, model, (batch,) in watch(fused(WHISPER, whisper_like_liger)):
        head = the_head(record)
        assert head.alignment == "not shifted"
        assert head.accuracy.labelled == int((batch["labels"] != -100).sum())
        assert record.metrics["probe/text/loss"] == pytest.approx(record.metrics["probe/loss"], rel=1e-5)
        assert model is not None


def test_more_labels_than_are_evaluated(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of more labelled positions some stand for all: the record says how many, and estimates with the error that it states."""
    monkeypatch.setattr(head_unseen, "ROWS", 12)
    for record, model, batches in watch(fused(LLAMA, like_liger)):
        head, (logits, labels) = the_head(record), logits_and_labels(model, batches)
        assert head.accuracy.labelled == len(labels)
        rows = re.match(r"(\d+) sampled of (\d+) labelled positions: the model", head.evaluated)  # others are sampled for other shifts
        assert rows is not None
        assert 8 <= int(rows[1]) <= 12 < int(rows[2]) == len(labels)
        losses = F.cross_entropy(logits.double(), labels, reduction="none")
        error = float(losses.std() / 11**0.5)
        assert 0 < abs(head.accuracy.loss - float(losses.mean())) < 4 * error
        assert record.loss_audit is not None
        assert 0.3 * error < record.loss_audit.standard_error < 3 * error


@pytest.mark.parametrize("accumulation", [1, 2])
def test_an_output_that_offers_log_probabilities(accumulation: int) -> None:
    """Cross-entropy, accuracy and entropy come from TRL's output; what it does not offer has that for a reason."""
    for record, model, batches in watch(fused(LLAMA, like_trl), accumulation=accumulation):
        head, expected = the_head(record), scores(*logits_and_labels(model, batches))
        del expected["top5_accuracy"]
        assert {what: record.metrics[f"probe/text/{what}"] for what in expected} == pytest.approx(expected, rel=1e-5)
        assert head.evaluated == "from the log_probs that the model returned in place of logits"
        for missing in ("top5_accuracy", "calibration_error", "top_token_share"):
            assert record.not_measured[f"probe/text/{missing}"] == f"{head.evaluated}; these do not tell it"


@pytest.mark.parametrize("forward", [like_liger, like_trl])
def test_under_autocast(forward: Callable[..., Any]) -> None:
    """Under bf16 the head is evaluated as autocast would have run it: the same numbers as those of the loss."""
    for record, _, _ in watch(fused(LLAMA, forward), bf16=True):
        the_head(record)
        assert record.metrics["probe/text/loss"] == pytest.approx(record.metrics["probe/loss"], abs=1e-5)


@pytest.mark.parametrize("variant", ["plain", "accumulation", "checkpointing", "bf16"])
@pytest.mark.parametrize(("forward", "lora"), [(like_liger, None), (like_liger, 0.4), (like_trl, None)])
def test_training_is_untouched(forward: Callable[..., Any], lora: float | None, variant: str) -> None:
    """Losses, gradients, weights and every random stream are the same with and without the probe, with dropout inside the head."""
    case = fused(LLAMA, forward, lora=lora)
    plain = run(case, seed=SEED, max_steps=3, **VARIANTS[variant])
    watched, records = observed_run(case, seed=SEED, max_steps=3, **VARIANTS[variant])
    assert_identical(plain, watched)
    assert all(record.heads[0].accuracy.labelled for record in records)
    assert all(module.training for module in watched.model.get_output_embeddings().modules())


def test_captures_stay_as_they_are() -> None:
    """The evaluation of a head is no call of it: it has no capture, and no statistics."""
    seen: list[int] = []

    class Reader(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, model: nn.Module, **kwargs: Any) -> None:
            (observed,) = REGISTRY.inside(model)
            seen.append(len(observed.buffer["lm_head"]))
            assert not any(str(key).startswith("feeder") for micro in observed.buffer.micro_batches for key in micro.scratch)

    _, records = observed_run(fused(LLAMA, like_liger), seed=SEED, max_steps=2, built=lambda trainer: trainer.add_callback(Reader()))
    assert seen == [0, 0]
    assert [row.calls for record in records for row in record.statistics if row.site == "lm_head"] == [0, 0]
    assert "lm_head was not called" in records[0].not_measured["site:lm_head"]


class SomePositions(Trainer):
    """Asks for the logits of some positions only, and takes the loss itself."""

    keep: Any = 5

    def compute_loss(self, model: nn.Module, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
        inputs = dict(inputs)
        labels = inputs.pop("labels")
        output = model(**inputs, logits_to_keep=self.keep)
        places = torch.arange(labels.shape[1])[-self.keep :] if isinstance(self.keep, int) else self.keep
        later = torch.cat([labels[:, 1:], torch.full_like(labels[:, :1], -100)], 1)[:, places]
        logits = output.logits if output.logits is not None else model.lm_head(self.kept_hidden)
        loss = F.cross_entropy(logits.flatten(0, 1), later.flatten())
        return (loss, output) if return_outputs else loss


class ChosenPositions(SomePositions):
    keep = torch.tensor([1, 6, 7, 8, 9])


@pytest.mark.parametrize("trainer", [SomePositions, ChosenPositions])
def test_logits_of_some_positions(trainer: type[SomePositions]) -> None:
    """With logits_to_keep, a number or positions, the scores are those of the labels that the kept positions predict."""
    if "logits_to_keep" not in inspect.signature(LlamaForCausalLM.forward).parameters:
        pytest.skip("4.46 names it otherwise")
    for record, model, (batch,) in watch(replace(LLAMA, trainer_class=trainer)):
        inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
        with torch.no_grad():
            logits = model(**inputs, logits_to_keep=trainer.keep).logits
        labels = torch.cat([batch["labels"][:, 1:], torch.full_like(batch["labels"][:, :1], -100)], 1)
        labels = labels[:, -trainer.keep :] if isinstance(trainer.keep, int) else labels[:, trainer.keep]
        (head,) = record.heads
        assert head.calls == 1
        assert head.alignment.endswith("shifted by one")
        kept = labels != -100
        assert head.accuracy.labelled == int(kept.sum()) > 3
        expected = scores(logits[kept], labels[kept])
        assert {what: record.metrics[f"probe/text/{what}"] for what in expected} == pytest.approx(expected, rel=1e-5)


def bypassing_some(self: nn.Module, input_ids: Tensor, attention_mask: Tensor, logits_to_keep: Any = 0, **kwargs: Any) -> Any:
    """Llama's forward for some positions, with a head that is not called."""
    hidden_BSD = self.model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
    places = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
    return CausalLMOutputWithPast(logits=F.linear(hidden_BSD[:, places], self.lm_head.weight))


@pytest.mark.parametrize("trainer", [SomePositions, ChosenPositions])
def test_some_positions_without_the_head(trainer: type[SomePositions]) -> None:
    """A head that is not called is evaluated on the positions that were asked for, and on no other."""
    case = replace(fused(LLAMA, bypassing_some), trainer_class=trainer)
    for record, _, (batch,) in watch(case):
        head = the_head(record)
        labels = torch.cat([batch["labels"][:, 1:], torch.full_like(batch["labels"][:, :1], -100)], 1)
        labels = labels[:, -trainer.keep :] if isinstance(trainer.keep, int) else labels[:, trainer.keep]
        assert head.accuracy.labelled == int((labels != -100).sum())
        assert record.metrics["probe/text/loss"] == pytest.approx(record.metrics["probe/loss"], rel=1e-5)


def calling_twice(self: nn.Module, input_ids: Tensor, attention_mask: Tensor, labels: Tensor, **kwargs: Any) -> Any:
    """Llama's forward with a first call of the head on something else, of the same shape."""
    hidden_BSD = self.model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
    self.lm_head(-3 * hidden_BSD)
    logits_BSV = self.lm_head(hidden_BSD)
    return CausalLMOutputWithPast(loss=F.cross_entropy(logits_BSV[:, :-1].flatten(0, 1), labels[:, 1:].flatten()), logits=logits_BSV)


def test_a_head_called_twice() -> None:
    """The last call of a micro-batch counts, in the scores and in the most frequent prediction; both are calls."""
    for record, model, batches in watch(fused(LLAMA, calling_twice), accumulation=2):
        logits, labels = logits_and_labels(model, batches)
        (head,) = record.heads
        assert head.calls == 4
        expected = scores(logits, labels)
        assert {what: record.metrics[f"probe/text/{what}"] for what in expected} == pytest.approx(expected, rel=1e-5)
        counts = logits.argmax(-1).bincount()
        assert head.accuracy.top_token_share == pytest.approx(int(counts.max()) / len(labels))
        assert head.accuracy.top_token == int(counts.argmax())


def longer(self: nn.Module, input_ids: Tensor, attention_mask: Tensor, labels: Tensor, **kwargs: Any) -> Any:
    """A model that makes its sequence longer than the labels and does not say how."""
    ids, mask = (torch.cat([tensor[:, :1], tensor], 1) for tensor in (input_ids, attention_mask))
    hidden_BSD = self.model(input_ids=ids, attention_mask=mask).last_hidden_state[:, 1:]
    logits_BSV = F.linear(hidden_BSD, self.lm_head.weight)
    return CausalLMOutputWithPast(loss=F.cross_entropy(logits_BSV[:, :-1].flatten(0, 1), labels[:, 1:].flatten()))


def test_positions_that_do_not_match() -> None:
    """Labels that do not lie over what would go into the head are not guessed at: the reason has both shapes."""
    for record, _, (batch,) in watch(fused(LLAMA, longer)):
        samples, length = batch["labels"].shape
        reason = record.not_measured["probe/text/loss"]
        assert reason.startswith("the model computed its loss without the head, and labels of shape")
        assert f"({samples}, {length})" in reason
        assert f"({samples}, {length + 1}, " in reason
        assert record.heads[0].accuracy.labelled == 0


def test_a_head_that_cannot_be_evaluated_alone() -> None:
    """A head whose own forward raises costs its numbers only, and the reason says so."""

    class Picky(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            raise RuntimeError("only inside a kernel")

    def build(seed: int) -> nn.Module:
        model = fused(LLAMA, like_liger).build(seed)
        model.lm_head.__class__ = Picky
        return model

    for record, _, _ in watch(replace(LLAMA, build=build)):
        assert record.not_measured["probe/text/loss"].endswith("evaluated by itself (RuntimeError: only inside a kernel)")


def test_a_forward_that_raises() -> None:
    """When the root's forward raises nothing is evaluated: memory may be what it was short of."""

    def failing(self: nn.Module, **kwargs: Any) -> Any:
        like_liger(self, **kwargs)
        raise MemoryError

    model = fused(LLAMA, failing).build(SEED)
    calls: list[str] = []
    model.lm_head.forward = lambda x: calls.append("called") or F.linear(x, model.lm_head.weight)
    batch = LLAMA.collate([LLAMA.dataset(3, 1)[index] for index in range(3)])
    observed = probe.attach(model, every=1, settings=probe.Settings(terminal=False))
    with pytest.raises(MemoryError), observed.step():
        model(**batch)
    observed.detach()
    assert calls == []


def test_a_share_of_the_weight() -> None:
    """Where this rank holds only a share of the weight (ZeRO-3 leaves it empty) nothing is computed with it."""

    def like_zero(self: nn.Module, input_ids: Tensor, attention_mask: Tensor, labels: Tensor, **kwargs: Any) -> Any:
        output = like_liger(self, input_ids, attention_mask, labels)
        self.lm_head.weight.ds_id = 3
        whole[id(self)] = self.lm_head.weight.data
        self.lm_head.weight.data = self.lm_head.weight.data.new_empty(0)
        return output

    whole: dict[int, Tensor] = {}
    model = fused(LLAMA, like_zero).build(SEED)
    batch = LLAMA.collate([LLAMA.dataset(3, 1)[index] for index in range(3)])
    observed = probe.attach(model, every=1, settings=probe.Settings(terminal=False))
    with observed.step():
        loss = model(**batch).loss
        model.lm_head.weight.data = whole[id(model)]
        loss.backward()
    observed.detach()
    assert observed.last is not None
    assert "this rank holds only a share of its weight" in observed.last.not_measured["probe/text/loss"]
