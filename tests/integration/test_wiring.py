"""However the Trainer is made and whatever goes round the model, the probe is wired when training begins and gone afterwards."""

from __future__ import annotations

import copy
import gc
import json
import pickle
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import Trainer, TrainerCallback
from transformers.trainer_callback import CallbackHandler

import probe
from models import CASES
from models.running import run
from probe.attachment import REGISTRY
from probe.callbacks import (
    InputLoggerCallback,
    OutputLoggerCallback,
    SharedAttentionLoggerCallback,
    ZeroShotVerificationLoggerCallback,
)

LLAMA, WHISPER = CASES["llama"], CASES["whisper"]
FOUR = (InputLoggerCallback, OutputLoggerCallback, SharedAttentionLoggerCallback, ZeroShotVerificationLoggerCallback)
TITLES = ("Input", "Output", "Shared attention", "Zero-shot verification")


@pytest.fixture(autouse=True)
def _nothing_left() -> Any:
    """Every test ends with no probe and nothing patched, once its objects are gone."""
    _detach_all()  # the models of a file before may not have been collected yet
    original = CallbackHandler.__dict__["on_train_begin"]
    yield
    _detach_all()
    assert CallbackHandler.__dict__["on_train_begin"] is original


def _detach_all() -> None:
    for attached in REGISTRY.all():
        attached.detach()


