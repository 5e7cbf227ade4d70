"""Which models have a probe: entries by model, held weakly, and a patch that stands while there is any."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from typing import Any, Generic, TypeVar

from torch import nn

P = TypeVar("P")


class Registry(Generic[P]):
    """Probes by the model they were attached to. Models are held weakly: a probe ends with its model."""

    def __init__(self) -> None:
        """Start empty; nothing is patched."""
        self._probes: weakref.WeakKeyDictionary[nn.Module, P] = weakref.WeakKeyDictionary()
        self._undo: Callable[[], None] | None = None

    def add(self, model: nn.Module, probe: P, *, patch: Callable[[], Callable[[], None]]) -> None:
        """Enter a probe; with the first one ``patch`` is called, and what it returns when the last one is gone."""
        if self._undo is None:
            self._undo = patch()
        self._probes[model] = probe
        weakref.finalize(model, self._tidy).atexit = False

    def remove(self, model: nn.Module) -> None:
        """Take a model's probe out, and undo the patch if it was the last."""
        self._probes.pop(model, None)
        self._tidy()

    def get(self, model: nn.Module) -> P | None:
        """Return the probe that was attached to exactly this module."""
        return self._probes.get(model)

    def inside(self, model: Any) -> Iterator[P]:
        """Yield the probes that were attached to a module or to any module in it."""
        if isinstance(model, nn.Module) and self._probes:
            for module in list(model.modules()):
                probe = self._probes.get(module)
                if probe is not None:
                    yield probe

    def all(self) -> list[P]:
        """Return every probe."""
        return list(self._probes.values())

    def _tidy(self) -> None:
        """Undo the patch if no probe is left (keys of models that are gone do not count)."""
        if self._undo is not None and not any(True for _ in self._probes.keys()):  # noqa: SIM118  (len counts dead keys, too)
            self._undo()
            self._undo = None
