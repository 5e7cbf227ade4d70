"""Whatever goes wrong inside the probe or comes in broken, it is named once and training is unharmed."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback

import probe
from models import CASES
from models.running import assert_identical, run
from probe.attachment import REGISTRY
from probe.callbacks import InputLoggerCallback
from probe.capture.observers.activation_gradients import ActivationGradientWatcher
from probe.capture.observers.attention import AttentionWatcher
from probe.capture.observers.branches import BranchWatcher
from probe.capture.observers.gradients import GradientWatcher
from probe.capture.observers.heads import HeadWatcher
from probe.capture.observers.inputs import InputWatcher
from probe.capture.observers.loss import LossWatcher
from probe.capture.observers.statistics import StatisticsWatcher
from probe.capture.observers.updates import UpdateWatcher
from probe.observation import Observation
from probe.records import StepRecord
from probe.sinks.run_folder import RunFolder
from probe.sinks.terminal import TerminalSink

LLAMA, WHISPER = CASES["llama"], CASES["whisper"]


@pytest.fixture(autouse=True)
def _detached() -> Any:
    yield
    for attached in REGISTRY.all():
        attached.detach()


def records(result: Any) -> tuple[StepRecord, ...]:
    return probe.load(result.trainer.args.output_dir).records


def failing(error: type[Exception]) -> Callable[..., None]:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise error("made to fail")

    return fail


@pytest.mark.parametrize(
    ("watcher", "method"),
    [
        (InputWatcher, "enter"),
        (StatisticsWatcher, "leave"),
        (HeadWatcher, "leave"),
        (AttentionWatcher, "enter"),
        (AttentionWatcher, "leave"),
        (AttentionWatcher, "_see"),
        (BranchWatcher, "enter"),
        (ActivationGradientWatcher, "leave"),
        (ActivationGradientWatcher, "step_end"),
        (GradientWatcher, "step_end"),
        (GradientWatcher, "before_update"),
        (UpdateWatcher, "step_end"),
        (UpdateWatcher, "before_update"),
        (UpdateWatcher, "after_update"),
        (LossWatcher, "training_step"),
    ],
    ids=lambda value: value if isinstance(value, str) else value.name,
)
def test_an_error_in_any_observer_switches_that_one_off(
    watcher: type, method: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One line tells the part; the other parts go on; losses and weights are those of a run without the probe."""
    case = CASES["original"] if watcher is BranchWatcher else WHISPER
    plain = run(case, max_steps=3)
    monkeypatch.setattr(watcher, method, failing(torch.OutOfMemoryError))
    observed = run(case, attach=lambda model: probe.attach(model, every=1, settings=probe.Settings(terminal=False)), max_steps=3)
    assert_identical(plain, observed)
    assert capsys.readouterr().out.count(f"probe: {watcher.name} switched off after OutOfMemoryError: made to fail") == 1
    last = records(observed)[-1]
    assert last.step == 3
    assert "OutOfMemoryError" in last.not_measured[watcher.name]
    assert ("probe/text/loss" if watcher is InputWatcher else "probe/input/samples") in last.metrics


