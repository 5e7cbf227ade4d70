"""The registry of models that tests and benchmarks use: ``CASES`` by name, and those that the installed transformers has."""

from __future__ import annotations

from models import higgs_audio_v2, llama, original_training, qwen2_audio, voxtral, whisper
from models.case import Case

CASES: dict[str, Case] = {
    module.CASE.name: module.CASE for module in (whisper, qwen2_audio, voxtral, higgs_audio_v2, llama, original_training)
}


def available_cases() -> list[Case]:
    """Return the cases that the installed transformers has; never empty."""
    return [case for case in CASES.values() if case.available()]
