"""The counterfactual passes in real trainings: nothing is touched, the numbers are those of passes made by hand, failures end well."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import TrainerCallback

import models
import probe
from models.case import Case
from models.running import VARIANTS, RunResult, assert_identical, run
from probe.capture.buffer import StepBuffer
from probe.catalogue.reference import reference_detail_metrics, reference_metrics
from probe.counterfactual.groups import by_group
from probe.observation import Observation
from probe.records import Effect, StepRecord
from probe.settings import Options
from watching import assert_nothing_failed, records_of

CASES = [pytest.param(case, id=case.name) for case in models.available_cases()]
SEED = 5
WAITING = "the counterfactual passes run every"


def passes(**settings: Any) -> Callable[[nn.Module], probe.Probe]:
    """Return a function that attaches a quiet probe whose passes run in every step, unless the settings say otherwise."""
    chosen = probe.Settings(terminal=False, **{"counterfactual_every": 1, **settings})
    return lambda model: probe.attach(model, every=1, settings=chosen)


def observed(case: Case, *, settings: dict[str, Any] | None = None, **arguments: Any) -> tuple[RunResult, tuple[StepRecord, ...]]:
    """Train with passes in every step and return the run and its records."""
    result = run(case, seed=SEED, attach=passes(**(settings or {})), **arguments)
    result.attached.detach()
    return result, records_of(result)


def effect_of(record: StepRecord, what: str, modality: str) -> Effect:
    assert record.counterfactual is not None
    return next(e for e in record.counterfactual.effects if (e.intervention, e.modality) == (what, modality))


@pytest.mark.parametrize("variant", list(VARIANTS))
@pytest.mark.parametrize("case", CASES)
def test_training_is_untouched(case: Case, variant: str) -> None:
    """With passes in every step, losses, weights, optimizer and every generator are those of a run without the probe, bit for bit."""
    if variant in case.unsupported:
        pytest.skip(case.unsupported[variant])
    arguments = {"max_steps": 3, **VARIANTS[variant]}
    watched, records = observed(case, **arguments)
    assert_nothing_failed(records)
    assert_identical(run(case, seed=SEED, **arguments), watched)
    if case.name == "llama":
        assert all(record.counterfactual is None for record in records)
        return
    if not records[0].heads[0].accuracy.labelled:  # transformers 4.46 expands the sequence of Qwen2-Audio and keeps the labels to itself
        assert models.qwen2_audio.EXPANDS
        assert all("does not lie over" in record.not_measured["counterfactual"] for record in records)
        return
    for record in records:
        assert record.counterfactual is not None, record.not_measured["counterfactual"]
        assert record.counterfactual.samples and record.counterfactual.cost_ms
        assert all(effect.tokens for effect in record.counterfactual.effects)


class Seen:
    """A case whose batches are kept by reference, and whose model as it was before the first step is kept, in float64."""

    def __init__(self, case: Case, prepare: Callable[[nn.Module], None] = lambda model: None) -> None:
        self.batches: list[Any] = []

        def build(seed: int) -> nn.Module:
            model = case.build(seed)
            prepare(model)
            return model

        def collate(samples: Sequence[Any]) -> Any:
            self.batches.append(case.collate(samples))
            return self.batches[-1]

        self.case = replace(case, build=build, collate=collate)
        self.model = build(SEED).double().eval()

    def losses(self, batch: dict[str, Tensor], labels: Tensor, logits_of: Callable[[Any], Tensor], shift: int) -> tuple[Tensor, Tensor]:
        """Return each sample's loss in float64, summed over its labelled tokens, and their number."""
        double = {name: value.double() if value.is_floating_point() else value for name, value in batch.items()}
        with torch.no_grad():
            logits = logits_of(self.model(**double))
        targets, logits = (labels[:, shift:], logits[:, : logits.shape[1] - shift]) if shift else (labels, logits)
        picked = functional.log_softmax(logits, -1).gather(-1, targets.clamp(min=0).unsqueeze(-1)).squeeze(-1)
        counted = targets != -100
        return -torch.where(counted, picked, 0.0).flatten(1).sum(1), counted.flatten(1).sum(1)


