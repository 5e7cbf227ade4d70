"""Findings in real trainings: where they are told, how they end a training, and that nothing else of it changes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from transformers import Trainer, TrainerCallback

import probe
import probe.trainer.session as session
from models import CASES
from models.running import assert_identical, run
from probe.diagnosis import Diagnosis
from probe.findings.rule import History, Rule, Symptom
from probe.records import Finding

LLAMA = CASES["llama"]
ROOT = Path(__file__).parents[2]
WORKER = Path(__file__).parent / "workers" / "stop_ranks.py"
SCENARIOS = ("together", "rank_0_logs", "rank_0_fails", "nothing_found", "not_asked", "other_stop_on")


def planted(*steps: int, severity: Any = "critical") -> Rule:
    def check(history: History) -> list[Symptom]:
        return [Symptom("it is so", "lm_head", {"step": float(history.last.step)})] if history.last.step in steps else []

    return Rule("planted", severity, "", "Do something.", check)


@pytest.fixture
def rules(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Lets a training be judged by given rules only."""
    return lambda *given: monkeypatch.setattr(session, "Diagnosis", partial(Diagnosis, rules=given))


def train(built: Any = None, *, options: dict[str, Any] | None = None, **arguments: Any) -> Any:
    return run(LLAMA, attach=lambda model: probe.attach(model, **{"every": 1, **(options or {})}), built=built, **arguments)


