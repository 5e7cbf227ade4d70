"""What a record says is right: each number against an independent computation on a copy of the model at the same weights and batch.

Shapes: B batch, T audio frames, S tokens, K keys, H heads, V vocabulary, C codebooks.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import jiwer
import pytest
import torch
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback

import models
from attention_by_hand import Given, by_hand
from models import qwen2_audio
from models.case import Case
from models.running import VARIANTS, RunResult
from probe.assemble import words
from probe.attachment import REGISTRY
from probe.measure.quantities import QUANTITIES, WALKS
from probe.measure.rows import RowChoice
from probe.records import Attention, Head, StepRecord
from probe.sites.modality import AUDIO, PADDING, REFERENCE, TEXT
from watching import observed_run

CASES = [pytest.param(case, id=case.name) for case in models.available_cases()]
WITH_ENCODER = [param for param in CASES if param.values[0].encoder]
SEED = 21
_RATES = ("dropout", "attention_dropout", "activation_dropout", "layerdrop", "encoder_layerdrop", "decoder_layerdrop")


class Copies(TrainerCallback):
    """Keeps a copy of the model as each step finds it."""

    def __init__(self) -> None:
        self.models: list[nn.Module] = []

    def on_step_begin(self, args: Any, state: Any, control: Any, model: nn.Module, **kwargs: Any) -> None:
        self.models.append(copy.deepcopy(model))


@dataclass
class Watched:
    """An observed run without any dropout, with the weights and the batches of each of its steps."""

    result: RunResult
    records: tuple[StepRecord, ...]
    models: list[nn.Module]
    batches: list[list[Any]]


def watch(case: Case, *, rows: int = 64, steps: int = 2, accumulation: int = 1, tokenizer: Any = None, **arguments: Any) -> Watched:
    """Train a case without any randomness under observation. Batches have three samples."""
    collated: list[Any] = []
    copies = Copies()

    def collate(samples: Sequence[Any]) -> Any:
        collated.append(case.collate(samples))
        return case.collate(samples)

    result, records = observed_run(
        replace(case, build=lambda seed: quiet(case.build(seed)), collate=collate),
        options={"rows": rows, "tokenizer": tokenizer},
        seed=SEED,
        max_steps=steps,
        samples=12,
        per_device_train_batch_size=3,
        gradient_accumulation_steps=accumulation,
        built=lambda trainer: trainer.add_callback(copies),
        **arguments,
    )
    batches = [collated[i : i + accumulation] for i in range(0, steps * accumulation, accumulation)]
    assert len(records) == len(copies.models) == len(batches) == steps
    return Watched(result, records, copies.models, batches)


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("case", CASES)
def test_scores_of_heads(case: Case, accumulation: int) -> None:
    """Loss, accuracy, top 5 and entropy of every head and codebook equal those of full logits in float64, over all micro-batches."""
    watched = watch(case, accumulation=accumulation)
    for record, model, batches in zip(watched.records, watched.models, watched.batches, strict=True):
        heads = {head.site: head for head in record.heads}
        assert tuple(sorted(heads)) == tuple(sorted(case.heads))
        for name in case.heads:
            pairs = [laid_over(case, model, name, batch) for batch in batches]
            if pairs[0] is None:
                assert "does not lie over" in record.not_measured["probe/text/loss"]
                continue
            check_head(heads[name], [pair for pair in pairs if pair is not None], record)


def check_head(head: Head, pairs: list[tuple[Tensor, Tensor]], record: StepRecord) -> None:
    """Compare one head's row, and the metrics of its modality, with (logits, labels) pairs: (N, V), (N,), or with codebooks second."""
    assert head.accuracy is not None
    books = pairs[0][1].shape[1] if pairs[0][1].dim() == 2 else 0
    whole = reference([(logits.reshape(-1, logits.shape[-1]), labels.reshape(-1)) for logits, labels in pairs])
    assert whole["labelled"] > 4
    if books:  # each codebook has its own most frequent prediction
        ones = [reference([(logits[:, k], labels[:, k]) for logits, labels in pairs]) for k in range(books)]
        whole["top_token_share"] = sum(one["top_token_share"] * one["labelled"] for one in ones) / whole["labelled"]
        assert head.accuracy.top_token is None
        del whole["top_token"]
    metrics = {what: record.metrics[f"probe/{head.modality}/{what}"] for what in whole if what not in ("labelled", "top_token")}
    for found in ({what: value for what, value in vars_of(head.accuracy).items() if value is not None}, metrics):
        assert found == pytest.approx({what: whole[what] for what in found}, rel=1e-5)
    assert len(head.codebooks) == books
    for k, row in enumerate(head.codebooks):
        one = reference([(logits[:, k], labels[:, k]) for logits, labels in pairs])
        assert vars_of(row) == pytest.approx(one, rel=1e-5)
        for what in ("loss", "token_accuracy", "calibration_error", "top_token_share"):
            assert record.metrics[f"probe/audio/codebook_{k}/{what}"] == pytest.approx(one[what], rel=1e-5)