def compare(record: StepRecord, what: str, modality: str, before: Tensor, after: Tensor, tokens: Tensor) -> None:
    """Fail unless a record's effect, its samples and its metrics are those of losses a sample (sums) before and after."""
    found = effect_of(record, what, modality)
    assert found.tokens == tokens.sum()
    assert found.samples == len(tokens)
    assert found.loss == pytest.approx(float(before.sum() / tokens.sum()), rel=1e-5)
    delta = float((after - before).sum() / tokens.sum())
    assert found.delta_loss == pytest.approx(delta, abs=2e-6)
    assert record.metrics[f"probe/reference/{modality}/delta_loss_{what}"] == found.delta_loss
    wins = ((after > before).double() + 0.5 * (after == before).double()).mean()
    if ((after - before).abs() > 1e-4).all():
        assert found.win_rate == wins
    assert record.counterfactual is not None
    samples = [sample for sample in record.counterfactual.samples if sample.modality == modality]
    assert [sample.tokens for sample in samples] == tokens.tolist()
    assert [sample.loss for sample in samples] == pytest.approx((before / tokens).tolist(), rel=1e-5)
    assert [getattr(sample, what) for sample in samples] == pytest.approx((after / tokens).tolist(), rel=1e-5)


def sharpen(model: nn.Module) -> None:
    """Make a fresh tiny model listen: its predictions differ by more than rounding when the audio does."""
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1 and "embed_positions" not in name and "conv" not in name:
            parameter.data.mul_(6.0)


def test_whisper_by_hand() -> None:
    """Features of the other sample, silence and features reversed in time, in a float64 copy of the model."""

    def without_masking(model: nn.Module) -> None:
        model.config.apply_spec_augment = False
        sharpen(model)

    seen = Seen(models.CASES["whisper"], without_masking)
    _, records = observed(seen.case, max_steps=1)
    batch = dict(seen.batches[0])
    features = batch["input_features"]
    changed = {"swap": features.flip(0), "silence": torch.full_like(features, -1.5)}
    before, tokens = seen.losses(batch, batch["labels"], lambda output: output.logits, 0)
    for what, new in changed.items():
        after, _ = seen.losses({**batch, "input_features": new}, batch["labels"], lambda output: output.logits, 0)
        compare(records[0], what, "text", before, after, tokens)
        assert float((after - before).abs().max()) > 1e-3
    assert records[0].counterfactual is not None and records[0].counterfactual.inputs == ("input_features",)
    for name in ("delta_loss_swap", "delta_loss_silence", "win_rate"):
        assert records[0].metrics[f"probe/reference/{name}"] == records[0].metrics[f"probe/reference/text/{name}"]


def test_divergence_by_hand() -> None:
    """KL between the distributions of the two passes, in float64, over all labelled positions where they are fewer than 64."""
    seen = Seen(models.CASES["qwen2_audio"] if models.CASES["qwen2_audio"].available() else models.CASES["whisper"], sharpen)
    if seen.case.name == "whisper":
        pytest.skip("the installed transformers has no Qwen2Audio")
    _, records = observed(seen.case, max_steps=1)
    batch = {name: value.double() if value.is_floating_point() else value for name, value in seen.batches[0].items()}
    silent = torch.full_like(batch["input_features"], -1.5)
    with torch.no_grad():
        p, q = (functional.log_softmax(seen.model(**{**batch, **new}).logits, -1) for new in ({}, {"input_features": silent}))
    labels = expanded_labels(seen.model, batch, p.shape[1])
    rows = labels[:, 1:] != -100
    expected = functional.kl_div(q, p, log_target=True, reduction="none").sum(-1)[:, :-1][rows]
    found = effect_of(records[0], "silence", "text")
    assert found.divergence_tokens == len(expected) < 64
    assert found.divergence == pytest.approx(float(expected.mean()), rel=1e-4)


