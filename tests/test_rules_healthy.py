"""Rules over records of healthy steps, made by hand: none finds anything that is not meant."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from judging import DECODER, ENCODER_DECODER, in_order
from probe.findings.rule import WINDOW, History
from probe.findings.rules import RULES
from probe.records import AudioChecks, BatchChecks, LabelChecks, Setup, StepRecord
from records_factory import speech_record, text_record, whisper_record

pytestmark = pytest.mark.pure  # of torch and probe alone: the same with every transformers

CLEAN = BatchChecks(
    4,
    fingerprint=None,
    ids_outside_tokenizer=0,
    labels=LabelChecks(62, on_padding=0, padding_runs=0, on_placeholders=0, outside_vocabulary=0),
    audio=AudioChecks("log-mel", 5, constant=1, silent=1, off_scale=0, band_limited=0, mel_bins=80),
)


def symptoms(make: Callable[..., StepRecord], setup: Setup | None, *, every: int = 1, **changes: Any) -> list[str]:
    records = in_order(*(make(**changes) for _ in range(WINDOW)), every=every)
    found = []
    for count in (1, 2, 3, 8, WINDOW):
        for rule in RULES:
            for symptom in rule.check(History(setup, records[:count])) or ():
                if (symptom.severity or rule.severity) != "info":
                    found.append(f"{rule.code} at {symptom.site!r} of {count}: {symptom.message}")
    return found


@pytest.mark.parametrize("every", [1, 100])
def test_whisper(every: int) -> None:
    """An encoder-decoder with one constant clip in five has no finding worse than info."""
    assert symptoms(whisper_record, ENCODER_DECODER, every=every, checks=CLEAN) == []
    assert symptoms(whisper_record, None, every=every) == []


def test_a_speech_model() -> None:
    """Two heads and two branches, a frozen encoder, and no checks; the three ids outside its vocabulary are the one thing that is wrong."""
    found = symptoms(speech_record, replace(DECODER, codebooks=8, vocabulary=128_256))
    assert {each.partition(" ")[0] for each in found} == {"ids-out-of-range"}
    inputs = replace(speech_record().inputs, ids_outside_vocabulary=0)  # type: ignore[type-var]
    assert symptoms(speech_record, replace(DECODER, codebooks=8, vocabulary=128_256), inputs=inputs) == []


def test_a_record_without_numbers() -> None:
    """Where next to nothing was measured, nothing is found, with and without a setup."""
    assert symptoms(text_record, DECODER) == []
    assert symptoms(text_record, None) == []