@pytest.mark.parametrize(
    ("watcher", "method", "part"),
    [
        (InputWatcher, "enter", "inputs"),
        (StatisticsWatcher, "leave", "statistics"),
        (HeadWatcher, "leave", "heads"),
        (AttentionWatcher, "enter", "attention"),
        (BranchWatcher, "enter", "branches"),
    ],
)
def test_a_part_that_is_off_does_not_pass_for_nothing_seen(
    watcher: type, method: str, part: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What an observer did not see because it is off is never told as "not called", 0 tokens or no forward: the reason is its error."""
    monkeypatch.setattr(watcher, method, failing(ValueError))
    case = CASES["original"]
    observed = run(case, attach=lambda model: probe.attach(model, every=1), max_steps=2)
    observed.attached.detach()
    last = records(observed)[-1]
    untrue = ("not called", "no token reached", "no audio features", "no input", "without it", "names no audio")
    gone = {
        "inputs": "probe/input/samples",
        "statistics": "probe/audio_encoder/rms",
        "heads": "probe/text/loss",
        "attention": "probe/attention/entropy",
        "branches": "probe/feed_forward/text_token_share",
    }[part]
    assert gone not in last.metrics
    assert "ValueError" in last.not_measured[gone]
    layerdrop = {what for what in last.not_measured if what.startswith("site:")} if part != "statistics" else set()
    assert not [what for what, why in last.not_measured.items() if what not in layerdrop and any(word in why for word in untrue)]
    assert "probe/audio_encoder/calls" not in last.metrics or part != "statistics"
    out = capsys.readouterr().out
    assert "no training forward was seen" not in out
    assert ", not called" not in out


def test_hooks_that_cannot_be_registered_are_the_reason_for_all_that_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    """If no hook could be registered, that is said wherever a number is missing; the loss is still measured."""
    monkeypatch.setattr("probe.capture.hooks.HookSet.register", failing(ValueError))
    (record,) = records(run(LLAMA, attach=lambda model: probe.attach(model, every=1), max_steps=1))
    for name in ("probe/text/loss", "probe/attention/entropy", "probe/input/samples", "site:lm_head"):
        assert "ValueError: made to fail" in record.not_measured[name]
    assert "probe/loss" in record.metrics


def test_ids_are_not_counted_where_there_are_none() -> None:
    """Whisper has no input_ids: no number stands for "none outside the vocabulary", and the reason is there."""
    (record,) = records(run(WHISPER, attach=lambda model: probe.attach(model, every=1), max_steps=1))
    assert record.not_measured["probe/input/ids_outside_vocabulary"] == "no input_ids among the inputs"
    assert "probe/input/ids_outside_vocabulary" not in record.metrics
    assert record.inputs.ids_outside_vocabulary is None


def test_an_error_in_a_gradient_hook_stays_out_of_the_backward(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """The hooks on outputs run inside the user's backward: an error in them must not reach it."""
    plain = run(WHISPER, max_steps=2)
    monkeypatch.setattr("probe.capture.observers.activation_gradients.norm_of", failing(RuntimeError))
    observed = run(WHISPER, attach=lambda model: probe.attach(model, every=1), max_steps=2)
    assert_identical(plain, observed)
    assert capsys.readouterr().out.count("activation_gradients switched off after RuntimeError") == 1


@pytest.mark.parametrize(
    ("owner", "name", "part"),
    [
        (RunFolder, "write", "run folder"),
        (TerminalSink, "show", "terminal"),
        (Observation, "record", "record"),
        (Observation, "after_backward", "step end"),
    ],
)
def test_an_error_after_the_step_is_said_once(
    owner: type, name: str, part: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A sink, the record or the end of the step may fail: training goes on, said once."""
    plain = run(LLAMA, max_steps=3)
    monkeypatch.setattr(owner, name, failing(RuntimeError))
    assert_identical(plain, run(LLAMA, attach=lambda model: probe.attach(model, every=1), max_steps=3))
    assert capsys.readouterr().out.count(f"probe: {part} switched off after RuntimeError: made to fail") == 1


def test_a_section_that_fails_is_said_once(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """A callback of the user's that cannot show its section does not stop training; the run folder is written."""

    class Bad(InputLoggerCallback):
        def section(self, record: StepRecord) -> Any:
            raise IndexError("mine")

    result = run(LLAMA, built=lambda trainer: trainer.add_callback(Bad(log_every_n_steps=1)), max_steps=2)
    assert capsys.readouterr().out.count("terminal switched off after IndexError: mine") == 1
    assert [record.step for record in records(result)] == [1, 2]


def test_observing_that_cannot_begin_is_said_and_training_goes_on(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """If the sites cannot be found when training begins, the run is not observed, and detach says why nothing was seen."""
    plain = run(LLAMA, max_steps=2)
    model = LLAMA.build(0)
    p = probe.attach(model, every=1)
    monkeypatch.setattr("probe.observation.discover", failing(KeyError))
    LLAMA.trainer(model, max_steps=2).train()
    p.detach()
    out = capsys.readouterr().out
    assert "this training is not observed, because observing it failed at its begin: KeyError" in out
    assert "no training forward was seen: observing failed: KeyError" in out
    assert plain.losses


def test_a_budget_below_the_fixed_sums_is_refused_with_the_least(capsys: pytest.CaptureFixture[str]) -> None:
    """A budget that could not even hold the sums is named with the bound; training goes on unobserved."""
    plain = run(LLAMA, max_steps=2)
    assert_identical(plain, run(LLAMA, attach=lambda model: probe.attach(model, every=1, budget_mib=0.0001), max_steps=2))
    out = capsys.readouterr().out
    assert "budget_mib=0.0001: the sums of this model's sites alone take 0.00" in out


@pytest.mark.skipif(os.name != "posix", reason="a file where a folder should be is made the posix way")
def test_a_run_folder_that_cannot_be_written_is_said_once(tmp_path: Any, capsys: pytest.CaptureFixture[str]) -> None:
    """A file stands where the folder should be: one line names the path, metrics still reach the Trainer's logs."""
    blocked = tmp_path / "blocked"
    blocked.write_text("a file")
    settings = probe.Settings(run_folder=blocked / "run", terminal=False)
    result = run(LLAMA, attach=lambda model: probe.attach(model, every=1, settings=settings), max_steps=3)
    out = capsys.readouterr().out
    assert out.count("run folder switched off after RunFolderError") == 1
    assert str(blocked) in out
    assert all("probe/text/loss" in entry for entry in result.log_history if "loss" in entry)


class Spoiled(nn.Module):
    """Puts a NaN into the encoder's output, a thousandth of the way in."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        out = self.inner(*args, **kwargs).clone()
        out[0, 0, :3] = torch.tensor([float("nan"), float("inf"), float("-inf")])
        return out


def test_nan_and_inf_are_named_with_their_site_and_count() -> None:
    """The first site with non-finite values is named with their exact number; no NaN enters metrics, logs or the folder."""
    model = WHISPER.build(0)
    model.model.encoder.layer_norm = Spoiled(model.model.encoder.layer_norm)
    probe.attach(model, every=1)
    trainer = WHISPER.trainer(model, max_steps=1)
    trainer.train()
    (record,) = probe.load(trainer.args.output_dir).records
    encoder = next(row for row in record.statistics if row.role == "audio_encoder")
    assert encoder.nonfinite == 3
    assert encoder.mean is None
    assert record.not_measured["site:model.encoder"] == "3 NaN or Inf values in its output"
    assert "probe/audio_encoder/rms" not in record.metrics
    assert record.metrics["probe/audio_encoder/nonfinite"] == 3
    assert all(value == value and abs(value) != float("inf") for value in record.metrics.values())
    refused = []
    for line in (Path(trainer.args.output_dir) / "_probe" / "records-rank00000.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=refused.append)
    assert refused == []


def test_a_loss_of_nan_is_named_not_logged() -> None:
    """A NaN loss is absent from the metrics, and the reason says that it was not finite."""
    model = LLAMA.build(0)
    with torch.no_grad():
        model.model.norm.weight.fill_(float("nan"))
    probe.attach(model, every=1)
    trainer = LLAMA.trainer(model, max_steps=1)
    trainer.train()
    (record,) = probe.load(trainer.args.output_dir).records
    assert "probe/loss" not in record.metrics
    assert record.not_measured["probe/loss"] == "not a finite number: nan"
    assert "NaN or Inf" in record.not_measured["probe/text/loss"]


def test_ids_outside_the_tokenizer_are_named_by_position(capsys: pytest.CaptureFixture[str]) -> None:
    """Ids that the model knows and the tokenizer does not are shown by position; nothing crashes."""
    tokenizer = LLAMA.tokenizer()
    beyond = len(tokenizer) + 1
    assert beyond < LLAMA.vocabulary

    def collate(samples: Any) -> dict[str, Tensor]:
        batch = LLAMA.collate(samples)
        batch["input_ids"][0, 2] = beyond
        return batch

    model = LLAMA.build(0)
    probe.attach(model, every=1, tokenizer=tokenizer)
    trainer = Trainer(model=model, args=LLAMA.arguments(max_steps=1), train_dataset=LLAMA.dataset(4, 0), data_collator=collate)
    trainer.train()
    (record,) = probe.load(trainer.args.output_dir).records
    assert f"[id {beyond} at position 2 is outside the tokenizer's {len(tokenizer)} tokens]" in record.inputs.shown[0].text
    assert record.metrics["probe/input/ids_outside_vocabulary"] == 0
    assert f"id {beyond} at position 2" in capsys.readouterr().out


def test_a_tokenizer_that_cannot_decode_is_said_once(capsys: pytest.CaptureFixture[str]) -> None:
    """Ids are shown instead of text, and one line says why."""

    class Broken:
        def decode(self, *args: Any, **kwargs: Any) -> str:
            raise OverflowError("out of range")

    result = run(LLAMA, attach=lambda model: probe.attach(model, every=1, tokenizer=Broken()), max_steps=2)
    assert capsys.readouterr().out.count("probe: the tokenizer cannot decode (OverflowError: out of range)") == 1
    last = records(result)[-1]
    assert last.inputs.shown[0].text is None
    assert last.inputs.shown[0].ids
    assert "cannot decode" in last.not_measured["inputs/text"]


def test_empty_and_constant_audio_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    """A clip whose features are constant is counted and named."""

    def collate(samples: Any) -> Any:
        batch = WHISPER.collate(samples)
        batch["input_features"][1] = 0.5
        return batch

    model = WHISPER.build(0)
    probe.attach(model, every=1)
    trainer = WHISPER.trainer_class(
        model=model, args=WHISPER.arguments(max_steps=1), train_dataset=WHISPER.dataset(4, 0), data_collator=collate
    )
    trainer.train()
    (record,) = probe.load(trainer.args.output_dir).records
    assert record.metrics["probe/input/audio_clips_constant"] == 1
    assert [segment.note for segment in record.inputs.audio if segment.sample == 1] == ["constant"]
    assert "constant" in capsys.readouterr().out


def test_an_empty_batch_of_audio_is_named() -> None:
    """Features with shape[0] == 0 are named as such; nothing is divided by zero, and the encoder's numbers are absent with a reason."""

    class Text(nn.Module):
        """A model that takes audio features, of which this batch has none."""

        def __init__(self) -> None:
            super().__init__()
            self.llama = LLAMA.build(0)

        def forward(self, input_features: Tensor, **kwargs: Any) -> Any:
            return self.llama(**kwargs)

    model = Text()
    probe.attach(model, every=1)
    args = LLAMA.arguments(max_steps=1)
    collate = lambda picked: {**LLAMA.collate(picked), "input_features": torch.zeros(0, 80, 100)}  # noqa: E731
    Trainer(model=model, args=args, train_dataset=LLAMA.dataset(4, 0), data_collator=collate).train()
    (record,) = probe.load(args.output_dir).records
    assert record.not_measured["inputs/audio"] == "1 micro-batches brought audio features with 0 clips (shape[0] == 0)"
    assert {tensor.name: tensor.note for tensor in record.inputs.tensors}["input_features"] == "empty"
    assert record.metrics["probe/input/audio_clips"] == 0


def test_keep_text_false_keeps_the_data_out(capsys: pytest.CaptureFixture[str]) -> None:
    """With keep_text=False no token id and no text is in the record, the run folder or on the terminal."""
    settings = probe.Settings(keep_text=False)
    result = run(LLAMA, attach=lambda model: probe.attach(model, every=1, tokenizer=LLAMA.tokenizer(), settings=settings), max_steps=1)
    (record,) = records(result)
    assert record.inputs.shown == ()
    assert all(tensor.first_values == () for tensor in record.inputs.tensors)
    assert all(head.shown == () and head.accuracy.top_token is None and head.top_token_text is None for head in record.heads)
    assert "keep_text=False" in record.not_measured["inputs/text"]
    assert "<s>" not in capsys.readouterr().out


def test_kept_tensors_are_written_on_request(tmp_path: Any) -> None:
    """write_kept=True puts the kept tensors into the run folder as safetensors, as the buffer held them."""
    seen: dict[str, Tensor] = {}
    model = WHISPER.build(0)
    p = probe.attach(model, every=1, keep={"audio_encoder"}, settings=probe.Settings(write_kept=True, run_folder=tmp_path))

    class Read(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            seen["x"] = p.buffer["model.encoder"][0].tensor

    trainer = WHISPER.trainer(model, max_steps=1)
    trainer.add_callback(Read())
    trainer.train()
    (file,) = (tmp_path / "kept").iterdir()
    assert file.name == "step-00000001.safetensors"
    (written,) = load_file(file).values()
    assert torch.equal(written, seen["x"])


def test_no_section_ever_says_what_the_old_callbacks_said(capsys: pytest.CaptureFixture[str]) -> None:
    """No NOT FOUND, nothing assumed, nothing needed: numbers or named reasons, on every model."""
    for case in CASES.values():
        if case.available():
            run(case, attach=lambda model: probe.attach(model, every=1), max_steps=1)
    out = capsys.readouterr().out
    assert "Zero-shot verification · step 1" in out
    for word in ("NOT FOUND", "assumed", "HEALTHY", "VERIFICATION NEEDED", "CALCULATION NEEDED", "gives no reason", "nan"):
        assert word not in out, word