def with_decoder_input(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the batch with the labels shifted right, as transformers' own collator adds them for label smoothing."""
    start = torch.full_like(batch["labels"][:, :1], 257)
    shifted = torch.cat([start, batch["labels"][:, :-1]], dim=1)
    return {**batch, "decoder_input_ids": shifted.masked_fill(shifted == -100, 256)}


def expanded_labels(model: nn.Module, batch: dict[str, Tensor], length: int) -> Tensor:
    """Labels that lie over the logits; transformers 4.46 makes room for the frames itself, which this test leaves to it."""
    if batch["labels"].shape[1] != length:
        pytest.skip("this version expands the sequence itself")
    return batch["labels"].masked_fill(batch["attention_mask"] == 0, -100)


def tiled(content: Tensor, length: int) -> Tensor:
    """The first ``length`` frames (last dimension) of a content that is repeated as often as needed."""
    return torch.stack([content[..., i % content.shape[-1]] for i in range(length)], -1)


@pytest.mark.skipif(not models.CASES["qwen2_audio"].available(), reason="the installed transformers has no Qwen2Audio")
def test_qwen2_audio_by_hand() -> None:
    """The other sample's frames, cut or repeated to the receiver's own valid length, behind the receiver's mask and padding."""
    seen = Seen(models.CASES["qwen2_audio"], sharpen)
    _, records = observed(seen.case, max_steps=1, samples=2)
    batch = dict(seen.batches[0])
    features, mask = batch["input_features"], batch["feature_attention_mask"].bool()
    assert len(features) == 2
    swapped, reversed_ = features.clone(), features.clone()
    for clip in (0, 1):
        swapped[clip][:, mask[clip]] = tiled(features[1 - clip][:, mask[1 - clip]], int(mask[clip].sum()))
        reversed_[clip][:, mask[clip]] = features[clip][:, mask[clip]].flip(-1)
    with torch.no_grad():
        length = seen.model(**{n: v.double() if v.is_floating_point() else v for n, v in batch.items()}).logits.shape[1]
    labels = expanded_labels(seen.model, batch, length)
    before, tokens = seen.losses(batch, labels, lambda output: output.logits, 1)
    for what, new in {"swap": swapped, "silence": torch.full_like(features, -1.5)}.items():
        after, _ = seen.losses({**batch, "input_features": new}, labels, lambda output: output.logits, 1)
        compare(records[0], what, "text", before, after, tokens)
        assert float((after - before).abs().max()) > 1e-3


def heard(model: nn.Module, name: str) -> Callable[[Any], Tensor]:
    """Return a function of the model's output that gives what a head returned in the call that made it."""
    kept: list[Tensor] = []
    model.get_submodule(name).register_forward_hook(lambda module, args, output: kept.append(output))
    return lambda output: kept[-1]


def first_run(ids: Tensor, placeholders: tuple[int, ...]) -> int:
    """Return how many placeholders stand in the first run of them: the frames of the reference."""
    flags = [token in placeholders for token in ids.tolist()]
    begin = flags.index(True)
    return flags[begin:].index(False)


def over_placeholders(batch: dict[str, Tensor], placeholders: tuple[int, ...]) -> Tensor:
    """Lay the audio labels (B, F, K) over the placeholders of the text, (B, S, K)."""
    laid = torch.full((*batch["input_ids"].shape, batch["audio_labels"].shape[-1]), -100)
    for row, ids in enumerate(batch["input_ids"].tolist()):
        frames = iter(batch["audio_labels"][row])
        for position, token in enumerate(ids):
            if token in placeholders:
                laid[row, position] = next(frames)
    return laid


def other_reference(batch: dict[str, Tensor], placeholders: tuple[int, ...], borders: tuple[int, ...]) -> Tensor:
    """Each sample's codes with the other's reference in the place of its own, codebook by codebook, stream borders left alone."""
    codes = batch["audio_input_ids"]
    swapped = codes.clone()
    frames = [first_run(ids, placeholders) for ids in batch["input_ids"]]
    for mine, other in ((0, 1), (1, 0)):
        for book in range(codes.shape[-1]):
            source = [code for code in codes[other, : frames[other], book].tolist() if code not in borders]
            places = [frame for frame in range(frames[mine]) if int(codes[mine, frame, book]) not in borders]
            for number, frame in enumerate(places):
                swapped[mine, frame, book] = source[number % len(source)]
    return swapped


@pytest.mark.skipif(not models.CASES["higgs_audio_v2"].available(), reason="the installed transformers has no HiggsAudioV2")
def test_higgs_audio_by_hand() -> None:
    """The other sample's reference codes in the place of its own, targets untouched; both heads, and silence is not defined."""
    seen = Seen(models.CASES["higgs_audio_v2"], sharpen)
    _, records = observed(seen.case, max_steps=1)
    batch, config = dict(seen.batches[0]), seen.model.config
    placeholders = (config.audio_token_id, config.audio_delay_token_id)
    swapped = other_reference(batch, placeholders, (config.audio_stream_bos_id, config.audio_stream_eos_id))
    assert not torch.equal(swapped, batch["audio_input_ids"])
    for modality, labels, logits_of in (
        ("text", batch["labels"], heard(seen.model, "text_lm_head")),
        ("audio", over_placeholders(batch, placeholders), lambda output: output.logits.unflatten(-1, (swapped.shape[-1], -1))),
    ):
        before, tokens = seen.losses(batch, labels, logits_of, 1)
        after, _ = seen.losses({**batch, "audio_input_ids": swapped}, labels, logits_of, 1)
        compare(records[0], "swap", modality, before, after, tokens)
        assert float((after - before).abs().max()) > 1e-3
    assert "no silence code" in records[0].not_measured["probe/reference/delta_loss_silence"]
    assert records[0].metrics["probe/reference/delta_loss_swap"] == effect_of(records[0], "swap", "audio").delta_loss


def failing_in_eval(case: Case, *, after: int) -> Case:
    """A case whose head runs out of memory in eval mode at its ``after``-th call."""

    def build(seed: int) -> nn.Module:
        model = case.build(seed)
        head = model.get_submodule(case.heads[0])
        forward, calls = head.forward, []

        def failing(hidden: Tensor) -> Tensor:
            if not head.training:
                calls.append(1)
                if len(calls) == after:
                    raise torch.OutOfMemoryError("CUDA out of memory.") if hasattr(torch, "OutOfMemoryError") else RuntimeError("memory")
            return forward(hidden)

        head.forward = failing
        return model

    return replace(case, build=build)


@pytest.mark.parametrize("after", [1, 3])
def test_out_of_memory_switches_the_passes_off(after: int) -> None:
    """An error in a pass: said once, training as without the probe, nothing left registered, in eval mode or reserved; no pass again."""
    case = models.CASES["whisper"]
    watched, records = observed(failing_in_eval(case, after=after), max_steps=4)
    assert_identical(run(case, seed=SEED, max_steps=4), watched)
    assert all(module.training for module in watched.model.modules())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in watched.model.modules())
    assert [record.counterfactual for record in records] == [None] * 4
    for record in records:
        assert record.not_measured["counterfactual"].startswith("switched off after")
        assert "memory" in record.not_measured["probe/reference/delta_loss_swap"]
        assert "probe/text/loss" in record.metrics and "probe/grad/norm" in record.metrics
    assert watched.attached.buffer.bytes == 0


