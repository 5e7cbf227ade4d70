"""Rules over real records: the first steps of every model from random weights, which is where healthy numbers look the oddest."""

from __future__ import annotations

from pathlib import Path

import pytest

import probe
from models import available_cases
from models.case import Case
from models.running import run

# The Trainer of transformers 5 divides the loss of the audio by the number of text labels.
_RIGHTLY = {"higgs_audio_v2": {"loss-off"}}


@pytest.mark.parametrize("case", available_cases(), ids=lambda case: case.name)
def test_first_steps_have_no_finding(case: Case, tmp_path: Path) -> None:
    """Twelve sampled steps of random weights, small batches and random data: rules judge them, and find nothing worse than info."""
    run(case, seed=3, attach=lambda model: probe.attach(model, every=1, tokenizer=case.tokenizer()), max_steps=12, output_dir=str(tmp_path))
    made = probe.load(tmp_path / "_probe")
    assert len(made.records) == 12
    assert all(record.metrics["probe/findings/critical"] == 0 for record in made.records)
    assert {finding.code for finding in made.findings if finding.severity != "info"} <= _RIGHTLY.get(case.name, set())
    assert [reason for what, reason in made.records[-1].not_measured.items() if what.startswith("rule ")] == []
