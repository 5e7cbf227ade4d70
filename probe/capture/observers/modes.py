"""Watches the state of the modules: which train and which do not, dropout, adapters; in training forwards and in evaluations."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from probe.capture.buffer import StepBuffer
from probe.capture.observer import Call, Watcher
from probe.records import Modes
from probe.sites.adapters import adapter_layers, is_switched_off
from probe.sites.dropout import dropout_layers
from probe.sites.names import ModuleNames, module_names

MODES = "modes"


class ModeWatcher(Watcher):
    """Looks at the flags of all modules as the first forward of a sampled step begins. On the host alone: no tensor is touched."""

    name = "modes"
    on_host = frozenset({"enter"})

    def __init__(self) -> None:
        """Begin without any evaluation seen."""
        self._in_evaluation: int | None = None

    def sites(self) -> Sequence[str]:
        """Return the root."""
        return ("",)

    def enter(self, call: Call, buffer: StepBuffer) -> None:
        """Tell the modes of one step."""
        if call.micro.index == 0:
            buffer.totals.tell(MODES, read_modes(call.module, in_evaluation=self._in_evaluation))

    def evaluating(self, model: nn.Module) -> None:
        """Look at the dropout of a model that has just run a batch of an evaluation."""
        self._in_evaluation = sum(layer.training for layer in dropout_layers(model))


def read_modes(model: nn.Module, *, in_evaluation: int | None = None) -> Modes:
    """Return the modes of a model's modules as they are now, without ``adapters_zero``, which only the device knows."""
    stopped = _outermost_in_eval_mode(model)
    trains = {name: any(p.requires_grad for p in module.parameters()) for name, module in stopped.items()}
    dropout, adapters = dropout_layers(model), adapter_layers(model)
    return Modes(
        in_eval_mode=tuple(name for name in stopped if trains[name]),
        in_eval_mode_frozen=tuple(name for name in stopped if not trains[name]),
        dropout_modules=len(dropout),
        dropout_active=sum(layer.training for layer in dropout),
        dropout_in_evaluation=in_evaluation,
        adapters=len(adapters),
        adapters_disabled=sum(map(is_switched_off, adapters)),
    )


def _outermost_in_eval_mode(model: nn.Module) -> dict[str, nn.Module]:
    """Return the modules in eval mode that are in no other such module, by canonical name."""
    names: ModuleNames | None = None  # found only where they are wanted: that takes longer than all the rest
    found: dict[str, nn.Module] = {}
    seen: set[int] = set()
    waiting = [model]
    while waiting:
        module = waiting.pop()
        if id(module) in seen:
            continue
        seen.add(id(module))
        if module.training:
            waiting.extend(reversed(list(module.children())))
        else:
            names = names or module_names(model)
            found.setdefault(names.find(module) or "", module)
    return found