class Normed(nn.Module):
    """A small model with batch norm in front of everything: an audio encoder by its input's name, and a head over its frames."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(16)
        self.encoder = nn.Linear(16, 16)
        self.lm_head = nn.Linear(16, 32)

    def forward(self, input_features: Tensor, labels: Tensor) -> dict[str, Tensor]:
        hidden = self.encoder(self.norm(input_features).transpose(1, 2))
        logits = self.lm_head(hidden)
        return {"loss": functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()), "logits": logits}


def normed_batch(seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(3, 16, 10, generator=generator).clamp(-1, 1)
    return {"input_features": features, "labels": torch.randint(32, (3, 10), generator=generator)}


def loop(attach: Callable[[nn.Module], Any] | None, steps: int = 3) -> tuple[nn.Module, list[StepRecord]]:
    """Train in a hand-written loop and return the model and what ``p.last`` was."""
    torch.manual_seed(SEED)
    model = Normed()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    attached = attach(model) if attach is not None else None
    seen: list[StepRecord] = []
    for step in range(steps):
        batch = normed_batch(step)
        if attached is None:
            model(**batch)["loss"].backward()
        else:
            with attached.step():
                model(**batch)["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()
    if attached is not None:
        attached.detach()
        seen.append(attached.last)
    return model, seen


def test_batch_norm_and_a_loop_of_ones_own() -> None:
    """Passes in a hand-written loop, on inputs that the user named: running means and counts of batch norm are as without the probe."""
    plain, _ = loop(None)
    watched, records = loop(passes(conditions=("input_features",)))
    for name, value in plain.state_dict().items():
        assert torch.equal(value, watched.state_dict()[name]), name
    assert records[0].step == 3
    assert records[0].counterfactual is not None, records[0].not_measured["counterfactual"]
    assert records[0].counterfactual.inputs == ("input_features",)
    assert {effect.intervention for effect in records[0].counterfactual.effects} == {"swap", "silence", "reverse"}
    assert [sample.tokens for sample in records[0].counterfactual.samples] == [9, 9, 9]


def reasons(case: Case, *, settings: dict[str, Any] | None = None, **arguments: Any) -> StepRecord:
    """Return the first record of a training in which no pass can be made."""
    _, records = observed(case, settings=settings, max_steps=1, **arguments)
    assert records[0].counterfactual is None
    assert not [name for name in records[0].metrics if name.startswith("probe/reference/")]
    return records[0]


def passes_named(record: StepRecord) -> list[str]:
    """Return the metrics of the passes that a record has a reason for."""
    names = {metric.name for metric in (*reference_metrics(), *reference_detail_metrics())}
    return [name for name in record.not_measured if name in names]


def test_switched_off() -> None:
    """With 0 no pass is made, and every metric says so."""
    record = reasons(models.CASES["whisper"], settings={"counterfactual_every": 0})
    named = passes_named(record)
    assert {record.not_measured[name] for name in ("counterfactual", *named)} == {"switched off by counterfactual_every=0"}
    assert {"probe/reference/win_rate", "probe/reference/text/divergence_swap", "probe/reference/cost_ms"} <= set(named)


def test_not_in_this_step() -> None:
    """Between two passes the record names the next; only the headline metrics repeat it."""
    record = reasons(models.CASES["whisper"], settings={"counterfactual_every": 4})
    assert record.not_measured["counterfactual"] == f"{WAITING} 4 steps (next: 4)"
    assert set(passes_named(record)) == {f"probe/reference/{name}" for name in ("delta_loss_swap", "delta_loss_silence", "win_rate")}


def test_a_model_without_audio() -> None:
    """It has no passes, in whatever step."""
    record = reasons(models.CASES["llama"], settings={"counterfactual_every": 4})
    assert record.not_measured["probe/reference/text/delta_loss_swap"].startswith("the model takes no audio")


def test_a_batch_without_audio() -> None:
    """The reason is what was looked for among the inputs."""
    case = models.CASES["original"]
    textual = replace(case, dataset=lambda count, seed: models.original_training.text_dataset(count, seed))
    assert "holds no clip" in reasons(textual).not_measured["probe/reference/audio/win_rate"]


def test_sharded_parameters(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model of which this rank holds a share only is not run, and says why."""
    monkeypatch.setattr("probe.counterfactual.watcher.is_sharded", lambda parameter: parameter.dim() == 1)
    assert reasons(models.CASES["whisper"]).not_measured["counterfactual"].startswith("sharded parameters")


