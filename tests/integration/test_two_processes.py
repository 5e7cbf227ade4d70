"""Two processes under torchrun, gloo on the CPU: metrics of both ranks become one, and no rank ever waits for another that is not there."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from models import CASES
from probe.runs.load import load

ROOT = Path(__file__).parents[2]
WORKER = Path(__file__).parent / "workers" / "two_ranks.py"
ALONE = "each rank has its own numbers only"
MERGED = ["whisper", "accumulation", "original", "no_clips", "no_audio"]
APART = ["rank_0_only", "rank_1_only", "other_sites", "other_cadence", "failing_begin"]

pytestmark = [
    pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="this torch has no gloo"),
    pytest.mark.timeout(600),
]


@dataclass(frozen=True)
class Launch:
    """What two processes left behind."""

    folder: Path
    code: int
    stdout: tuple[str, str]
    stderr: tuple[str, str]

    def report(self, scenario: str, rank: int) -> dict[str, Any]:
        """Return what one rank wrote of one scenario."""
        return json.loads((self.folder / f"{scenario}.rank{rank}.json").read_text(encoding="utf-8"))

    def both(self, scenario: str) -> tuple[dict[str, Any], dict[str, Any]]:
        """Return what both ranks wrote of one scenario."""
        return self.report(scenario, 0), self.report(scenario, 1)


def _launch(folder: Path, *scenarios: str) -> Launch:
    """Run scenarios in two processes. A hang ends with the time limit, and fails."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone"]
    logs = ["--log-dir", str(folder / "log"), "--redirects", "3"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "TRANSFORMERS_VERBOSITY": "error"}
    done = subprocess.run(
        [*torchrun, *logs, str(WORKER), str(folder), *scenarios], cwd=folder, env=environment, timeout=400, capture_output=True, text=True
    )
    written = [
        tuple(next((folder / "log").rglob(f"{rank}/{name}.log")).read_text(encoding="utf-8") for rank in (0, 1))
        for name in ("stdout", "stderr")
    ]
    return Launch(folder, done.returncode, *written)


@pytest.fixture(scope="module")
def merged(tmp_path_factory: pytest.TempPathFactory) -> Launch:
    """Runs in which both ranks observe."""
    return _launch(tmp_path_factory.mktemp("merged"), *(name for name in MERGED if _has(name)))


@pytest.fixture(scope="module")
def apart(tmp_path_factory: pytest.TempPathFactory) -> Launch:
    """Runs in which the ranks disagree, and after them one in which they do not."""
    return _launch(tmp_path_factory.mktemp("apart"), *APART, "both_again", "failing_observer")


def _has(scenario: str) -> bool:
    return scenario != "no_audio" or CASES["qwen2_audio"].available()


def _needs(scenario: str) -> None:
    if not _has(scenario):
        pytest.skip("the installed transformers has no Qwen2Audio")


def _total(launch: Launch, scenario: str, step: int, name: str) -> float:
    """Add up what the ranks really saw."""
    return sum(report["truth"][str(step)].get(name, 0.0) for report in launch.both(scenario))


def _ratio(launch: Launch, scenario: str, step: int, above: str, below: str) -> float:
    return _total(launch, scenario, step, above) / _total(launch, scenario, step, below)


def test_the_processes_end_well(merged: Launch) -> None:
    """Both processes run to their end: no crash, no hang, nothing said on standard error that is not DDP's own."""
    assert merged.code == 0, merged.stderr
    assert "Traceback" not in "".join(merged.stderr)


@pytest.mark.parametrize("scenario", MERGED)
def test_training_is_untouched(merged: Launch, scenario: str) -> None:
    """Losses, weights, optimizer and random states of each rank are those of a run of two processes without the probe."""
    _needs(scenario)
    for report in merged.both(scenario):
        assert report["differences"] == ""


def _of_both(record: dict[str, Any]) -> dict[str, float]:
    """Return the metrics but for the time that the probe took, which is each rank's own."""
    own = "probe/overhead/pct"
    assert record["metrics"][own] > 0
    return {name: value for name, value in record["metrics"].items() if name != own}


@pytest.mark.parametrize("scenario", MERGED)
def test_both_ranks_have_the_same_metrics(merged: Launch, scenario: str) -> None:
    """Every metric of every record is the same on both ranks, but what each of them took itself, and the record says that it is of two."""
    _needs(scenario)
    first, second = (report["records"] for report in merged.both(scenario))
    assert [record["step"] for record in first] == [record["step"] for record in second]
    assert len(first) >= 2
    for mine, theirs in zip(first, second):
        assert _of_both(mine) == _of_both(theirs)
        assert mine["ranks"] == theirs["ranks"] == 2
        assert "ranks" not in mine["not_measured"]


