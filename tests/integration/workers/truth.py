"""What one rank really saw in each step: computed from full logits and encoder outputs in float64, without any code of the probe."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import TrainerCallback

from models.case import Case


class Truth(TrainerCallback):
    """Sums of every training forward of this rank, step by step, as plain numbers.

    ``steps[s]`` maps names to numbers that add up over micro-batches and ranks, but for ``encoder_high`` (the larger stays).
    ``collectives[s]`` counts the calls of ``torch.distributed.all_reduce`` from the end of step s - 1 to the end of step s.
    """

    def __init__(self, case: Case, model: nn.Module) -> None:
        self._case = case
        self._now: dict[str, float] = {}
        self._calls = 0
        self.steps: dict[int, dict[str, float]] = {}
        self.collectives: dict[int, int] = {}
        model.register_forward_hook(self._root, with_kwargs=True)
        if case.encoder is not None:
            model.get_submodule(case.encoder).register_forward_hook(self._encoder)

    def count_collective(self) -> None:
        """Note one all-reduce."""
        self._calls += 1

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._now = {}

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not kwargs.get("optimizer") or state.global_step in self.steps:
            return
        self.steps[state.global_step] = dict(self._now)
        self.collectives[state.global_step], self._calls = self._calls, 0

    def _add(self, **values: float) -> None:
        for name, value in values.items():
            self._now[name] = self._now.get(name, 0.0) + value

    def _encoder(self, module: nn.Module, args: Any, output: Any) -> None:
        found = output if isinstance(output, Tensor) else output.last_hidden_state if hasattr(output, "last_hidden_state") else output[0]
        if found.numel():
            self._add(encoder_squares=found.detach().double().square().sum().item(), encoder_elements=found.numel())
            self._now["encoder_high"] = max(self._now.get("encoder_high", -float("inf")), found.detach().double().max().item())

    def _root(self, module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        if not torch.is_grad_enabled():
            return
        logits = output.logits.detach().double()
        labels = getattr(output, "expanded_labels", None)
        raw = kwargs["label_ids"] if "label_ids" in kwargs else kwargs["labels"]
        if labels is None:
            labels = raw
        if self._case.shift:
            logits, labels = logits[:, :-1], labels[:, 1:]
        if logits.shape[:2] == labels.shape:
            self._score("text", logits.flatten(0, 1), labels.flatten())
        else:  # Qwen2Audio in transformers 4.46 expands the sequence and keeps the expanded labels to itself
            self._add(not_scored=1)
        features = kwargs.get("audio_features", kwargs.get("input_features"))
        self._add(
            micro_batches=1,
            samples=raw.shape[0],
            label_positions=raw.numel(),
            masked=int((raw == -100).sum()),
            clips=0 if features is None else features.shape[0],
            batches_without_clips=int(features is not None and features.shape[0] == 0),
        )
        if "label_audio_ids" in kwargs:
            for logits_of_book, labels_of_book in zip(output.audio_logits.detach().double().unbind(1), kwargs["label_audio_ids"]):
                self._score("audio", logits_of_book[:-1], labels_of_book[1:])

    def _score(self, modality: str, logits: Tensor, labels: Tensor) -> None:
        known = labels != -100
        loss = F.cross_entropy(logits[known], labels[known], reduction="sum").item() if known.any() else 0.0
        right = int((logits[known].argmax(-1) == labels[known]).sum())
        self._add(**{f"{modality}_loss": loss, f"{modality}_right": right, f"{modality}_labelled": int(known.sum())})