@pytest.mark.parametrize("case", CASES)
def test_shown_tokens(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """The samples of a record hold the first batch's labels and argmax, sample by sample; text heads their text and word error rate."""
    tokenizer = case.tokenizer()
    watched = watch(case, tokenizer=tokenizer)
    for record, model, (batch,) in zip(watched.records, watched.models, watched.batches, strict=True):
        rates = []
        for head in record.heads:
            laid = laid_over(case, model, head.site, batch)
            if laid is None:
                assert head.shown == ()
                continue
            logits, labels = laid if laid[1].dim() == 1 else (laid[0][:, 0], laid[1][:, 0])
            kept = labels != -100
            assert sum((sample.target for sample in head.shown), ()) == tuple(labels[kept].tolist())
            assert sum((sample.predicted for sample in head.shown), ()) == tuple(logits.argmax(-1)[kept].tolist())
            for sample in head.shown if head.modality == "text" else ():
                assert "".join(sample.target_pieces) == sample.target_text[: len("".join(sample.target_pieces))]
                assert len(sample.predicted_pieces) == len(sample.target_pieces) == min(64, len(sample.target))
                texts = (tokenizer.decode(ids, skip_special_tokens=True) for ids in (sample.target, sample.predicted))
                assert sample.word_error_rate == pytest.approx(jiwer.wer(*texts))
                rates.append(sample.word_error_rate)
            assert head.modality == "text" or all(sample.target_text is None for sample in head.shown)
        if rates:
            assert record.metrics["probe/text/word_error_rate"] == pytest.approx(sum(rates) / len(rates))
    monkeypatch.setattr(words, "find_spec", lambda name: None)
    _, (record,) = observed_run(case, options={"tokenizer": tokenizer}, seed=SEED, max_steps=1)
    assert all(sample.word_error_rate is None for head in record.heads for sample in head.shown)
    if any(head.shown for head in record.heads if head.modality == "text"):
        assert record.not_measured["probe/text/word_error_rate"] == words.NO_JIWER


def test_no_text_without_a_tokenizer() -> None:
    """Without a tokenizer there are ids, no text, and the reason."""
    _, (record,) = observed_run(models.CASES["llama"], seed=SEED, max_steps=1)
    (sample, *_) = record.heads[0].shown
    assert sample.target
    assert (sample.target_text, sample.target_pieces, sample.word_error_rate) == (None, (), None)
    assert record.not_measured["probe/text/word_error_rate"].startswith("no tokenizer: give one")


@pytest.mark.parametrize("case", CASES)
def test_losses_of_heads_make_the_model_loss(case: Case) -> None:
    """The heads' losses, put together as the model's class does, are the model's own loss; they stand in the Trainer's log."""
    if case.name == "qwen2_audio" and qwen2_audio.EXPANDS:
        pytest.skip("4.46 makes the sequence longer than the labels and does not return them")
    watched = watch(case)
    logged = [entry for entry in watched.result.log_history if "loss" in entry]
    for record, entry, model, (batch,) in zip(watched.records, logged, watched.models, watched.batches, strict=True):
        books = [value for name, value in record.metrics.items() if name.startswith("probe/audio/codebook") and name.endswith("/loss")]
        audio = sum(books) / (len(books) if case.name == "original" else 1) if books else 0.0
        assert record.metrics["probe/text/loss"] + audio == pytest.approx(float(loss_of(model, batch).detach()), rel=1e-5)
        assert entry["probe/text/loss"] == record.metrics["probe/text/loss"]


@pytest.mark.parametrize("variant", ["plain", "accumulation", "bf16"])
@pytest.mark.parametrize("case", CASES)
def test_loss_gradient_norm_and_rate_are_those_of_the_log(case: Case, variant: str) -> None:
    """``probe/loss``, ``probe/grad/norm`` and ``probe/learning_rate`` equal what the Trainer logs for the step, before clipping."""
    if variant in case.unsupported:
        pytest.skip(case.unsupported[variant])
    trained, records = observed_run(case, seed=SEED, max_steps=3, max_grad_norm=0.5, **VARIANTS[variant])
    logged = [entry for entry in trained.log_history if "loss" in entry]
    for record, entry in zip(records, logged, strict=True):
        assert record.optimisation is not None
        assert record.metrics["probe/loss"] == pytest.approx(entry["loss"], abs=1e-4)
        assert record.metrics["probe/grad/norm"] == pytest.approx(entry["grad_norm"], rel=1e-5)
        assert record.metrics["probe/grad/norm"] > 0.5
        assert record.optimisation.loss == record.metrics["probe/loss"]
    rates = [record.metrics["probe/learning_rate"] for record in records]
    assert rates[0] == 1e-3 > rates[1] > rates[2] > 0


@pytest.mark.parametrize("case", CASES)
def test_gradients_of_parts(case: Case) -> None:
    """The norm of each part equals that of a backward on the copy; every parameter is in one part; what has no gradient is counted."""
    watched = watch(case)
    for record, model, (batch,) in zip(watched.records, watched.models, watched.batches, strict=True):
        # The Trainer gives this model the number of text labels, by which it divides the audio's sum, too.
        items = {"num_items_in_batch": (batch["labels"][:, 1:] != -100).sum()} if case.name == "higgs_audio_v2" else {}
        loss = loss_of(model, batch, **items)
        assert record.metrics["probe/loss"] == pytest.approx(float(loss.detach()), rel=1e-5)
        loss.backward()
        total, elements = 0.0, 0
        for part in record.parts:
            mine = [p for name, p in model.named_parameters() if part_of(case, name) == part.name]
            squares = sum(float(p.grad.double().square().sum()) for p in mine if p.grad is not None)
            assert part.parameters == sum(p.numel() for p in mine)
            assert part.trainable_share == sum(p.numel() for p in mine if p.requires_grad) / part.parameters
            assert part.gradient_norm == pytest.approx(math.sqrt(squares), rel=1e-4)
            assert record.metrics[f"probe/grad/{part.name}/norm"] == part.gradient_norm
            assert part.without_gradient == sum(p.requires_grad and p.grad is None for p in mine)
            total, elements = total + squares, elements + part.parameters
        assert elements == sum(p.numel() for p in model.parameters())
        assert record.metrics["probe/grad/norm"] == pytest.approx(math.sqrt(total), rel=1e-4)


@pytest.mark.parametrize("case", WITH_ENCODER)
def test_encoder(case: Case) -> None:
    """Moments and spread of the encoder's output, and the norm of the gradient that reaches it, equal torch's own in float64."""
    assert case.encoder is not None
    watched = watch(case)
    for record, model, (batch,) in zip(watched.records, watched.models, watched.batches, strict=True):
        (output,), loss = outputs_of(model, case.encoder, batch)
        (gradient,) = torch.autograd.grad(loss, output)
        row = next(row for row in record.statistics if row.site == case.encoder)
        wide = output.detach().double()
        assert row.shape == tuple(output.shape)
        assert row.elements == output.numel()
        expected = {
            "mean": wide.mean(),
            "rms": wide.square().mean().sqrt(),
            "std": wide.std(correction=0),
            "minimum": wide.amin(),
            "maximum": wide.amax(),
            "time_std": wide.var(1, correction=0).mean().sqrt(),
            "batch_std": wide.var(0, correction=0).mean().sqrt(),
        }
        for what, value in expected.items():
            assert getattr(row, what) == pytest.approx(float(value), rel=1e-4, abs=1e-6), what
        for what in ("rms", "time_std", "batch_std"):
            assert record.metrics[f"probe/audio_encoder/{what}"] == getattr(row, what)
        norm = float(gradient.double().square().sum().sqrt())
        assert record.metrics["probe/audio_encoder/gradient_norm"] == pytest.approx(norm, rel=1e-4)
        assert record.conditioning is not None
        assert record.conditioning.output_gradient_norm == record.metrics["probe/audio_encoder/gradient_norm"]


def test_statistics_of_every_site_over_micro_batches() -> None:
    """With accumulation, the moments of a site are those of the outputs of all its calls together."""
    case = models.CASES["whisper"]
    watched = watch(case, accumulation=2)
    for record, model, batches in zip(watched.records, watched.models, watched.batches, strict=True):
        for row in record.statistics:
            outputs = [output for batch in batches for output in outputs_of(model, row.site, batch)[0]]
            wide = torch.cat([output.detach().double().reshape(-1) for output in outputs])
            assert (row.calls, row.elements) == (2, wide.numel())
            found = (row.mean, row.rms, row.std, row.minimum, row.maximum)
            expected = (wide.mean(), wide.square().mean().sqrt(), wide.std(correction=0), wide.amin(), wide.amax())
            assert found == pytest.approx([float(value) for value in expected], rel=1e-4, abs=1e-6), row.site


@pytest.mark.parametrize("case", CASES)
def test_inputs(case: Case) -> None:
    """Shares, counts and tables of what went in equal plain Python over the batches."""
    watched = watch(case, accumulation=2)
    facts = case.build(0).config
    for record, batches in zip(watched.records, watched.batches, strict=True):
        assert record.inputs is not None
        assert record.conditioning is not None
        inputs = record.inputs
        assert (inputs.micro_batches, inputs.samples) == (2, 6)
        labels = [label for batch in batches for row in get(batch, "labels", "label_ids").tolist() for label in row]
        assert inputs.labels_masked_share == labels.count(-100) / len(labels)
        if "input_ids" in keys(batches[0]):
            mask = [value for batch in batches for row in batch["attention_mask"].tolist() for value in row]
            assert inputs.padding_share == mask.count(0) / len(mask)
            assert mask.count(0) > 0
            ids = [token for batch in batches for row in batch["input_ids"].tolist() for token in row]
            for name, count in record.conditioning.tokens:
                assert count == ids.count(getattr(facts, name))
            if case.audio_token is not None:
                placeholder = case.tokenizer().convert_tokens_to_ids(case.audio_token)
                assert ids.count(placeholder) in [count for _, count in record.conditioning.tokens]
        check_tables(record, batches[0])
        if case.encoder:
            assert inputs.audio_clips == sum(len(get(batch, "input_features", "audio_features")) for batch in batches)


def check_tables(record: StepRecord, batch: Any) -> None:
    """Compare the table of inputs with the first micro-batch."""
    assert record.inputs is not None
    table = {row.name: row for row in record.inputs.tensors}
    for name in keys(batch):
        row, tensor = table[name], batch[name]
        assert (row.shape, row.dtype) == (tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."))
        if tensor.numel():
            assert (row.minimum, row.maximum) == (pytest.approx(float(tensor.min())), pytest.approx(float(tensor.max())))
        if tensor.numel() and tensor.is_floating_point():
            assert row.mean == pytest.approx(float(tensor.double().mean()), rel=1e-5, abs=1e-7)
        elif tensor.dtype != torch.bool:
            assert row.first_values == tuple(tensor.reshape(-1)[:10].tolist())


@pytest.mark.parametrize("kernel", ["eager", "sdpa"])
@pytest.mark.parametrize("name", ["whisper", "llama", "voxtral", "qwen2_audio", "higgs_audio_v2"])
def test_attention(name: str, kernel: str) -> None:
    """With every row taken, entropies and masses of every layer equal those of the eager weights in evaluation, under both kernels."""
    case = models.CASES[name]
    if not case.available():
        pytest.skip("the installed transformers does not have it")
    if name == "qwen2_audio" and qwen2_audio.EXPANDS:
        pytest.skip("4.46 makes the sequence longer than input_ids")
    watched = watch(replace(case, build=lambda seed: with_kernel(case.build(seed), kernel, seed)), rows=10_000)
    for record, model, (batch,) in zip(watched.records, watched.models, watched.batches, strict=True):
        rows = {row.site: row for row in record.attention}
        assert set(rows) == {site for kind in case.attention.values() for site in kind}
        weights = eager_weights(case, model, batch)
        for kind, sites in case.attention.items():
            for site in sites:
                check_layer(rows[site], weights[site], *modalities(case, batch, kind, weights[site]))
        check_means(record)


def check_layer(row: Attention, p_BHSK: Tensor, query_BS: list[list[str]], key_BK: list[list[str]], *, walks: bool = True) -> None:
    """Compare one layer's row with its weights, row by row in plain Python. Modalities are "text", "audio", "reference" or ""."""
    codes = {"": PADDING, "text": TEXT, "audio": AUDIO, "reference": REFERENCE}
    query, key = (torch.tensor([[codes[name] for name in names] for names in sample_names]) for sample_names in (query_BS, key_BK))
    samples, heads, queries, keys = p_BHSK.shape
    every = torch.arange(queries).expand(samples, queries)
    source = Given(p_BHSK, p_BHSK.amax(1) > 0)
    expected = by_hand(source, RowChoice(every, torch.ones(samples, queries), queries), query, key, row.kind != "cross")
    assert (row.heads, row.keys, row.rows) == (heads, keys, expected["sampled"])
    tells_reference = "reference" in {name for names in key_BK for name in names}
    over_audio = row.kind in ("cross", "joint") and walks
    for what in QUANTITIES:
        if (what.endswith("_reference") and not tells_reference) or (what in WALKS and not over_audio):
            continue
        numerators, weight = expected[what]
        value = sum(numerators) / heads / weight if weight else None
        near = 2e-6 * (keys if what in ("effective_keys", "distance") else 1)
        near = 0.05 if what == "monotonicity" else near  # rounding turns the order of rows that look at nearly the same place
        assert getattr(row, what) == (value if value is None else pytest.approx(value, abs=near)), f"{row.site} {what}"


def check_means(record: StepRecord) -> None:
    """Compare the metrics with means over the layers' rows."""
    for what in ("entropy", "entropy_nats", "first_token"):
        values = [getattr(row, what) for row in record.attention]
        assert record.metrics[f"probe/attention/{what}"] == pytest.approx(sum(values) / len(values))
        for kind in {row.kind for row in record.attention}:
            mine = [getattr(row, what) for row in record.attention if row.kind == kind]
            assert record.metrics[f"probe/attention/{kind}/{what}"] == pytest.approx(sum(mine) / len(mine))
    joint = [row for row in record.attention if row.kind == "joint"]
    if joint:
        masses = [row.text_to_audio for row in joint]
        assert record.metrics["probe/attention/text_to_audio"] == pytest.approx(sum(masses) / len(masses))


def test_attention_of_an_expanding_model() -> None:
    """In the model that expands its own sequence, masses are those of weights recomputed on the copy, by the output's own masks."""
    case = models.CASES["original"]
    watched = watch(case, rows=10_000)
    for record, model, (batch,) in zip(watched.records, watched.models, watched.batches, strict=True):
        rows = {row.site: row for row in record.attention}
        for site in case.attention["joint"]:
            seen: list[Tensor] = []
            attention = model.get_submodule(site)
            with torch.no_grad(), SdpaWeights(attention, seen):
                output = model.eval()(**batch)
            audio_BS = output.audio_in_mask | output.audio_out_mask
            names = [
                [
                    "" if not real else "reference" if given else "audio" if audio else "text"
                    for given, audio, real in zip(*masks, strict=True)
                ]
                for masks in zip(output.audio_in_mask.tolist(), audio_BS.tolist(), output.attention_mask.tolist(), strict=True)
            ]
            early = rows[site].monotonicity is not None  # a layer that is told what is audio before it runs
            assert early != (f"attention:{site}/per_head" in record.not_measured)
            check_layer(rows[site], seen[0], names, names, walks=early)


def test_expanding_model_under_autocast() -> None:
    """Under bf16 the head's logits are gone when the output tells the labels; the output's own copies are measured instead."""
    result, records = observed_run(models.CASES["original"], seed=SEED, max_steps=2, **VARIANTS["bf16"])
    logged = [entry for entry in result.log_history if "loss" in entry]
    for record, entry in zip(records, logged, strict=True):
        books = [record.metrics[f"probe/audio/codebook_{k}/loss"] for k in range(3)]
        assert record.metrics["probe/text/loss"] + sum(books) / 3 == pytest.approx(entry["loss"], abs=2e-4)


class SdpaWeights:
    """While open, collects the probabilities of one module's calls of ``scaled_dot_product_attention``, computed in float64."""

    def __init__(self, module: nn.Module, seen: list[Tensor]) -> None:
        self.module, self.seen, self.inside = module, seen, False
        self.kernel = torch.nn.functional.scaled_dot_product_attention

    def __enter__(self) -> None:
        forward = self.module.forward

        def marked(*args: Any, **kwargs: Any) -> Any:
            self.inside = True
            try:
                return forward(*args, **kwargs)
            finally:
                self.inside = False

        self.module.forward = marked
        torch.nn.functional.scaled_dot_product_attention = self._kernel

    def __exit__(self, *exception: object) -> None:
        torch.nn.functional.scaled_dot_product_attention = self.kernel
        del self.module.forward

    def _kernel(self, q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor, dropout_p: float = 0.0) -> Tensor:
        if self.inside:
            scores = (q.double() @ k.double().mT / math.sqrt(q.shape[-1])).masked_fill(~attn_mask, -torch.inf)
            self.seen.append(scores.softmax(-1))
        return self.kernel(q, k, v, attn_mask=attn_mask, dropout_p=dropout_p)


def test_capture_statistics_are_those_of_the_kept_tensor() -> None:
    """A capture in the step buffer tells the moments of the tensor that it keeps."""
    case = models.CASES["llama"]
    checked: list[str] = []

    class Reader(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, model: nn.Module, **kwargs: Any) -> None:
            (capture,) = held["probe"].buffer["lm_head"]
            wide = capture.tensor.double()
            assert not capture.tensor.requires_grad
            moments = capture.statistics()
            found = (moments.mean, moments.rms, moments.std, moments.minimum, moments.maximum)
            expected = (wide.mean(), wide.square().mean().sqrt(), wide.std(correction=0), wide.amin(), wide.amax())
            assert found == pytest.approx([float(value) for value in expected], rel=1e-6)
            assert "input_ids" in held["probe"].buffer.inputs
            checked.append(capture.site)

    held: dict[str, Any] = {}

    def built(trainer: Trainer) -> None:
        held["probe"] = next(iter(REGISTRY.inside(trainer.model)))
        trainer.add_callback(Reader())

    observed_run(case, options={"keep": {"lm_head"}}, seed=SEED, max_steps=2, built=built)
    assert checked == ["lm_head"] * 2


def reference(pairs: Sequence[tuple[Tensor, Tensor]]) -> dict[str, float | None]:
    """Score (N, V) logits against (N,) labels in float64."""
    log_p = torch.cat([logits[labels != -100].double().log_softmax(-1) for logits, labels in pairs])
    label = torch.cat([labels[labels != -100] for _, labels in pairs])[:, None]
    confidence, predicted = log_p.exp().max(-1)
    correct = predicted == label.squeeze(-1)
    counts = predicted.bincount()
    bins = (confidence * 15).ceil()
    gaps = [abs(float((correct[bins == m].double() - confidence[bins == m]).sum())) for m in range(1, 16)]
    return {
        "labelled": len(label),
        "loss": -float(log_p.gather(1, label).mean()),
        "token_accuracy": float(correct.double().mean()),
        "top5_accuracy": float((log_p.topk(5).indices == label).any(-1).double().mean()),
        "entropy": -float((log_p.exp() * log_p).sum(-1).mean()),
        "calibration_error": sum(gaps) / len(label),
        "top_token_share": int(counts.max()) / len(label),
        "top_token": int(counts.argmax()),
    }


def laid_over(case: Case, model: nn.Module, head: str, batch: Any) -> tuple[Tensor, Tensor] | None:
    """Return a head's logits and labels, (N, V) and (N,) or (N, C, V) and (N, C), as the model's class lays them over each other."""
    outputs, _ = outputs_of(model, head, batch)
    logits = outputs[-1].detach()
    if case.name == "original":
        with torch.no_grad():
            output = model.eval()(**batch)
        if "audio" in head.rpartition(".")[2]:
            books = batch["label_audio_ids"].shape[0]
            return logits.unflatten(-1, (books, -1))[:-1], batch["label_audio_ids"].T[1:]
        return logits[:, :-1].flatten(0, 1), output.expanded_labels[:, 1:].flatten()
    labels = batch["labels"]
    if case.name == "whisper":
        return logits.flatten(0, 1), labels.flatten()
    if case.name == "higgs_audio_v2" and head.startswith("audio"):
        return audio_of_higgs(case, model, logits, batch)
    if logits.shape[1] != labels.shape[1]:
        return None
    if case.name == "qwen2_audio":
        labels = labels.masked_fill(batch["attention_mask"] == 0, -100)
    return logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()


def audio_of_higgs(case: Case, model: nn.Module, logits: Tensor, batch: Any) -> tuple[Tensor, Tensor]:
    """Lay the labels of the real audio frames, in order, over the placeholders, and shift by one."""
    ids = {case.tokenizer().convert_tokens_to_ids(token) for token in ("<|AUDIO_OUT|>", "<|audio_delay|>")}
    books = batch["audio_labels"].shape[-1]
    labels = torch.full((*batch["input_ids"].shape, books), -100)
    frames = iter(batch["audio_labels"][batch["audio_input_ids_mask"]])
    for b, row in enumerate(batch["input_ids"].tolist()):
        for s, token in enumerate(row):
            if token in ids:
                labels[b, s] = next(frames)
    assert next(frames, None) is None
    split = logits.unflatten(-1, (books, -1)) if logits.dim() == 3 else logits
    return split[:, :-1].flatten(0, 1), labels[:, 1:].flatten(0, 1)


def outputs_of(model: nn.Module, name: str, batch: Any) -> tuple[list[Tensor], Tensor]:
    """Run a copy and return the outputs of one of its modules, with their graph, and the loss."""
    seen: list[Tensor] = []

    def see(module: nn.Module, args: Any, output: Any) -> None:
        first = getattr(output, "last_hidden_state", output)
        seen.append(first[0] if isinstance(first, tuple) else first)

    handle = model.get_submodule(name).register_forward_hook(see)
    try:
        loss = loss_of(model, batch)
    finally:
        handle.remove()
    return seen, loss


def loss_of(model: nn.Module, batch: Any, **more: Any) -> Tensor:
    """Run the copy in training mode (there is no dropout) and return its loss."""
    model.train()
    loss: Tensor = model(**{name: batch[name].clone() for name in keys(batch)}, **more).loss
    return loss


def eager_weights(case: Case, model: nn.Module, batch: Any) -> dict[str, Tensor]:
    """Return each attention layer's weights (B, H, S, K) of an eager copy in evaluation, by site."""
    eager = with_kernel(model, "eager", 0)
    eager.load_state_dict(model.state_dict())
    seen: dict[str, Tensor] = {}
    handles = [
        eager.get_submodule(site).register_forward_hook(lambda module, args, output, site=site: seen.update({site: output[1].detach()}))
        for kind in case.attention.values()
        for site in kind
    ]
    with torch.no_grad():
        eager.eval()(**{name: batch[name].clone() for name in keys(batch)}, output_attentions=True)
    for handle in handles:
        handle.remove()
    return seen


def modalities(case: Case, batch: Any, kind: str, p_BHSK: Tensor) -> tuple[list[list[str]], list[list[str]]]:
    """Say in plain Python what each query and key of a layer is: "text", "audio" or "" (padding)."""
    if kind in ("joint", "decoder") and "input_ids" in keys(batch):
        names = [tokens_of(case, *pair) for pair in zip(batch["input_ids"].tolist(), batch["attention_mask"].tolist(), strict=True)]
        return names, names
    texts = [["text" if s < ends(row) else "" for s in range(len(row))] for row in batch["labels"].tolist()] if kind != "encoder" else []
    if kind == "decoder":
        return texts, texts
    frames = p_BHSK.shape[3]
    sounding = [sounding_frames(batch, clip) for clip in range(len(batch["input_features"]))]
    folded = [["audio" if t * len(clip) // frames < sum(clip) else "" for t in range(frames)] for clip in sounding]
    return (folded if kind == "encoder" else texts), folded


def tokens_of(case: Case, ids: list[int], mask: list[int]) -> list[str]:
    """Say what each token of a sample is."""
    placeholders = {"higgs_audio_v2": ("<|AUDIO_OUT|>", "<|audio_delay|>")}.get(case.name, (case.audio_token,) if case.audio_token else ())
    audio = {case.tokenizer().convert_tokens_to_ids(token) for token in placeholders}
    return ["" if not real else "audio" if token in audio else "text" for token, real in zip(ids, mask, strict=True)]


def ends(labels: list[int]) -> int:
    """Return how many labels there are up to the last that is one."""
    return max(s for s, label in enumerate(labels) if label != -100) + 1


def sounding_frames(batch: Any, clip: int) -> list[int]:
    """Return 1 for the frames of a clip that are not padding, by its mask, or up to the last in which the mel bins differ."""
    features = batch["input_features"][clip]
    if "feature_attention_mask" in keys(batch):
        return batch["feature_attention_mask"][clip].tolist()
    loud = [len(set(frame)) > 1 for frame in features.T.tolist()]
    last = max(t for t, value in enumerate(loud) if value)
    return [int(t <= last) for t in range(len(loud))]


def part_of(case: Case, name: str) -> str:
    """Say which part a parameter belongs to, as the record's parts are defined, from its name alone."""
    if case.projector and name.startswith(f"{case.projector}."):
        return "projector"
    if case.encoder and name.startswith(f"{case.encoder}."):
        return "audio_encoder"
    for branch, key in (("text_branch", "mlp"), ("audio_branch", "audio_mlp")):
        if name.startswith(tuple(f"{layer}.{key}." for layer in case.dual_layers)):
            return branch
    tied = case.name == "whisper" and name == "model.decoder.embed_tokens.weight"  # Whisper's head is its embedding
    if tied or name.startswith(tuple(f"{head}." for head in case.heads)):
        return "lm_head"
    tables = ("embed_tokens.weight", "audio_codebook_embeddings.weight", "embed_audio_tokens.weight")
    return "embedding" if name.endswith(tables) else "rest"


def quiet(model: nn.Module) -> nn.Module:
    """Return the model without anything random: no dropout, no layerdrop, no SpecAugment."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for holder in (module, getattr(module, "config", None)):
            for rate in _RATES:
                if isinstance(getattr(holder, rate, None), float):
                    setattr(holder, rate, 0.0)
            if getattr(holder, "apply_spec_augment", False):
                holder.apply_spec_augment = False
    return model


def with_kernel(model: nn.Module, kernel: str, seed: int) -> nn.Module:
    """Return a fresh model of the same class and config, with this attention implementation and without anything random."""
    config = copy.deepcopy(model.config)
    for part in (config, *(value for value in vars(config).values() if hasattr(value, "_attn_implementation_internal"))):
        part._attn_implementation_internal = None
    torch.manual_seed(seed)
    extra = {"use_text_head": True} if hasattr(model, "text_lm_head") else {}
    return quiet(type(model)._from_config(config, attn_implementation=kernel, **extra))


def vars_of(row: Any) -> dict[str, float]:
    """Return the fields of a slotted record."""
    return {name: getattr(row, name) for name in row.__slots__}


def keys(batch: Any) -> list[str]:
    """Return the names in a batch, mapping or not."""
    return list(batch.keys())


def get(batch: Any, *names: str) -> Tensor:
    """Return the first of these that the batch has."""
    return next(batch[name] for name in names if name in keys(batch))