@pytest.mark.parametrize("scenario", MERGED)
def test_metrics_are_of_what_both_ranks_saw(merged: Launch, scenario: str) -> None:
    """Losses and accuracies are weighted by the labelled tokens of both ranks; counts add up; extremes are the larger of both."""
    _needs(scenario)
    for record in merged.report(scenario, 0)["records"]:
        step, metrics = record["step"], record["metrics"]

        def per(above: str, below: str, step: int = step) -> float:
            return _ratio(merged, scenario, step, above, below)

        if not _total(merged, scenario, step, "not_scored"):
            assert metrics["probe/text/loss"] == pytest.approx(per("text_loss", "text_labelled"), rel=1e-6)
            assert metrics["probe/text/token_accuracy"] == pytest.approx(per("text_right", "text_labelled"))
        else:
            assert scenario == "no_audio"
        if scenario in ("original", "no_clips"):
            assert metrics["probe/audio/loss"] == pytest.approx(per("audio_loss", "audio_labelled"), rel=1e-6)
            assert metrics["probe/audio/token_accuracy"] == pytest.approx(per("audio_right", "audio_labelled"))
        rms = math.sqrt(per("encoder_squares", "encoder_elements"))
        assert metrics["probe/audio_encoder/rms"] == pytest.approx(rms, rel=1e-6)
        encoder = next(row for row in record["statistics"] if row["role"] == "audio_encoder")
        highs = [report["truth"][str(step)].get("encoder_high", -math.inf) for report in merged.both(scenario)]
        assert encoder["maximum"] == pytest.approx(max(highs))
        assert metrics["probe/input/labels_masked_share"] == pytest.approx(per("masked", "label_positions"))
        assert metrics["probe/input/samples"] == _total(merged, scenario, step, "samples")
        assert metrics["probe/input/audio_clips"] == _total(merged, scenario, step, "clips")
        assert record["inputs"]["micro_batches"] == _total(merged, scenario, step, "micro_batches")


def test_the_ranks_saw_different_things(merged: Launch) -> None:
    """The comparison above would notice a record of one rank only: the ranks' own losses differ."""
    first, second = (report["truth"]["1"] for report in merged.both("whisper"))
    assert first["text_loss"] / first["text_labelled"] != pytest.approx(second["text_loss"] / second["text_labelled"], rel=1e-4)
    assert first["encoder_high"] != pytest.approx(second["encoder_high"], rel=1e-6)


@pytest.mark.parametrize("scenario", ["whisper", "accumulation", "original"])
def test_the_loss_is_the_mean_over_ranks(merged: Launch, scenario: str) -> None:
    """``probe/loss`` and ``probe/grad/norm`` are the Trainer's own logged numbers, which are of all ranks."""
    report = merged.report(scenario, 0)
    logs = {entry["step"]: entry for entry in report["log"] if "loss" in entry}
    for record in report["records"]:
        assert record["metrics"]["probe/loss"] == pytest.approx(logs[record["step"]]["loss"], rel=1e-4)
        assert record["metrics"]["probe/grad/norm"] == pytest.approx(logs[record["step"]]["grad_norm"], rel=1e-5)


def test_accumulated_micro_batches_count(merged: Launch) -> None:
    """With accumulation 2 under DDP's no_sync a step of two ranks has four micro-batches."""
    assert [record["inputs"]["micro_batches"] for record in merged.report("accumulation", 0)["records"]] == [4, 4, 4]


def test_a_rank_without_clips_counts_as_such(merged: Launch) -> None:
    """Rank 1's batches of no clip hold nobody up: they are counted and named, and the audio metrics are those of rank 0."""
    alone = merged.report("no_clips", 0)["truth"]
    assert all(step.get("clips", 0) == 0 for step in merged.report("no_clips", 1)["truth"].values())
    for record in merged.report("no_clips", 1)["records"]:
        step = alone[str(record["step"])]
        assert record["metrics"]["probe/input/audio_clips"] == step["clips"] > 0
        assert record["metrics"]["probe/audio/loss"] == pytest.approx(step["audio_loss"] / step["audio_labelled"], rel=1e-6)
        assert record["not_measured"]["inputs/audio"] == "1 micro-batches brought audio features with 0 clips (shape[0] == 0)"


def test_a_rank_without_audio_keys_counts_as_such(merged: Launch) -> None:
    """Rank 1's batches have no key of audio at all; its encoder is not called, and the merged record counts rank 0's calls."""
    _needs("no_audio")
    for record in merged.report("no_audio", 1)["records"]:
        assert record["metrics"]["probe/audio_encoder/calls"] == 1
        assert record["metrics"]["probe/input/audio_clips"] == merged.report("no_audio", 0)["truth"][str(record["step"])]["clips"] > 0
        assert record["conditioning"]["micro_batches_without_encoder"] == 1