def test_a_learning_rate_of_zero_ends_the_training(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """A real fault, start to end: told, heard, written, logged, and stopped at the step that tells it."""
    heard: list[Finding] = []
    options = {"stop_on": "critical", "on_finding": heard.append}
    result = train(options=options, learning_rate=0.0, max_steps=10, output_dir=str(tmp_path))
    assert result.trainer.state.global_step == 3
    assert [(event.code, event.state, event.step) for event in heard] == [("learning-rate-zero", "opened", 3)]
    assert result.attached.last.step == 3
    assert [finding.code for finding in result.attached.last.findings] == ["learning-rate-zero"]
    critical = [entry["probe/findings/critical"] for entry in result.log_history if "probe/findings/critical" in entry]
    assert critical == [0, 0, 1]
    loaded = probe.load(tmp_path)
    assert loaded.findings == tuple(heard)
    assert loaded.records[-1].findings == tuple(heard)
    assert loaded.facts["settings"]["stop_on"] == "critical"
    out = capsys.readouterr().out
    assert sum(line.split()[:2] == ["opened", "critical,"] for line in out.splitlines()) == 1
    assert "docs/findings.md#learning-rate-zero" in out
    assert out.count("probe: training ends here, as stop_on='critical' asks: critical finding learning-rate-zero, opened at step 3") == 1


def test_a_healthy_training_is_judged_and_untouched(tmp_path: Path) -> None:
    """With stop_on and on_finding nothing is found, and no bit of the training differs."""
    heard: list[Finding] = []
    plain = run(LLAMA, max_steps=6)
    judged = train(options={"stop_on": "warning", "on_finding": heard.append}, max_steps=6, output_dir=str(tmp_path))
    assert_identical(plain, judged)
    assert heard == []
    assert not (tmp_path / "_probe" / "findings.jsonl").exists()
    for record in probe.load(tmp_path).records:
        assert record.metrics["probe/findings/critical"] == record.metrics["probe/findings/warning"] == 0
        assert not any(what.startswith("rule ") for what in record.not_measured)


@pytest.mark.parametrize("logging_steps", [1, 4])
def test_events_are_told_once(rules: Any, capsys: pytest.CaptureFixture[str], tmp_path: Path, logging_steps: int) -> None:
    """Opened and closed, each once, however often the Trainer logs; between, the verification has a line of it."""
    rules(planted(2, 3))
    heard: list[tuple[int, str]] = []
    listen = lambda finding: heard.append((finding.step, finding.state))  # noqa: E731
    train(options={"on_finding": listen}, max_steps=7, logging_steps=logging_steps, output_dir=str(tmp_path))
    assert heard == [(2, "opened"), (5, "closed")]
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert sum(line[:2] == ["opened", "critical,"] for line in lines) == 1
    assert sum(line[:2] == ["closed", "planted"] for line in lines) == 1
    assert sum(line[:6] == ["critical", "finding", "since", "step", "2,", "planted"] for line in lines) == 3
    run_ = probe.load(tmp_path)
    assert [(event.step, event.state) for event in run_.findings] == heard
    assert [len(record.findings) for record in run_.records] == [0, 1, 1, 1, 0, 0, 0]


@pytest.mark.parametrize(("logging_steps", "last"), [(1, 2), (100, 3)])
def test_where_the_training_ends(rules: Any, logging_steps: int, last: int) -> None:
    """At the log that publishes the record, else at the end of the step after it."""
    rules(planted(2))
    result = train(options={"stop_on": "critical"}, max_steps=8, logging_steps=logging_steps)
    assert result.trainer.state.global_step == last


def test_an_evaluation_publishes_and_ends(rules: Any) -> None:
    """A record that an evaluation or a checkpoint publishes ends the training there, too."""
    rules(planted(2))
    result = train(options={"stop_on": "critical"}, max_steps=8, logging_steps=100, eval_strategy="steps", eval_steps=2)
    assert result.trainer.state.global_step == 2


@pytest.mark.parametrize("severity", ["warning", "info"])
def test_what_is_less_severe_ends_nothing(rules: Any, severity: str) -> None:
    """stop_on="critical" lets a warning pass."""
    rules(planted(2, severity=severity))
    assert train(options={"stop_on": "critical"}, max_steps=4).trainer.state.global_step == 4


def test_the_record_is_there_when_the_listener_is_called(rules: Any) -> None:
    """First p.last, then on_finding: whoever hears of a finding can look at its record."""
    rules(planted(2))
    seen: list[tuple[int, int]] = []
    kept: dict[str, Any] = {}

    def attach(model: nn.Module) -> Any:
        kept["p"] = probe.attach(model, every=1, on_finding=lambda finding: seen.append((finding.step, kept["p"].last.step)))
        return kept["p"]

    run(LLAMA, attach=attach, max_steps=2)
    assert seen == [(2, 2)]


def test_a_listener_and_a_rule_that_raise(rules: Any, capsys: pytest.CaptureFixture[str]) -> None:
    """Each is said once and switched off; training and the other rules go on."""

    def broken(history: History) -> list[Symptom]:
        raise ValueError("planted in a rule")

    def listener(finding: Finding) -> None:
        raise ValueError("planted in the listener")

    rules(Rule("broken", "warning", "", "", broken), planted(2, 4, 6))
    result = train(options={"on_finding": listener}, max_steps=4)
    assert result.trainer.state.global_step == 4
    out = capsys.readouterr().out
    assert out.count("probe: rule broken switched off after ValueError: planted in a rule") == 1
    assert out.count("probe: on_finding switched off after ValueError: planted in the listener") == 1
    assert [finding.code for finding in result.attached.last.findings] == ["planted"]
    assert "planted in a rule" in result.attached.last.not_measured["rule broken"]


def test_a_new_training_in_the_same_folder(rules: Any, tmp_path: Path) -> None:
    """Findings of a training that was begun anew stand no more; the new one begins with none."""
    rules(planted(2, 3))
    train(max_steps=3, output_dir=str(tmp_path))
    assert len(probe.load(tmp_path).findings) == 1
    rules(planted(3))
    train(max_steps=3, output_dir=str(tmp_path))
    found = probe.load(tmp_path)
    assert [(event.step, event.state) for event in found.findings] == [(3, "opened")]
    assert [len(record.findings) for record in found.records] == [0, 0, 1]


class Ends(TrainerCallback):
    """Tells whether this very callback was asked to end."""

    def __init__(self) -> None:
        self.wanted: list[bool] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.wanted.append(control.should_training_stop)


def test_other_callbacks_see_the_end(rules: Any) -> None:
    """The Trainer's own flag is set, so that callbacks further down the list see it."""
    rules(planted(2))
    ends = Ends()
    train(lambda trainer: trainer.add_callback(ends), options={"stop_on": "critical"}, max_steps=8, logging_steps=100)
    assert ends.wanted == [False, False, True]


def test_a_loop_of_ones_own(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """p.step(): on_finding works, and stop_on is said not to be in force."""
    monkeypatch.setattr("probe.trainer.loop.Diagnosis", partial(Diagnosis, rules=[planted(1)]))
    heard: list[tuple[int, str]] = []
    torch.manual_seed(0)
    model, data = LLAMA.build(0), LLAMA.dataset(4, 0)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    with probe.attach(model, every=1, stop_on="critical", on_finding=lambda f: heard.append((f.step, f.state))) as p:
        for _ in range(3):
            with p.step():
                model(**LLAMA.collate([data[0], data[1]])).loss.backward()
                optimizer.step()
            optimizer.zero_grad()
        assert [finding.code for finding in p.last.findings] == ["planted"]
    assert heard == [(1, "opened"), (3, "closed")]
    assert capsys.readouterr().out.count("stop_on='critical' is not in force: a hand-written loop ends itself") == 1


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    """What both of two processes wrote of every scenario."""
    if not dist.is_available() or not dist.is_gloo_available():
        pytest.skip("this torch has no gloo")
    folder = tmp_path_factory.mktemp("ranks")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "TRANSFORMERS_VERBOSITY": "error"}
    command = [*torchrun, str(WORKER), str(folder), *SCENARIOS]
    done = subprocess.run(command, cwd=folder, env=environment, timeout=400, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    return {name: [json.loads((folder / f"{name}.rank{rank}.json").read_text(encoding="utf-8")) for rank in (0, 1)] for name in SCENARIOS}


@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", ["together", "rank_0_logs", "rank_0_fails"])
def test_a_finding_of_one_rank_ends_both(reports: dict[str, list[dict[str, Any]]], name: str) -> None:
    """At the same step, whatever else a rank logs or cannot do: the end of the step after the sampled one."""
    assert [report["steps"] for report in reports[name]] == [3, 3]
    assert [report["heard"] for report in reports[name]] == [[], []]  # rank 0 found nothing, and rank 1 tells nobody
    first, second = (report["said"] for report in reports[name])
    assert "a finding of another rank" in first[-1]
    assert second[-1].startswith("probe: [rank 1] training ends here")
    assert "critical finding planted, opened at step 2: planted" in second[-1]


@pytest.mark.timeout(600)
def test_what_it_costs(reports: dict[str, list[dict[str, Any]]]) -> None:
    """One all-reduce after each sampled step, and none without stop_on; the training runs to its end."""
    for rank in (0, 1):
        asked, plain = reports["nothing_found"][rank], reports["not_asked"][rank]
        assert asked["steps"] == plain["steps"] == 6
        assert asked["said"] == plain["said"] == []
        assert asked["all_reduces"] - plain["all_reduces"] == 3  # after steps 1, 2 and 4; 6 is the last


@pytest.mark.timeout(600)
def test_ranks_that_cannot_agree(reports: dict[str, list[dict[str, Any]]]) -> None:
    """Another stop_on on another rank: nobody stops, nobody waits, and it is said."""
    for rank, (report, mine) in enumerate(zip(reports["other_stop_on"], ("warning", "critical"))):
        assert report["steps"] == 6
        prefix = "[rank 1] " if rank else ""
        assert report["said"][0].startswith(f"probe: {prefix}stop_on='{mine}' is not in force: ranks [1] have another stop_on than rank 0")


def test_trainers_without_a_probe_are_left_alone() -> None:
    """Nothing of this is there without an attach."""
    result = run(LLAMA, max_steps=2)
    assert isinstance(result.trainer, Trainer)
    assert not any("probe/findings/critical" in entry for entry in result.log_history)
