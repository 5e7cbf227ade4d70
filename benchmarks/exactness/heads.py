"""Accuracy and cross-entropy of the heads against a computation in float64 on the full logits, and the memory that scoring takes."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import redirect_stdout
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from costs import peak_mib
from models import CASES
from models.reference import cross_entropy
from models.running import run
from models.samples import IGNORED
from probe.measure.heads import score
from watching import attacher, records_of

MODELS = ("whisper", "qwen2_audio", "voxtral", "llama")
SIZES = ((51_865, 448, 16), (151_936, 2048, 2), (262_144, 1024, 1))


@dataclass(frozen=True)
class HeadRow:
    """One head in a sampled training step: differences from float64 on the full logits."""

    model: str
    head: str
    dtype: str
    shape: tuple[int, ...]
    labelled: int
    loss_difference: float
    accuracy_difference: float


@dataclass(frozen=True)
class SizeRow:
    """Logits of a realistic size scored on their own: relative difference of the cross-entropy, and extra memory at the peak."""

    vocabulary: int
    rows: int
    dtype: str
    logits_mib: float
    loss_difference: float
    accuracy_difference: float
    peak_mib: float


def head_rows() -> Iterator[HeadRow]:
    """Train each model for a step in float32 and in bf16; the logits are kept by a hook of this benchmark's own."""
    for name in MODELS:
        if CASES[name].available():
            yield from (_head_row(name, bf16=bf16) for bf16 in (False, True))


def _head_row(name: str, *, bf16: bool) -> HeadRow:
    case = CASES[name]
    seen: list[Tensor] = []
    batches: list[Any] = []

    def built(trainer: Any) -> None:
        head = trainer.model.get_submodule(case.heads[0])
        head.register_forward_hook(lambda module, args, output: seen.append(output.detach().clone()))
        collate = trainer.data_collator
        trainer.data_collator = lambda samples: batches.append(collate(samples)) or batches[-1]

    with redirect_stdout(io.StringIO()):
        result = run(case, attach=attacher(every=1), built=built, max_steps=1, bf16=bf16)
        result.attached.detach()
    head = next(head for head in records_of(result)[0].heads if head.site == case.heads[0])
    labels, logits = batches[0]["labels"], seen[0]
    accuracy = _accuracy(logits, labels, case.shift)
    assert head.accuracy is not None
    assert head.accuracy.loss is not None
    assert head.accuracy.token_accuracy is not None
    loss = abs(head.accuracy.loss - cross_entropy(logits, labels, case.shift))
    dtype = str(logits.dtype).removeprefix("torch.")
    return HeadRow(name, head.site, dtype, head.shape, head.accuracy.labelled, loss, abs(head.accuracy.token_accuracy - accuracy))


def _accuracy(logits: Tensor, labels: Tensor, shift: int) -> float:
    if shift:
        logits, labels = logits[:, :-1], labels[:, 1:]
    chosen = labels != IGNORED
    return float((logits.double()[chosen].argmax(-1) == labels[chosen]).double().mean())


def size_rows() -> Iterator[SizeRow]:
    """Score random logits of realistic vocabularies in both dtypes."""
    for vocabulary, tokens, samples in SIZES:
        for dtype in (torch.float32, torch.bfloat16):
            yield _size_row(vocabulary, tokens, samples, dtype)


def _size_row(vocabulary: int, tokens: int, samples: int, dtype: torch.dtype) -> SizeRow:
    generator = torch.Generator().manual_seed(vocabulary)
    logits = torch.randn((samples, tokens, vocabulary), generator=generator, dtype=torch.float32).mul_(3).to(dtype)
    labels = torch.randint(0, vocabulary, (samples, tokens), generator=generator)
    guessed = logits.argmax(-1)
    labels = torch.where(torch.rand(labels.shape, generator=generator) < 0.3, guessed, labels)
    peak = peak_mib(lambda: score(logits, labels))
    columns = score(logits, labels).sums
    expected = sum(float(torch.logsumexp(part.double(), -1).sum() - part.double().gather(-1, one[..., None]).sum()) for part, one in zip(
        logits.flatten(0, 1).split(64), labels.flatten().split(64), strict=True
    ))  # fmt: skip
    right = float((guessed == labels).sum())
    rows = samples * tokens
    mib = logits.numel() * logits.element_size() / 2**20
    name = str(dtype).removeprefix("torch.")
    return SizeRow(vocabulary, rows, name, mib, abs(float(columns[0]) / expected - 1), abs(float(columns[1]) - right) / rows, peak)
