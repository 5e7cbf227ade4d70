"""The window: hooks stand and kernels are watched inside it, and only there."""

from __future__ import annotations

import types
from typing import Any

import pytest
from torch import nn

import probe.capture.window as window_module
from probe.capture.breaker import Breaker
from probe.capture.buffer import StepBuffer
from probe.capture.hooks import HookSet
from probe.capture.window import Window
from probe.foreign.attention_kernels import WatchedKernel
from probe.records import Site

ALL_ATTENTION_FUNCTIONS: dict[str, Any] = {"theirs": print}  # where the layer below is written, as a modeling module has it


class Layer(nn.Module):
    """An attention layer that looks up the kernel "theirs"."""

    def __init__(self, implementation: str = "theirs") -> None:
        super().__init__()
        self.config = types.SimpleNamespace(_attn_implementation=implementation)

    def forward(self, x: Any) -> Any:
        return x


class Armed:
    """A model of one layer, and its window."""

    def __init__(self, *, mode: Any = "window", compiled: bool = False, implementation: str = "theirs") -> None:
        self.model = nn.Sequential(Layer(implementation))
        if compiled:
            self.model[0].compile(backend="eager")
        self.said: list[str] = []
        self.breaker = Breaker(self.said.append)
        hooks = HookSet({"": self.model}, {"": Site("", "model", "")}, [], self.breaker)
        self.window = Window(hooks, self.breaker, around=self.model, compile_mode=mode, layers=[self.model[0]])
        self.buffer = StepBuffer(budget_bytes=1 << 20)

    def look(self) -> tuple[bool, bool]:
        """Say whether hooks stand, and whether the kernel is watched."""
        return bool(self.model._forward_hooks), isinstance(ALL_ATTENTION_FUNCTIONS["theirs"], WatchedKernel)

    def inside(self) -> tuple[bool, bool]:
        """Say so from inside the window."""
        with self.window.armed(self.buffer, batch={}):
            return self.look()


def test_hooks_stand_and_kernels_are_watched_inside_only() -> None:
    """Both begin with the window and end with it, also when the step raises."""
    armed = Armed()
    assert armed.look() == (False, False)
    assert armed.inside() == (True, True)
    assert armed.look() == (False, False)
    with pytest.raises(ZeroDivisionError), armed.window.armed(armed.buffer, batch={}):
        raise ZeroDivisionError
    assert armed.look() == (False, False)
    assert armed.said == []


def test_kernels_are_left_alone_when_attention_is_off() -> None:
    """Once the part that looks at attention is switched off, no kernel is replaced; hooks of other parts stand."""
    armed = Armed()
    armed.breaker.trip("attention", ValueError("broken"))
    assert armed.inside() == (True, False)


def test_an_error_while_kernels_are_looked_up_switches_attention_off(monkeypatch: pytest.MonkeyPatch) -> None:
    """What goes wrong there is said once, costs attention and nothing else."""

    def broken(*_: Any) -> Any:
        raise LookupError("no such place")

    monkeypatch.setattr(window_module, "watched_kernels", broken)
    armed = Armed()
    assert armed.inside() == (True, False)
    assert armed.inside() == (True, False)
    assert list(armed.breaker.failures) == ["attention"]
    assert len(armed.said) == 1


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"mode": "off"}, "compile='off'"),
        ({"implementation": "flex_attention"}, "flex attention"),
        ({"implementation": "their_flex_attention"}, "flex attention"),
    ],
)
def test_a_closed_window_touches_nothing(options: dict[str, Any], why: str) -> None:
    """A compiled model that must not run eagerly gets neither hooks nor watched kernels, and the reason is named."""
    armed = Armed(compiled=True, **options)
    assert armed.inside() == (False, False)
    assert why in armed.buffer.totals.reasons["model"]
    assert Armed(compiled=False, **options).window.closed == ""
