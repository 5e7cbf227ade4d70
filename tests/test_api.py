"""attach: what it accepts, what it refuses and in which words, and what it says when there was nothing to see."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import nn

import probe
from models import CASES
from probe.attachment import REGISTRY
from probe.callbacks import InputLoggerCallback, OutputLoggerCallback

LLAMA = CASES["llama"]


@pytest.fixture
def model() -> Any:
    built = LLAMA.build(0)
    yield built
    for attached in REGISTRY.inside(built):
        attached.detach()


@pytest.mark.parametrize(
    ("given", "words"),
    [("a string", "got str"), (None, "got NoneType"), (torch.zeros(2), "got Tensor")],
)
def test_what_is_no_module_is_refused(given: Any, words: str) -> None:
    """TypeError says what came."""
    with pytest.raises(TypeError, match=words) as raised:
        probe.attach(given)
    assert isinstance(raised.value, probe.ProbeError)


def test_a_trainer_is_refused_with_the_way_out(model: nn.Module) -> None:
    """A common slip, attach(trainer), is told to pass trainer.model."""
    with pytest.raises(TypeError, match=r"got Trainer; pass its \.model instead"):
        probe.attach(LLAMA.trainer(model))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"every": 0}, ValueError, "every=0: expected a whole number of at least 1"),
        ({"every": -5}, ValueError, "every=-5"),
        ({"every": 2.0}, TypeError, "every=2.0: expected a whole number, got float"),
        ({"every": True}, TypeError, "every=True"),
        ({"budget_mib": -1}, ValueError, "budget_mib=-1: expected a number of MiB above 0"),
        ({"budget_mib": float("nan")}, ValueError, "budget_mib=nan"),
        ({"budget_mib": "64"}, TypeError, "got str"),
        ({"compile": "eager"}, ValueError, "compile='eager': expected one of 'window', 'in_graph', 'off'"),
        ({"keep": "audio_encoder"}, TypeError, "expected a collection"),
        ({"keep": {3}}, TypeError, "expected a collection"),
        ({"sites": "model.encoder"}, ValueError, "{'audio_encoder': 'model.encoder'}"),
        ({"sites": 3}, TypeError, "got int"),
        ({"sites": {"encoder": "model"}}, ValueError, "sites has no role 'encoder'; the roles are audio_encoder"),
        ({"settings": {}}, TypeError, "expected a probe.Settings, got dict"),
        ({"stop_on": "info"}, ValueError, "stop_on='info': expected one of 'critical', 'warning', or None"),
        ({"stop_on": True}, ValueError, "stop_on=True"),
        ({"on_finding": "print"}, TypeError, "on_finding='print': expected a function of a finding, got str"),
    ],
)
def test_impossible_options_name_value_and_bound(model: nn.Module, options: dict[str, Any], error: type[Exception], words: str) -> None:
    """Each refusal is the builtin that a caller would catch, and says what was asked and what is possible; nothing is attached."""
    with pytest.raises(error) as raised:
        probe.attach(model, **options)
    assert words in str(raised.value)
    assert isinstance(raised.value, probe.ProbeError)
    assert list(REGISTRY.inside(model)) == []


@pytest.mark.parametrize(("rows", "error"), [(0, ValueError), ("64", TypeError)])
def test_settings_are_validated(rows: Any, error: type[Exception]) -> None:
    """The rare settings have bounds, too."""
    with pytest.raises(error, match="attention_rows"):
        probe.Settings(attention_rows=rows)


def test_a_pattern_that_matches_nothing_names_the_nearest(model: nn.Module) -> None:
    """SiteError tells the nearest names, and neither hook nor probe is left behind."""
    with pytest.raises(probe.SiteError, match=r"model\.layers\.0\.mlp"):
        probe.attach(model, sites={"custom": "model.layer.0.mlp"})
    assert list(REGISTRY.inside(model)) == []
    assert all(not m._forward_hooks and not m._forward_pre_hooks for m in model.modules())


def test_attaching_again_returns_the_same_probe(model: nn.Module) -> None:
    """Notebook cells are run twice: the same options give the same probe."""
    tokenizer = LLAMA.tokenizer()
    first = probe.attach(model, every=7, tokenizer=tokenizer, sites={"custom": ["model.norm"]})
    assert probe.attach(model, every=7, tokenizer=tokenizer, sites={"custom": ["model.norm"]}) is first


def test_attaching_with_other_options_names_them_and_detach(model: nn.Module) -> None:
    """Other options are an error that names what differs and the way out."""
    probe.attach(model, every=7)
    with pytest.raises(RuntimeError, match=r"every: 7 -> 8.*detach\(\)"):
        probe.attach(model, every=8)


def test_findings_are_among_the_options(model: nn.Module) -> None:
    """The same function is the same option, also as a method; another one, or another severity, is named."""

    class Listener:
        def hear(self, finding: Any) -> None: ...

    listener = Listener()
    first = probe.attach(model, stop_on="critical", on_finding=listener.hear)
    assert probe.attach(model, stop_on="critical", on_finding=listener.hear) is first
    with pytest.raises(RuntimeError, match=r"stop_on: 'critical' -> 'warning'"):
        probe.attach(model, stop_on="warning", on_finding=listener.hear)
    with pytest.raises(RuntimeError, match=r"on_finding: .* -> <built-in function print>"):
        probe.attach(model, stop_on="critical", on_finding=print)


def test_after_detach_other_options_are_welcome(model: nn.Module) -> None:
    """detach makes room for a new attach."""
    probe.attach(model, every=7).detach()
    assert probe.attach(model, every=8).options.every == 8


def test_a_probe_on_a_model_that_never_trains_says_so_at_detach(model: nn.Module, capsys: pytest.CaptureFixture[str]) -> None:
    """There is no silence when there was nothing to see: detach names what was tried, once."""
    p = probe.attach(model)
    p.detach()
    p.detach()
    out = capsys.readouterr().out
    assert out.count("attached to LlamaForCausalLM, but no training forward was seen: no Trainer began training after attach") == 1


def test_a_probe_on_another_model_than_the_one_that_trains_says_so(model: nn.Module, capsys: pytest.CaptureFixture[str]) -> None:
    """The message names the models that did train."""
    p = probe.attach(model)
    LLAMA.trainer(LLAMA.build(1), max_steps=1).train()
    p.detach()
    assert "training began on LlamaForCausalLM, and none of these contains the attached LlamaForCausalLM" in capsys.readouterr().out


def test_a_probe_that_saw_training_says_nothing_at_detach(model: nn.Module, capsys: pytest.CaptureFixture[str]) -> None:
    """The message is no false alarm."""
    p = probe.attach(model, settings=probe.Settings(terminal=False))
    LLAMA.trainer(model, max_steps=1).train()
    p.detach()
    assert "no training forward" not in capsys.readouterr().out


def test_a_model_that_never_trains_is_named_at_exit() -> None:
    """At the end of the process the message appears, though nobody called detach and the model is still alive."""
    code = "import torch, probe\nmodel = torch.nn.Linear(2, 2)\nprobe.attach(model)\n"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert "attached to Linear, but no training forward was seen" in done.stdout
    assert done.stderr == ""


def test_probe_0_turns_everything_off(model: nn.Module, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """PROBE=0: attach and callbacks do nothing, write nothing and say nothing; p.step() still works."""
    monkeypatch.setenv("PROBE", "0")
    p = probe.attach(model, every=1)
    trainer = LLAMA.trainer(model, max_steps=2)
    trainer.add_callback(InputLoggerCallback(log_every_n_steps=1))
    trainer.train()
    with p.step():
        pass
    p.detach()
    assert p.last is None
    assert "PROBE=0" in p.sites.missing["model"]
    assert "step 1" not in capsys.readouterr().out
    assert not any(name.startswith("probe/") for entry in trainer.state.log_history for name in entry)


@pytest.mark.parametrize(("every", "error"), [(0, ValueError), (1.5, TypeError), (True, TypeError)])
def test_callbacks_check_their_cadence(every: Any, error: type[Exception]) -> None:
    """The callbacks refuse an impossible cadence when they are made, not in the middle of training."""
    with pytest.raises(error, match="log_every_n_steps"):
        InputLoggerCallback(log_every_n_steps=every)


def test_callbacks_keep_their_old_positional_arguments() -> None:
    """Existing scripts pass the tokenizer and the cadence by position or name."""
    tokenizer = LLAMA.tokenizer()
    callback = OutputLoggerCallback(tokenizer, 50)
    assert callback.tokenizer is tokenizer
    assert callback.log_every_n_steps == 50


def test_the_probe_describes_itself(model: nn.Module) -> None:
    """repr says what it is attached to and what it has seen."""
    p = probe.attach(model)
    assert "LlamaForCausalLM" in repr(p)
    assert "no record yet" in repr(p)
