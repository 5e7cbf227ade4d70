"""The loss audit of two processes with uneven labels: what the Trainer does over ranks is expected, and what it does wrong is found."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
import transformers

ROOT = Path(__file__).parents[2]
WORKER = Path(__file__).parent / "workers" / "loss_ranks.py"
VERSION = next(known for known in ("4.46", "4.57", "5.") if transformers.__version__.startswith(known))

ACCUMULATED = "the losses of the 2 accumulated micro-batches are added up and not divided by 2"
RANKS = "the loss is multiplied by the 2 ranks (average_tokens_across_devices)"

# model-accumulation-smoothing-average -> the ratio and what its one cause holds, by version. "all": labels are averaged over the ranks;
# "each": on each rank by itself.
KNOWN: dict[str, dict[str, tuple[float, tuple[str, ...]]]] = {
    "llama-1-0-all": {},
    "llama-2-0-all": {},
    "llama-2-0-each": {},
    "llama-2-0.1-all": {"4.46": (4.0, (ACCUMULATED, RANKS)), "4.57": (4.0, (ACCUMULATED, RANKS))},
    "whisper-1-0-all": {"5.": (2.0, (RANKS,))},
    "whisper-2-0-all": {"4.46": (2.0, (ACCUMULATED,)), "5.": (4.0, (ACCUMULATED, RANKS))},
    "whisper-2-0-each": {"4.46": (2.0, (ACCUMULATED,)), "5.": (2.0, (ACCUMULATED,))},
}
ALONE = "llama-1-0-alone"  # rank 1 has no probe

pytestmark = [
    pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="this torch has no gloo"),
    pytest.mark.timeout(600),
]


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    """What both ranks wrote of every scenario."""
    folder = tmp_path_factory.mktemp("ranks")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "TRANSFORMERS_VERBOSITY": "error"}
    command = [*torchrun, str(WORKER), str(folder), *KNOWN, ALONE]
    done = subprocess.run(command, cwd=folder, env=environment, timeout=400, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    return {
        name: [json.loads((folder / f"{name}.rank{rank}.json").read_text(encoding="utf-8")) for rank in (0, 1)] for name in (*KNOWN, ALONE)
    }


@pytest.mark.parametrize("name", KNOWN)
def test_ratio_and_cause(reports: dict[str, list[dict[str, Any]]], name: str) -> None:
    """1 within 1e-4 where the ranks' losses are put together rightly, and the known factor with its cause where they are not."""
    ratio, words = KNOWN[name].get(VERSION, (1.0, ()))
    for report in reports[name]:
        assert set(report["steps"]) == {"1", "2"}
        for step in report["steps"].values():
            audit = step["audit"]
            assert step["ranks"] == 2
            assert audit["ratio"] == pytest.approx(ratio, rel=1e-4), audit
            told = " ".join(audit["causes"])
            assert bool(told) == bool(words)
            assert all(word in told for word in words), audit


@pytest.mark.parametrize("name", KNOWN)
def test_backpropagated_is_the_mean_over_ranks(reports: dict[str, list[dict[str, Any]]], name: str) -> None:
    """It is what ``backward()`` was called on: added up over micro-batches, averaged over ranks; and ranks say the same."""
    count = int(name.split("-")[1])
    for index, step in enumerate(("1", "2")):
        sums = [sum(report["backward"][index * count : (index + 1) * count]) for report in reports[name]]
        assert sums[0] != pytest.approx(sums[1], rel=1e-3)  # the ranks are uneven
        audits = [report["steps"][step]["audit"] for report in reports[name]]
        assert audits[0] == audits[1]
        assert audits[0]["backpropagated"] == pytest.approx(sum(sums) / 2, rel=1e-6)


def test_the_reduction_names_the_ranks(reports: dict[str, list[dict[str, Any]]]) -> None:
    """Whether labels are averaged over all ranks or on each is said."""
    assert reports["llama-1-0-all"][0]["steps"]["1"]["audit"]["reduction"].endswith("labels of all ranks")
    assert reports["llama-2-0-each"][0]["steps"]["1"]["audit"]["reduction"].endswith(", mean over 2 ranks")


def test_one_rank_alone_is_not_audited(reports: dict[str, list[dict[str, Any]]]) -> None:
    """A record of one rank cannot tell whether a number of labels that is of all ranks is right."""
    step = reports[ALONE][0]["steps"]["1"]
    assert (
        step["missing"]["probe/loss_audit/ratio"]
        == "not audited: the loss is divided by the labels of all ranks, and this record is of one"
    )
    assert reports[ALONE][1]["steps"] == {}