def test_data_parallel() -> None:
    """What nn.DataParallel goes round is not run."""
    model = models.CASES["whisper"].build(SEED)
    attached = passes()(model)
    session = observation_of(model, around=nn.DataParallel(model))
    assert session._counterfactual._never.startswith("nn.DataParallel")
    attached.detach()


def observation_of(model: nn.Module, *, around: nn.Module, **settings: Any) -> Observation:
    options = Options(every=1, settings=probe.Settings(terminal=False, counterfactual_every=1, **settings))
    return Observation(model, options, attached=model, around=around, processors=[], say=pytest.fail)


def test_a_compiled_model_that_is_left_alone() -> None:
    """Where the hooks are not run inside compiled regions, neither are passes; the reason is the window's."""
    case = models.CASES["whisper"]
    result = run(
        case,
        seed=SEED,
        attach=lambda model: probe.attach(model, every=1, compile="off", settings=probe.Settings(terminal=False, counterfactual_every=1)),
        built=lambda trainer: setattr(trainer.model, "_compiled_call_impl", trainer.model._call_impl),
        max_steps=1,
    )
    result.attached.detach()
    record = records_of(result)[0]
    assert record.counterfactual is None
    assert "compile='off'" in record.not_measured["counterfactual"]


def test_labels_that_never_reach_the_forward() -> None:
    """With label smoothing the Trainer pops them; the passes are scored without smoothing all the same."""
    case = models.CASES["whisper"]
    smoothed = replace(case, collate=lambda samples: with_decoder_input(case.collate(samples)))
    _, records = observed(smoothed, max_steps=1, label_smoothing_factor=0.1)
    assert effect_of(records[0], "swap", "text").tokens == records[0].heads[0].accuracy.labelled


