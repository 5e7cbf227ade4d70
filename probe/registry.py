"""The one piece of module state: which models have a probe."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from torch import nn

if TYPE_CHECKING:
    from probe.attachment import Probe


class Registry:
    """Probes by the model they were attached to. Models are held weakly: a probe ends with its model."""

    def __init__(self) -> None:
        """Start empty; nothing is patched."""
        self._probes: weakref.WeakKeyDictionary[nn.Module, Probe] = weakref.WeakKeyDictionary()
        self._undo: Callable[[], None] | None = None

    def add(self, model: nn.Module, probe: Probe, *, patch: Callable[[], Callable[[], None]]) -> None:
        """Enter a probe; with the first one ``patch`` is called, and what it returns when the last one is gone."""
        if self._undo is None:
            self._undo = patch()
        self._probes[model] = probe
        weakref.finalize(model, self._tidy).atexit = False

    def remove(self, model: nn.Module) -> None:
        """Take a model's probe out, and undo the patch if it was the last."""
        self._probes.pop(model, None)
        self._tidy()

    def get(self, model: nn.Module) -> Probe | None:
        """Return the probe that was attached to exactly this module."""
        return self._probes.get(model)

    def inside(self, model: Any) -> Iterator[Probe]:
        """Yield the probes that were attached to a module or to any module in it."""
        if isinstance(model, nn.Module) and self._probes:
            for module in list(model.modules()):
                probe = self._probes.get(module)
                if probe is not None:
                    yield probe

    def all(self) -> list[Probe]:
        """Return every probe."""
        return list(self._probes.values())

    def _tidy(self) -> None:
        """Undo the patch if no probe is left (keys of models that are gone do not count)."""
        if self._undo is not None and not any(True for _ in self._probes.keys()):  # noqa: SIM118  (len counts dead keys, too)
            self._undo()
            self._undo = None


REGISTRY = Registry()
