"""Taps in every attention module of a model for the length of its calls, entered and left as the hooks do it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from probe.capture.tap import AttentionTap
from probe.measure.blocks import RowSource

ATTENTION = (".self_attn", ".encoder_attn", ".attn")


class Taps:
    """Reports to ``see(name of the layer, source)``; ``layers`` are the modules by name, ``errors`` what the taps complained of."""

    def __init__(self, model: nn.Module, see: Callable[[str, RowSource], None]) -> None:
        self.errors: list[Exception] = []
        self.open: list[AttentionTap] = []
        self.handles: list[Any] = []
        self.layers = {name: module for name, module in model.named_modules() if name.endswith(ATTENTION)}
        for name, module in self.layers.items():
            self.handles.append(module.register_forward_pre_hook(self._enter(name, see)))
            self.handles.append(module.register_forward_hook(self._leave, always_call=True))

    def _enter(self, name: str, see: Callable[[str, RowSource], None]) -> Callable[..., None]:
        def enter(module: nn.Module, args: Any) -> None:
            sinks = isinstance(getattr(module, "sinks", None), Tensor)
            tap = AttentionTap(lambda source: see(name, source), self.errors.append, sinks=sinks)
            self.open.append(tap)
            tap.__enter__()

        return enter

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        self.open.pop().__exit__(None, None, None)

    def __enter__(self) -> Taps:
        return self

    def __exit__(self, *ignored: object) -> None:
        for handle in self.handles:
            handle.remove()
