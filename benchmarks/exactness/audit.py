"""The loss audit on unmodified Trainers: models × accumulation × label smoothing × (the head called | the loss computed without it)."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from models import CASES
from models.case import Case
from models.fused import without_head
from models.running import run
from probe.records import LossAudit
from watching import attacher, records_of

MODELS = ("whisper", "qwen2_audio", "voxtral", "llama")
NOT_POSSIBLE = "not possible: the Trainer's label smoothing needs the logits"


@dataclass(frozen=True)
class AuditRow:
    """One training of two steps; what is shown is of the second. ``logged`` is by the Trainer's own log."""

    model: str
    accumulation: int
    smoothing: float
    head: str
    audit: LossAudit | None
    note: str = ""


def audit_rows() -> Iterator[AuditRow]:
    """Train every combination that the installed transformers has, and yield what the audit said."""
    for name in MODELS:
        if not CASES[name].available():
            continue
        for accumulation in (1, 4):
            for smoothing in (0.0, 0.1):
                for fused in (False, True):
                    yield _row(name, accumulation, smoothing, fused=fused)


def _row(name: str, accumulation: int, smoothing: float, *, fused: bool) -> AuditRow:
    head = "never called" if fused else "called"
    if fused and smoothing:
        return AuditRow(name, accumulation, smoothing, head, None, NOT_POSSIBLE)
    attach = attacher(every=1)

    def prepare(model: nn.Module) -> object:
        if fused:
            without_head(model)
        return attach(model)

    with redirect_stdout(io.StringIO()):
        result = run(
            _case(name),
            attach=prepare,
            samples=16,
            max_steps=2,
            gradient_accumulation_steps=accumulation,
            label_smoothing_factor=smoothing,
        )
        result.attached.detach()
    record = records_of(result)[-1]
    return AuditRow(name, accumulation, smoothing, head, record.loss_audit, record.not_measured.get("probe/loss_audit/ratio", ""))


def _case(name: str) -> Case:
    """Return the case; that of Whisper with the decoder's inputs in the batch, without which label smoothing cannot run."""
    case = CASES[name]
    if name != "whisper":
        return case
    start = case.tokenizer().convert_tokens_to_ids("<|startoftranscript|>")

    def collate(samples: Sequence[Any]) -> dict[str, Any]:
        batch = case.collate(samples)
        ids = batch["labels"].roll(1, 1).clamp(min=0)
        ids[:, 0] = start
        return {**batch, "decoder_input_ids": ids}

    return replace(case, collate=collate)
