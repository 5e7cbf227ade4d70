"""Hand-made histories for tests of rules: records that hold little but the number in question, and what a rule says of them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from probe.findings.rule import History, Rule, Symptom
from probe.findings.rules import RULES
from probe.records import AudioChecks, BatchChecks, Conditioning, LabelChecks, Setup, StepRecord

DECODER = Setup(model_class="LlamaForCausalLM", vocabulary=288, max_steps=100)
ENCODER_DECODER = Setup(model_class="WhisperForConditionalGeneration", encoder_decoder=True, vocabulary=288, mel_bins=80, max_steps=100)


def record(step: int = 1, **changes: Any) -> StepRecord:
    """A record that holds nothing but ``changes``."""
    return replace(StepRecord(step, 0.0, 1, {}, {}), **changes)


def repeated(count: int, *, every: int = 1, **changes: Any) -> tuple[StepRecord, ...]:
    """``count`` records alike, at steps 1, 1 + every, …"""
    return tuple(record(1 + index * every, **changes) for index in range(count))


def in_order(*records: StepRecord, every: int = 1) -> tuple[StepRecord, ...]:
    """The records, numbered anew as steps 1, 1 + every, …"""
    return tuple(replace(each, step=1 + index * every) for index, each in enumerate(records))


def rule(code: str) -> Rule:
    """The rule of that code."""
    (found,) = [each for each in RULES if each.code == code]
    return found


def judged(code: str, *records: StepRecord, setup: Setup | None = None) -> list[Symptom] | None:
    """What a rule says of these records: ``None`` where they do not tell."""
    symptoms = rule(code).check(History(setup, records))
    return None if symptoms is None else list(symptoms)


def seen(code: str, *records: StepRecord, setup: Setup | None = None) -> list[tuple[str, str]] | None:
    """Severity and site of each symptom."""
    symptoms = judged(code, *records, setup=setup)
    return None if symptoms is None else [(each.severity or rule(code).severity, each.site) for each in symptoms]


def with_labels(**numbers: Any) -> dict[str, Any]:
    """The field ``checks`` of a record with label checks."""
    return {"checks": BatchChecks(4, labels=LabelChecks(**{"labelled": 40, **numbers}))}


def with_audio(*, rows: int = 4, encoder: str = "encoder", tokens: Any = (), calls: int = 1, **numbers: Any) -> dict[str, Any]:
    """The fields ``checks`` and ``conditioning`` of a record with audio features."""
    audio = AudioChecks(**{"kind": "log-mel", "clips": 4, **numbers})
    return {"checks": BatchChecks(rows, audio=audio), "conditioning": Conditioning(encoder, calls, tokens=tuple(tokens))}
