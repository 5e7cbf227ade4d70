"""Counterfactual passes of two processes: both ranks' sums become one, none waits for a pass of the other, a failure ends them on both."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

ROOT = Path(__file__).parents[2]
WORKER = Path(__file__).parent / "workers" / "counterfactual_ranks.py"
SCENARIOS = ("both", "text_on_one", "alone", "memory")

pytestmark = [
    pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="this torch has no gloo"),
    pytest.mark.timeout(600),
]
Reports = dict[str, list[dict[str, Any]]]


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> Reports:
    """What both ranks wrote of every scenario. A hang ends with the time limit, and fails."""
    folder = tmp_path_factory.mktemp("ranks")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "TRANSFORMERS_VERBOSITY": "error"}
    command = [*torchrun, str(WORKER), str(folder), *SCENARIOS]
    done = subprocess.run(command, cwd=folder, env=environment, timeout=400, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    return {name: [json.loads((folder / f"{name}.rank{rank}.json").read_text(encoding="utf-8")) for rank in (0, 1)] for name in SCENARIOS}


def effects(record: dict[str, Any]) -> dict[tuple[str, str], dict[str, Any]]:
    return {(effect["modality"], effect["intervention"]): effect for effect in record["counterfactual"]["effects"]}


def without_cost(record: dict[str, Any]) -> dict[str, float]:
    """The metrics but for the costs, which are of the rank itself."""
    return {name: value for name, value in record["metrics"].items() if name not in ("probe/reference/cost_ms", "probe/overhead/pct")}


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_training_is_untouched(reports: Reports, scenario: str) -> None:
    """Each rank's losses, weights, optimizer and generators are those of two processes without the probe."""
    assert [report["differences"] for report in reports[scenario]] == ["", ""]


@pytest.mark.parametrize("scenario", ["both", "text_on_one", "memory"])
def test_the_passes_issue_no_collective(reports: Reports, scenario: str) -> None:
    """A sampled step has two all-reduces more than without the probe, with passes and without, on both ranks."""
    for report in reports[scenario]:
        without, watched = report["collectives"]
        assert watched - without == 2 * len(report["records"]) == 8


def test_the_sums_of_both_ranks_are_one(reports: Reports) -> None:
    """An effect is over the samples of both: tokens, losses and wins put together from the two tables of samples by hand."""
    for first, second in zip(*(report["records"] for report in reports["both"]), strict=True):
        assert without_cost(first) == without_cost(second)
        assert first["ranks"] == second["ranks"] == 2
        samples = [*first["counterfactual"]["samples"], *second["counterfactual"]["samples"]]
        assert len(samples) == 4
        tokens = sum(sample["tokens"] for sample in samples)
        for what in ("swap", "silence", "reverse"):
            effect = effects(first)["text", what]
            assert effect == effects(second)["text", what]
            assert (effect["samples"], effect["tokens"]) == (4, tokens)
            assert effect["loss"] == pytest.approx(sum(s["loss"] * s["tokens"] for s in samples) / tokens, rel=1e-9)
            changed = sum(s[what] * s["tokens"] for s in samples) / tokens
            assert effect["delta_loss"] == pytest.approx(changed - effect["loss"], abs=1e-9)
            wins = sum(1.0 if s[what] > s["loss"] else 0.5 if s[what] == s["loss"] else 0.0 for s in samples)
            assert effect["win_rate"] == wins / 4
            assert effect["delta_loss_error"] is not None


def test_a_rank_without_audio_has_part_in_nothing(reports: Reports) -> None:
    """Its own reason is in its record, with the effects of the other rank; it shows no samples."""
    for first, second in zip(*(report["records"] for report in reports["text_on_one"]), strict=True):
        if first.get("counterfactual") is None:
            assert second.get("counterfactual") is None
            continue
        assert effects(first) == effects(second)
        assert not second["counterfactual"].get("samples")
        assert second["not_measured"]["counterfactual"].startswith("this rank has no samples to show: ")
        assert "holds no clip" in second["not_measured"]["counterfactual"]
        for modality in ("text", "audio"):
            mine = [sample for sample in first["counterfactual"]["samples"] if sample["modality"] == modality]
            for what in ("swap", "silence", "reverse"):
                reached = [sample for sample in mine if sample.get(what) is not None]
                if (modality, what) in effects(first):
                    assert effects(first)[modality, what]["tokens"] == sum(sample["tokens"] for sample in reached)
    assert any(record.get("counterfactual") for record in reports["text_on_one"][0]["records"])


def test_a_rank_by_itself_makes_its_passes(reports: Reports) -> None:
    """Where the other rank has no probe, the passes run below DDP on this one only, and nobody waits."""
    records = reports["alone"][0]["records"]
    assert len(records) == 4
    assert all(record["counterfactual"]["samples"] for record in records)


def test_a_failure_on_one_rank_ends_the_passes_on_both(reports: Reports) -> None:
    """The record of that step tells both ranks; from then on neither has passes, and both say why."""
    for rank, report in enumerate(reports["memory"]):
        records = report["records"]
        assert [record["step"] for record in records] == [1, 2, 3, 4]
        assert [record.get("counterfactual") is not None for record in records] == [True, False, False, False]
        said = "switched off after OutOfMemoryError" if rank else "switched off after an error on 1 other ranks"
        assert all(record["not_measured"]["counterfactual"].startswith(said) for record in records[1:])
        assert all("probe/text/loss" in record["metrics"] for record in records)