@pytest.mark.parametrize("scenario", MERGED)
def test_two_all_reduces_a_sampled_step(merged: Launch, scenario: str) -> None:
    """A sampled step has exactly two all-reduces more than without the probe, another step not one."""
    _needs(scenario)
    for report in merged.both(scenario):
        sampled = {str(record["step"]) for record in report["records"]}
        extra = {step: calls - report["collectives_without"][step] for step, calls in report["collectives"].items() if step != "0"}
        assert extra == {step: 2 * (step in sampled) for step in extra}
    if scenario == "whisper":
        assert sampled == {"1", "2", "4"}
        assert set(extra) == {"1", "2", "3", "4"}


def test_only_rank_0_prints_and_writes(merged: Launch) -> None:
    """Sections are shown by rank 0, rank 1's output is empty, and the run folder holds rank 0's files only."""
    for section in ("Input", "Output", "Shared attention", "Zero-shot verification"):
        assert f"{section} · step 1 " in merged.stdout[0]
    assert merged.stdout[1] == ""
    run = merged.folder / "whisper" / "watched" / "_probe"
    assert {path.name for path in run.iterdir()} - {"findings.jsonl"} == {"records-rank00000.jsonl", "run.json"}
    assert [(record.step, record.ranks) for record in load(run).records] == [(1, 2), (2, 2), (4, 2)]


def test_ranks_apart_end_well(apart: Launch) -> None:
    """Whatever the ranks disagree about, both processes run to their end, soon."""
    assert apart.code == 0, apart.stderr
    assert "Traceback" not in "".join(apart.stderr)


@pytest.mark.parametrize("scenario", [name for name in APART if name != "other_sites"])
def test_training_of_ranks_apart_is_untouched(apart: Launch, scenario: str) -> None:
    """A rank without a probe, or whose probe failed, trains on, and so does the other: bit for bit as without."""
    for report in apart.both(scenario):
        assert report["differences"] == ""
        assert report["collectives"] == report["collectives_without"]


@pytest.mark.parametrize(
    ("scenario", "observing", "reason"),
    [
        ("rank_0_only", (0,), "rank 1 did not begin training with a probe within 0.7 s"),
        ("rank_1_only", (1,), "rank 0 did not begin training with a probe within 1.4 s"),
        ("other_sites", (0, 1), "ranks [1] watch other sites than rank 0"),
        ("other_cadence", (0, 1), "ranks [1] sample other steps than rank 0 (every [2])"),
        ("failing_begin", (0,), "the probe of rank 1 failed: RuntimeError: planted in begin"),
    ],
)
def test_ranks_apart_keep_their_own_numbers(apart: Launch, scenario: str, observing: tuple[int, ...], reason: str) -> None:
    """Ranks that do not agree have records of their own, with the reason; a rank that does not observe has none."""
    for rank, report in enumerate(apart.both(scenario)):
        sampled = ([1, 3] if rank else [1, 2, 4]) if scenario == "other_cadence" else [1, 2]
        assert [record["step"] for record in report["records"]] == (sampled if rank in observing else [])
        for record in report["records"]:
            truth = report["truth"][str(record["step"])]
            assert record["ranks"] == 1
            assert record["not_measured"]["ranks"] == f"{reason}: {ALONE}"
            assert record["metrics"]["probe/text/loss"] == pytest.approx(truth["text_loss"] / truth["text_labelled"], rel=1e-6)
            assert record["metrics"]["probe/input/audio_clips"] == truth["clips"] == 2


def test_an_earlier_disagreement_is_over(apart: Launch) -> None:
    """In the same processes, after trainings with a probe on one rank only, ranks that agree are merged again."""
    for report in apart.both("both_again"):
        assert [record["ranks"] for record in report["records"]] == [2, 2]
        assert all("ranks" not in record["not_measured"] for record in report["records"])


def test_a_part_that_fails_on_one_rank_is_off_on_both(apart: Launch) -> None:
    """The record of that step says so on both ranks; training is untouched and the ranks go on with two all-reduces."""
    first, second = apart.both("failing_observer")
    assert (first["differences"], second["differences"]) == ("", "")
    for report, reason in (
        (first, "switched off after an error on 1 other ranks"),
        (second, "switched off after RuntimeError: planted in heads"),
    ):
        assert [record["step"] for record in report["records"]] == [1, 2, 3, 4]
        assert "heads" not in report["records"][0]["not_measured"]
        assert all(record["not_measured"]["heads"].startswith(reason) for record in report["records"][1:])
        assert ["probe/text/loss" in record["metrics"] for record in report["records"]] == [True, True, False, False]
        assert set(report["collectives"].values()) == {2}
        assert all(record["ranks"] == 2 for record in report["records"])
    assert [_of_both(record) for record in first["records"]] == [_of_both(record) for record in second["records"]]


def test_an_error_of_the_user_passes(tmp_path: Path) -> None:
    """When the training itself fails on one rank, the processes end with that error, and what was published before stays."""
    launch = _launch(tmp_path, "failing_step")
    assert launch.code != 0
    assert "RuntimeError: planted in training_step" in launch.stderr[1]
    assert [record.step for record in load(tmp_path / "failing_step" / "_probe").records] == [1]
