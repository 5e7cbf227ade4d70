"""Headline metrics in the Trainer's own logs."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import Dataset
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainerState, TrainingArguments

from probe.sinks.trainer_log import enter, is_training_log


def state(*history: dict[str, Any], step: int = 5) -> TrainerState:
    made = TrainerState()
    made.global_step = step
    made.log_history = list(history)
    return made


def test_logs_and_history_get_the_metrics() -> None:
    """Both the log that integrations see and its copy in the history get every metric and the step they were measured at."""
    logs = {"loss": 1.0, "learning_rate": 0.1}
    kept = state({"loss": 1.2, "step": 4}, {**logs, "step": 5})
    enter(logs, kept, {"probe/loss": 1.5, "probe/grad/norm": 2}, 3)
    added = {"probe/loss": 1.5, "probe/grad/norm": 2, "probe/step": 3}
    assert logs == {"loss": 1.0, "learning_rate": 0.1, **added}
    assert kept.log_history == [{"loss": 1.2, "step": 4}, {"loss": 1.0, "learning_rate": 0.1, "step": 5, **added}]


@pytest.mark.parametrize("last", [{"loss": 1.0, "step": 4}, {"eval_loss": 1.0, "step": 5}, {"loss": 1.0}, None])
def test_another_entry_is_left_alone(last: dict[str, Any] | None) -> None:
    """An entry of the history that is not this log stays as it is, and an empty history is no error."""
    kept = state(*([last] if last else []))
    before = [dict(entry) for entry in kept.log_history]
    logs = {"loss": 1.0}
    enter(logs, kept, {"probe/loss": 1.5}, 5)
    assert kept.log_history == before
    assert logs["probe/loss"] == 1.5


def test_keys_of_the_user_stay() -> None:
    """A name that somebody else has entered already keeps its value."""
    logs = {"loss": 1.0, "probe/loss": "mine", "probe/step": 99}
    kept = state({"loss": 1.0, "step": 5, "probe/grad/norm": "mine"})
    enter(logs, kept, {"probe/loss": 1.5, "probe/grad/norm": 2.0}, 3)
    assert logs == {"loss": 1.0, "probe/loss": "mine", "probe/step": 99, "probe/grad/norm": 2.0}
    assert kept.log_history[0] == {"loss": 1.0, "step": 5, "probe/grad/norm": "mine", "probe/loss": 1.5, "probe/step": 3}


def test_only_plain_finite_numbers() -> None:
    """Integrations drop everything but Python numbers, and the history is saved as JSON: nothing else goes in."""
    logs: dict[str, Any] = {"loss": 1.0}
    metrics = {
        "a": np.float32(0.5), "b": np.int64(3), "c": math.nan, "d": math.inf, "e": torch.tensor(1.0), "f": "text", "g": 0.25,
        "probe/step": 77,
    }  # fmt: skip
    enter(logs, state(), metrics, np.int64(7))  # type: ignore[arg-type]
    assert logs == {"loss": 1.0, "probe/step": 7, "a": 0.5, "b": 3, "g": 0.25}
    assert {type(value) for value in logs.values()} == {int, float}
    json.dumps(logs, allow_nan=False)


def test_is_training_log() -> None:
    """Training logs only: no evaluation, no summary, nothing of the user's own."""
    assert is_training_log({"loss": 1.0, "grad_norm": 2.0, "epoch": 0.5})
    assert not is_training_log({"eval_loss": 1.0, "eval_runtime": 2.0})
    assert not is_training_log({"eval_loss": 1.0, "loss": 1.0})
    assert not is_training_log({"train_runtime": 1.0, "train_loss": 0.5})
    assert not is_training_log({"train_runtime": 1.0, "loss": 0.5})
    assert not is_training_log({"mine": 1.0})
    assert not is_training_log({})


class Enters(TrainerCallback):
    """Enters two metrics in each training log, as the first of all callbacks."""

    def on_log(self, args: Any, state: TrainerState, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        if logs is not None and is_training_log(logs):
            enter(logs, state, {"probe/loss": 0.5, "probe/grad/norm": 1.0}, state.global_step)


class Sees(TrainerCallback):
    """Stands for an integration: keeps what it is given."""

    def __init__(self) -> None:
        self.logs: list[dict[str, Any]] = []

    def on_log(self, args: Any, state: TrainerState, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        self.logs.append(dict(logs or {}))


class Tokens(Dataset[dict[str, torch.Tensor]]):
    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        ids = torch.arange(index, index + 6) % 32
        return {"input_ids": ids, "labels": ids}


def test_with_a_real_trainer(tmp_path: Any) -> None:
    """A real Trainer's integrations and history hold the metrics in training logs, and in no evaluation nor the summary."""
    model = LlamaForCausalLM(LlamaConfig(vocab_size=32, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2))
    sees = Sees()
    args = TrainingArguments(
        output_dir=str(tmp_path), max_steps=4, per_device_train_batch_size=2, logging_steps=2, eval_strategy="steps", eval_steps=2,
        report_to=[], disable_tqdm=True, save_strategy="no", use_cpu=True,
    )  # fmt: skip
    trainer = Trainer(model=model, args=args, train_dataset=Tokens(), eval_dataset=Tokens(), callbacks=[sees])
    trainer.callback_handler.callbacks.insert(0, Enters())
    trainer.train()
    for entries in (sees.logs, trainer.state.log_history):
        training = [entry for entry in entries if "loss" in entry]
        others = [entry for entry in entries if "loss" not in entry]
        assert [entry["probe/step"] for entry in training] == [2, 4]
        assert all(entry["probe/loss"] == 0.5 for entry in training)
        assert len(others) == 3
        assert not any(name.startswith("probe/") for entry in others for name in entry)
    json.dumps(trainer.state.log_history, allow_nan=False)