def test_the_last_micro_batch_is_taken() -> None:
    """With accumulation the passes are of the micro-batch that ends the step: its labelled tokens, not the step's."""
    seen = Seen(models.CASES["whisper"])
    _, records = observed(seen.case, max_steps=1, gradient_accumulation_steps=2)
    assert effect_of(records[0], "swap", "text").tokens == int((seen.batches[1]["labels"] != -100).sum())
    assert int((seen.batches[1]["labels"] != -100).sum()) != int((seen.batches[0]["labels"] != -100).sum())


def test_groups_by_language_token() -> None:
    """Whisper's labels begin with a language, which the tokenizer names."""
    case = models.CASES["whisper"]
    settings = probe.Settings(terminal=False, counterfactual_every=1)
    result = run(case, seed=SEED, max_steps=1, attach=lambda m: probe.attach(m, every=1, tokenizer=case.tokenizer(), settings=settings))
    result.attached.detach()
    (record,) = records_of(result)
    assert record.counterfactual is not None
    assert {sample.group for sample in record.counterfactual.samples} == {"en"}
    assert [(row.group, row.samples) for row in by_group([record])] == [("en", 2)]


@pytest.mark.parametrize(("column", "expected"), [(torch.tensor([7, 9]), ["7", "9"]), (["a", "b"], ["a", "b"]), (None, ["", ""])])
def test_groups_by_a_column(column: Any, expected: list[str]) -> None:
    """A tensor or a list of one value a sample, which the model need not take; a column that is not there is named."""
    case = models.CASES["whisper"]

    class Popping(case.trainer_class):  # type: ignore[misc,name-defined]
        def compute_loss(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
            inputs.pop("speaker", None)
            return super().compute_loss(model, inputs, *args, **kwargs)

    def collate(samples: Sequence[Any]) -> dict[str, Any]:
        return case.collate(samples) | ({} if column is None else {"speaker": column})

    _, (record,) = observed(replace(case, collate=collate, trainer_class=Popping), settings={"group_by": "speaker"}, max_steps=1)
    assert record.counterfactual is not None
    assert [sample.group for sample in record.counterfactual.samples] == expected
    assert ("counterfactual/groups" in record.not_measured) == (column is None)


def test_nothing_is_kept_between_steps() -> None:
    """When a step has ended, no call of the root and none of its inputs is held by the buffer; in the step it is not counted twice."""
    case = models.CASES["whisper"]
    held: list[bool] = []

    class Looking(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            held.extend("root call" in micro.scratch for micro in attached[0].buffer.micro_batches)

    attached: list[probe.Probe] = []

    def attach(model: nn.Module) -> probe.Probe:
        attached.append(passes(counterfactual_every=2)(model))
        return attached[0]

    run(case, seed=SEED, attach=attach, built=lambda trainer: trainer.add_callback(Looking()), max_steps=2, gradient_accumulation_steps=2)
    attached[0].detach()
    assert held == [False] * 4


def test_the_budget_gets_back_what_was_reserved(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the passes keep while they run counts against the buffer's budget, and no longer when they have ended."""
    reserved: list[int] = []
    released: list[int] = []
    reserve, release = StepBuffer.reserve, StepBuffer.release

    def noting(self: StepBuffer, what: str, nbytes: int) -> bool:
        if what in ("counterfactual", "counterfactual/text/divergence"):
            reserved.append(nbytes)
        return reserve(self, what, nbytes)

    def giving(self: StepBuffer, nbytes: int) -> None:
        released.append(nbytes)
        release(self, nbytes)

    monkeypatch.setattr(StepBuffer, "reserve", noting)
    monkeypatch.setattr(StepBuffer, "release", giving)
    _, records = observed(models.CASES["whisper"], max_steps=1)
    assert records[0].counterfactual is not None
    assert len(reserved) == 2 and sum(reserved) in released
