"""Healthy runs: variations of what people do on purpose, none of which may have a critical finding."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

from benchmarks.faults.areas.audio import MOONSHINE
from benchmarks.faults.areas.setup import HIGGS, LLAMA, ORIGINAL, QWEN, VOXTRAL, WHISPER, with_lora, with_lora_everywhere
from benchmarks.faults.training import Fields, Training, of
from models.tokens import encode

Vary = Callable[[Training], None]


@dataclass(frozen=True)
class Healthy:
    """A healthy run.

    Attributes:
        kind: In words joined by hyphens; the split is by this name.
        area: What is varied.
        model: The case.
        note: What it is.
        vary: Changes the plain training.
    """

    kind: str
    area: str
    model: str
    note: str
    vary: Vary

    @property
    def name(self) -> str:
        """Return ``model/kind``."""
        return f"{self.model}/{self.kind}"


def _plain(training: Training) -> None:
    training.steps = 40


def _with(steps: int = 40, **arguments: Any) -> Vary:
    def vary(training: Training) -> None:
        training.steps = steps
        training.arguments.update(arguments)

    return vary


def _seeded(seed: int) -> Vary:
    def vary(training: Training) -> None:
        training.steps, training.seed = 40, seed

    return vary


def _fresh(seed: int, steps: int = 40) -> Vary:
    def vary(training: Training) -> None:
        training.fresh, training.seed, training.steps = True, seed, steps

    return vary


def _lora(training: Training) -> None:
    training.steps = 40
    training.models.append(
        lambda model: (with_lora_everywhere if training.case.name in (LLAMA, HIGGS) else with_lora)(model, lora_dropout=0.1)
    )


def _frozen_encoder(training: Training) -> None:
    training.steps = 40
    training.models.append(lambda model: of(model, training.case.encoder).requires_grad_(False) and None)


def _projector_only(training: Training) -> None:
    training.steps = 40

    def freeze(model: nn.Module) -> None:
        model.requires_grad_(False)
        of(model, training.case.projector).requires_grad_(True)

    training.models.append(freeze)


def _one_batch(training: Training) -> None:
    training.steps = 40
    training.samples = 4


def _smoothing(training: Training) -> None:
    training.steps = 40
    training.arguments["label_smoothing_factor"] = 0.1
    if training.case.name == WHISPER:
        start = training.case.tokenizer().convert_tokens_to_ids("<|startoftranscript|>")

        def with_decoder_inputs(fields: Fields) -> Fields:
            ids = fields["labels"].roll(1, 1).clamp(min=0)
            ids[:, 0] = start
            return {**fields, "decoder_input_ids": ids}

        training.batches.append(with_decoder_inputs)


def _long_padding(training: Training) -> None:
    """Every fourth row is three times as long as the others."""
    training.steps = 40
    longer = encode(training.case.tokenizer(), " and so on" * 3)

    def lengthen(sample: Fields, index: int) -> Fields:
        if index % 4:
            return sample
        end = len(sample["labels"]) - 1
        return {**sample, **{name: [*sample[name][:end], *longer, sample[name][end]] for name in ("input_ids", "labels") if name in sample}}

    training.rows.append(lengthen)


def _tied(training: Training) -> None:
    training.steps, training.fresh = 40, True

    def tie(model: nn.Module) -> None:
        model.config.tie_word_embeddings = True
        model.tie_weights()

    training.models.append(tie)


def _healthy(area: str, kind: str, note: str, vary: Vary, *models: str) -> tuple[Healthy, ...]:
    return tuple(Healthy(kind, area, model, note, vary) for model in models)


_ALL = (WHISPER, QWEN, VOXTRAL, HIGGS, LLAMA, ORIGINAL, MOONSHINE)

HEALTHY: tuple[Healthy, ...] = (
    *_healthy("plain", "plain", "a short fine-tuning, 40 steps at 1e-3", _plain, *_ALL),
    *_healthy("plain", "seed-1", "another seed", _seeded(1), *_ALL[:6]),
    *_healthy("plain", "seed-2", "another seed", _seeded(2), WHISPER, QWEN, HIGGS, LLAMA),
    *_healthy("plain", "from-random-weights", "the first 40 steps from random weights", _fresh(0), *_ALL),
    *_healthy("plain", "from-random-weights-seed-1", "another seed", _fresh(1), WHISPER, QWEN, HIGGS),
    *_healthy("plain", "long", "120 steps", _with(120), WHISPER, LLAMA, HIGGS),
    *_healthy("plain", "long-from-random-weights", "120 steps from random weights", _fresh(2, 120), QWEN, ORIGINAL),
    *_healthy(
        "ways", "accumulation-4", "4 micro-batches a step", _with(24, gradient_accumulation_steps=4), VOXTRAL, HIGGS, LLAMA, ORIGINAL
    ),
    *_healthy("ways", "lora", "LoRA with dropout, all else frozen", _lora, QWEN, VOXTRAL, LLAMA, HIGGS),
    *_healthy("ways", "encoder-frozen-on-purpose", "the encoder is frozen", _frozen_encoder, WHISPER, VOXTRAL, ORIGINAL),
    *_healthy("ways", "projector-only", "first stage of alignment: only the projector trains", _projector_only, QWEN, VOXTRAL),
    *_healthy(
        "ways",
        "checkpointing",
        "gradient checkpointing",
        _with(24, gradient_checkpointing=True, gradient_checkpointing_kwargs={"use_reentrant": False}),
        QWEN,
        WHISPER,
    ),
    *_healthy(
        "ways",
        "checkpointing-reentrant",
        "reentrant gradient checkpointing",
        _with(24, gradient_checkpointing=True, gradient_checkpointing_kwargs={"use_reentrant": True}),
        LLAMA,
        ORIGINAL,
    ),
    *_healthy("ways", "bf16", "bf16 autocast", _with(40, bf16=True), WHISPER, HIGGS, LLAMA),
    *_healthy(
        "ways", "evaluation-between", "evaluation every 5 steps", _with(20, eval_strategy="steps", eval_steps=5), WHISPER, QWEN, ORIGINAL
    ),
    *_healthy("ways", "not-clipped", "max_grad_norm=0", _with(max_grad_norm=0.0), LLAMA, QWEN),
    *_healthy("ways", "adafactor", "another optimizer", _with(optim="adafactor"), LLAMA, WHISPER),
    *_healthy("ways", "tied-head", "head and embedding share their weight", _tied, LLAMA),
    *_healthy("rates", "rate-1e-5", "learning rate 1e-5", _with(learning_rate=1e-5), WHISPER, LLAMA, ORIGINAL, QWEN),
    *_healthy("rates", "rate-1e-4", "learning rate 1e-4", _with(learning_rate=1e-4), HIGGS, VOXTRAL),
    *_healthy("rates", "rate-3e-3", "learning rate 3e-3", _with(learning_rate=3e-3), LLAMA, QWEN, WHISPER, HIGGS),
    *_healthy("rates", "warm-up-half", "half of the steps are warm-up", _with(warmup_steps=20), WHISPER, LLAMA),
    *_healthy("rates", "cosine", "cosine schedule down to 0", _with(lr_scheduler_type="cosine", warmup_steps=4), QWEN, LLAMA),
    *_healthy("data", "label-smoothing", "label smoothing 0.1", _smoothing, LLAMA, WHISPER),
    *_healthy("data", "one-batch-overfitted", "one batch, 40 times, on purpose", _one_batch, QWEN, LLAMA, WHISPER),
    *_healthy("data", "one-sample-a-batch", "batches of one", _with(per_device_train_batch_size=1), WHISPER, QWEN, HIGGS, LLAMA),
    *_healthy("data", "long-padding", "few long rows, much padding", _long_padding, LLAMA, WHISPER),
)