def hooks_of(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def steps(output_dir: str | Path) -> list[int]:
    """Return the step of every line that was written, so that a record made twice does not go unseen."""
    lines = (Path(output_dir) / "_probe" / "records-rank00000.jsonl").read_text().splitlines()
    return [json.loads(line)["step"] for line in lines]


def test_attach_before_the_trainer_is_built() -> None:
    """The one line in front of the Trainer is enough."""
    result = run(LLAMA, attach=lambda model: probe.attach(model, every=3), max_steps=7)
    assert steps(result.trainer.args.output_dir) == [1, 3, 6]
    assert result.attached.last.step == 6


def test_attach_after_the_trainer_is_built() -> None:
    """Attaching to a Trainer's model later works the same."""
    result = run(LLAMA, built=lambda trainer: probe.attach(trainer.model, every=3), max_steps=4)
    assert steps(result.trainer.args.output_dir) == [1, 3]


@pytest.mark.parametrize("added", ["add_callback", "constructor"])
def test_callbacks_alone_attach_by_themselves(added: str, capsys: pytest.CaptureFixture[str]) -> None:
    """A callback given to the Trainer without any attach shows its section, at its own cadence, and only its own section."""
    callback = InputLoggerCallback(tokenizer=LLAMA.tokenizer(), log_every_n_steps=2)
    if added == "add_callback":
        result = run(LLAMA, built=lambda trainer: trainer.add_callback(callback), max_steps=5)
        output_dir = result.trainer.args.output_dir
    else:
        trainer = Trainer(
            model=LLAMA.build(0),
            args=LLAMA.arguments(max_steps=5),
            train_dataset=LLAMA.dataset(8, 0),
            data_collator=LLAMA.collate,
            callbacks=[callback],
        )
        trainer.train()
        output_dir = trainer.args.output_dir
    shown = capsys.readouterr().out
    assert [shown.count(f"Input · step {step} ") for step in range(1, 6)] == [1, 1, 0, 1, 0]
    assert "Output · step" not in shown
    assert steps(output_dir) == [1, 2, 4]


def test_each_callback_has_its_own_cadence(capsys: pytest.CaptureFixture[str]) -> None:
    """Steps are sampled at the union of the cadences; each callback shows only its own."""

    def add(trainer: Trainer) -> None:
        trainer.add_callback(InputLoggerCallback(log_every_n_steps=2))
        trainer.add_callback(OutputLoggerCallback(log_every_n_steps=3))

    result = run(LLAMA, built=add, max_steps=6)
    shown = capsys.readouterr().out
    assert steps(result.trainer.args.output_dir) == [1, 2, 3, 4, 6]
    assert [step for step in range(1, 7) if f"Input · step {step} " in shown] == [1, 2, 4, 6]
    assert [step for step in range(1, 7) if f"Output · step {step} " in shown] == [1, 3, 6]


def test_attach_adds_only_the_callbacks_that_are_missing(capsys: pytest.CaptureFixture[str]) -> None:
    """With one of the four in the Trainer, attach adds the other three: every section is shown once a sampled step."""
    run(
        LLAMA,
        attach=lambda model: probe.attach(model, every=100),
        built=lambda trainer: trainer.add_callback(OutputLoggerCallback(log_every_n_steps=100)),
        max_steps=2,
    )
    shown = capsys.readouterr().out
    assert [shown.count(f"{title} · step 1 ") for title in TITLES] == [1, 1, 1, 1]


def test_headline_metrics_are_in_the_logs_that_integrations_see() -> None:
    """Metrics of a sampled step enter the first training log at or after it, in log_history and in what later callbacks are given."""
    seen: list[dict[str, Any]] = []

    class Integration(TrainerCallback):
        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            seen.append(dict(logs))

    result = run(
        LLAMA,
        attach=lambda model: probe.attach(model, every=4),
        built=lambda trainer: trainer.add_callback(Integration()),
        max_steps=7,
        logging_steps=2,
    )
    history = {entry["step"]: entry.get("probe/step") for entry in result.log_history if "loss" in entry}
    assert history == {2: 1, 4: 4, 6: None}
    assert [entry.get("probe/step") for entry in seen if "loss" in entry] == [1, 4, None]
    carried = [entry for entry in result.log_history if entry.get("probe/step") == 4][0]
    record = [r for r in probe.load(result.trainer.args.output_dir).records if r.step == 4][0]
    assert carried["probe/text/loss"] == record.metrics["probe/text/loss"]
    assert all(isinstance(value, (int, float)) for name, value in carried.items() if name.startswith("probe/"))
    assert sum(name.startswith("probe/") for name in carried) <= 25


def test_evaluation_logs_stay_as_they_are() -> None:
    """No probe key enters an evaluation log or the summary at the end, nor what integrations are given of them."""
    seen: list[dict[str, Any]] = []

    class Integration(TrainerCallback):
        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            seen.append(dict(logs))

    result = run(
        LLAMA,
        attach=lambda model: probe.attach(model, every=1),
        built=lambda trainer: trainer.add_callback(Integration()),
        max_steps=4,
        eval_strategy="steps",
        eval_steps=2,
        logging_steps=3,
    )
    others = [entry for entry in result.log_history if "loss" not in entry]
    others += [logs for logs in seen if "loss" not in logs]
    assert len(others) == 6
    assert not any(name.startswith("probe/") for entry in others for name in entry)


@pytest.mark.parametrize("when", ["before", "after"])
def test_lora_may_go_round_the_model(when: str) -> None:
    """PEFT may wrap the model before or after attach, with a head that it deep-copies; the head that really runs is observed."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"], task_type="CAUSAL_LM")
    model = LLAMA.build(0)
    if when == "after":
        probe.attach(model, every=1)
    wrapped = peft.get_peft_model(model, config)
    if when == "before":
        probe.attach(wrapped, every=1)
    trainer = LLAMA.trainer(wrapped, max_steps=2)
    trainer.train()
    record = probe.load(trainer.args.output_dir).records[-1]
    assert [head.calls for head in record.heads] == [1]
    assert record.metrics["probe/text/loss"] == pytest.approx(trainer.state.log_history[1]["loss"], abs=1e-4)
    assert len(record.attention) == 2
    assert hooks_of(wrapped) == 0


def test_of_two_probes_in_one_model_the_outer_one_observes(capsys: pytest.CaptureFixture[str]) -> None:
    """A model and a module of it may both be attached: every record is made once, and the inner probe says who observes."""
    model = LLAMA.build(0)
    outer, inner = probe.attach(model, every=1), probe.attach(model.model, every=1)
    trainer = LLAMA.trainer(model, max_steps=2)
    trainer.train()
    assert steps(trainer.args.output_dir) == [1, 2]
    assert outer.last is not None
    inner.detach()
    assert "a probe of LlamaForCausalLM, which contains it, observes the same training" in capsys.readouterr().out


def test_a_plain_module_round_the_model_is_seen_through() -> None:
    """The model may sit inside an nn.Module that knows nothing of transformers."""

    class Wrapper(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, **kwargs: Any) -> Any:
            return self.inner(**kwargs)

    model = LLAMA.build(0)
    probe.attach(model, every=1)
    trainer = LLAMA.trainer(Wrapper(model), max_steps=2)
    trainer.train()
    record = probe.load(trainer.args.output_dir).records[-1]
    assert record.metrics["probe/text/loss"] == pytest.approx(trainer.state.log_history[1]["loss"], abs=1e-4)
    assert {row.site for row in record.attention} == {"inner.model.layers.0.self_attn", "inner.model.layers.1.self_attn"}


def test_names_chosen_for_the_attached_model_hold_inside_a_wrapper() -> None:
    """sites= and keep= name modules below the model that was attached, whatever it sits in when training begins."""

    class Wrapper(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, **kwargs: Any) -> Any:
            return self.inner(**kwargs)

    model = LLAMA.build(0)
    p = probe.attach(model, every=1, sites={"custom": ["model.norm", model.model.layers[0].mlp]}, keep={"model.norm"})
    kept: list[Any] = []

    class Read(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            kept.append(p.buffer["inner.model.norm"][0].tensor)

    trainer = LLAMA.trainer(Wrapper(model), max_steps=1)
    trainer.add_callback(Read())
    trainer.train()
    assert [site.name for site in p.sites.of("custom")] == ["inner.model.layers.0.mlp", "inner.model.norm"]
    assert kept[0] is not None


def test_model_init_with_a_callback() -> None:
    """With model_init the model that trains is made late: a callback finds it."""
    trainer = Trainer(
        model_init=lambda: LLAMA.build(0),
        args=LLAMA.arguments(max_steps=2),
        train_dataset=LLAMA.dataset(8, 0),
        data_collator=LLAMA.collate,
        callbacks=[OutputLoggerCallback(log_every_n_steps=1)],
    )
    trainer.train()
    assert steps(trainer.args.output_dir) == [1, 2]


def test_a_trainer_with_its_own_training_step_that_fires_step_end_early() -> None:
    """Records are made at the real end of a step, though a subclass fires on_step_end before each backward."""
    case = CASES["original"]
    result = run(case, attach=lambda model: probe.attach(model, every=1), max_steps=3, gradient_accumulation_steps=2)
    records = probe.load(result.trainer.args.output_dir).records
    assert steps(result.trainer.args.output_dir) == [1, 2, 3]
    assert [record.inputs.micro_batches for record in records] == [2, 2, 2]
    assert all("probe/grad/norm" in record.metrics for record in records)


def test_labels_that_label_smoothing_pops_are_found() -> None:
    """Under label smoothing the labels never reach forward; accuracy is measured all the same, and the loss is the plain one."""
    result = run(LLAMA, attach=lambda model: probe.attach(model, every=1), max_steps=2, label_smoothing_factor=0.1)
    record = probe.load(result.trainer.args.output_dir).records[0]
    assert 0 <= record.metrics["probe/text/token_accuracy"] <= 1
    assert record.metrics["probe/text/loss"] < record.metrics["probe/loss"] + 0.2
    assert record.inputs.labels_masked_share is not None


def test_training_twice_numbers_steps_anew_and_samples_the_first() -> None:
    """A second train() call is observed again, its first step included, also when resumed from a checkpoint."""
    model = LLAMA.build(0)
    probe.attach(model, every=4)
    trainer = LLAMA.trainer(model, max_steps=5, save_strategy="steps", save_steps=2)
    trainer.train()
    trainer.args.max_steps = 9
    checkpoint = Path(trainer.args.output_dir) / "checkpoint-4"
    (checkpoint / "rng_state.pth").unlink()  # the Trainer of 4.46 cannot read its own with torch 2.6 and newer
    trainer.train(resume_from_checkpoint=str(checkpoint))
    assert steps(trainer.args.output_dir) == [1, 4, 5, 8]
    assert [record.step for record in probe.load(trainer.args.output_dir).records] == [1, 4, 5, 8]


def test_detach_restores_everything() -> None:
    """After detach the callback list, training_step, every hook dictionary and the patched class are as before attach."""
    original = CallbackHandler.__dict__["on_train_begin"]
    model = LLAMA.build(0)
    twin = LLAMA.build(0)  # trained without a probe: the Trainer itself leaves attributes on the model
    LLAMA.trainer(twin, max_steps=2).train()
    trainer = LLAMA.trainer(model, max_steps=2)
    callbacks = list(trainer.callback_handler.callbacks)
    p = probe.attach(model, every=1)
    assert CallbackHandler.__dict__["on_train_begin"] is not original
    trainer.train()
    p.detach()
    p.detach()
    assert CallbackHandler.__dict__["on_train_begin"] is original
    assert trainer.callback_handler.callbacks == callbacks
    assert "training_step" not in vars(trainer)
    assert hooks_of(model) == 0
    assert [set(vars(module)) for module in model.modules()] == [set(vars(module)) for module in twin.modules()]
    assert list(REGISTRY.inside(model)) == []


def test_detach_in_the_middle_of_training() -> None:
    """A callback may detach while the Trainer trains: what waited is published, and the rest of the run is not observed."""
    model = LLAMA.build(0)
    p = probe.attach(model, every=1)

    class Stop(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 2:
                p.detach()

    trainer = LLAMA.trainer(model, max_steps=4)
    trainer.add_callback(Stop())
    trainer.train()
    assert steps(trainer.args.output_dir) == [1, 2]
    assert "training_step" not in vars(trainer)


def test_model_and_trainer_copy_and_pickle_while_attached() -> None:
    """In the middle of training the model pickles and deep-copies, the Trainer deep-copies, and the copy is not observed."""
    copies: dict[str, Any] = {}

    class Copy(TrainerCallback):
        trainer: Trainer

        def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
            if state.global_step == 1 and not copies:
                copies["pickled"] = pickle.dumps(model)
                copies["model"] = copy.deepcopy(model)
                copies["trainer"] = copy.deepcopy(self.trainer)
                copies["state"] = list(model.state_dict())
                twin = copies["trainer"]
                twin.callback_handler.on_train_end(twin.args, twin.state, twin.control)  # must not end the original's observation

    model = LLAMA.build(0)
    expected = list(model.state_dict())
    p = probe.attach(model, every=1)
    trainer = LLAMA.trainer(model, max_steps=2)
    callback = Copy()
    callback.trainer = trainer
    trainer.add_callback(callback)
    trainer.train()
    assert steps(trainer.args.output_dir) == [1, 2]
    assert copies["state"] == expected
    assert list(pickle.loads(copies["pickled"]).state_dict()) == expected
    twin = copies["trainer"]
    last = p.last
    twin.training_step(twin.model, dict(LLAMA.collate([LLAMA.dataset(2, 0)[i] for i in range(2)]).items()))
    assert p.last is last
    assert hooks_of(copies["model"]) == 0


def test_the_model_is_not_kept_alive() -> None:
    """When the user lets go of model and Trainer, both go, though nobody called detach."""
    model = LLAMA.build(0)
    probe.attach(model, every=1, sites={"custom": [model.model.norm]})
    trainer = LLAMA.trainer(model, max_steps=1)
    trainer.train()
    ghosts = [weakref.ref(model), weakref.ref(trainer)]
    del model, trainer
    gc.collect()
    assert [ghost() for ghost in ghosts] == [None, None]


def test_a_training_that_fails_leaves_no_hook_and_can_be_run_again() -> None:
    """An exception inside a sampled step passes through unchanged; no hook stays; the next train() is observed."""

    class Failing(Trainer):
        fail = True

        def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
            loss = super().compute_loss(*args, **kwargs)
            if self.fail:
                raise ZeroDivisionError("the user's own")
            return loss

    model = LLAMA.build(0)
    probe.attach(model, every=1)
    trainer = Failing(model=model, args=LLAMA.arguments(max_steps=2), train_dataset=LLAMA.dataset(8, 0), data_collator=LLAMA.collate)
    with pytest.raises(ZeroDivisionError, match="the user's own"):
        trainer.train()
    assert hooks_of(model) == 0
    trainer.fail = False
    trainer.train()
    assert steps(trainer.args.output_dir) == [1, 2]
    assert [record.inputs.micro_batches for record in probe.load(trainer.args.output_dir).records] == [1, 1]


@pytest.mark.parametrize("every", [1, 2])
def test_a_training_that_is_interrupted_still_publishes_the_step_before(every: int) -> None:
    """A Ctrl-C or a crash in a step, sampled or not, does not cost the record that waited."""

    class Interrupted(Trainer):
        def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
            if self.state.global_step == 2:
                raise KeyboardInterrupt
            return super().compute_loss(*args, **kwargs)

    model = LLAMA.build(0)
    p = probe.attach(model, every=every)
    args = LLAMA.arguments(max_steps=4, logging_steps=100)
    trainer = Interrupted(model=model, args=args, train_dataset=LLAMA.dataset(8, 0), data_collator=LLAMA.collate)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert steps(args.output_dir) == [1, 2]
    assert p.last.step == 2


def test_the_buffer_is_read_by_the_users_own_callback() -> None:
    """In on_step_end of a sampled step p.buffer holds the inputs by reference and the kept tensors, detached and as they were."""
    held: list[Any] = []
    model = WHISPER.build(0)
    p = probe.attach(model, every=2, keep={"audio_encoder"})

    class Read(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            captures = p.buffer["model.encoder"]
            held.append((state.global_step, len(captures), set(p.buffer.inputs), captures[0] if captures else None))

    trainer = WHISPER.trainer(model, max_steps=3)
    trainer.add_callback(Read())
    trainer.train()
    assert [(step, calls) for step, calls, _, _ in held] == [(1, 1), (2, 1), (3, 0)]
    _, _, names, capture = held[0]
    assert {"input_features", "labels"} <= names
    assert capture.tensor.shape == capture.shape
    assert not capture.tensor.requires_grad
    moments = capture.statistics()
    assert moments.rms == pytest.approx(capture.tensor.double().square().mean().sqrt().item(), rel=1e-6)
    assert held[2][2] == set()
    assert p.buffer.inputs == {}


def test_a_hand_written_loop() -> None:
    """p.step() observes the steps of a loop without any Trainer; the record is there when the next step begins, or at detach."""
    torch.manual_seed(0)
    model = LLAMA.build(0)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    data = LLAMA.dataset(8, 0)
    with probe.attach(model, every=2) as p:
        losses, norms = [], []
        for i in range(4):
            batch = LLAMA.collate([data[2 * i], data[2 * i + 1]])
            optimizer.zero_grad()
            with p.step():
                loss = model(**batch).loss
                loss.backward()
                norms.append(torch.nn.utils.get_total_norm([q.grad for q in model.parameters()]).item())
                optimizer.step()
            losses.append(loss.item())
            if i == 2:
                assert p.last.step == 2
                assert p.last.metrics["probe/text/loss"] == pytest.approx(losses[1], abs=1e-6)
                assert p.last.metrics["probe/grad/norm"] == pytest.approx(norms[1], rel=1e-5)
                assert "keeps its loss to itself" in p.last.not_measured["probe/loss"]
    assert p.last.step == 4
    assert hooks_of(model) == 0
    with pytest.raises(probe.AttachError, match="attach"), p.step():
        pass
