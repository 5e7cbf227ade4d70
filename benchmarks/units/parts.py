"""The parts of a probe, each call of each observer: a context round every one of them, for a stopwatch or for the profiler's marks."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any
from unittest import mock

import torch

from benchmarks.units.timing import now
from probe.capture.hooks import HookSet
from probe.capture.observers import attention
from probe.observation import Observation
from probe.publication import Publisher

OBSERVER_METHODS = ("enter", "leave", "training_step", "step_end", "before_update", "after_update")
Around = Callable[[str, "str | None"], AbstractContextManager[Any]]
"""``around(part, site)`` is entered for one call; ``site`` is "" at the root and where there is none, ``None`` for what a tap reports."""


@contextmanager
def watched(around: Around) -> Iterator[None]:
    """Put ``around`` round the work of probes that begin to observe inside the context: observers, hooks, finish, record, publication."""
    make, tap = Observation.__init__, attention.AttentionTap

    def made(self: Observation, *args: Any, **kwargs: Any) -> None:
        make(self, *args, **kwargs)
        for observer in self._observers:
            for method in OBSERVER_METHODS:
                _wrap(observer, method, lambda call, part=observer.name: (part, _site(call)), around)

    def tapped(see: Callable[[Any], None], *args: Any, **kwargs: Any) -> Any:
        return tap(_around_see(see, around), *args, **kwargs)

    patches = [mock.patch.object(Observation, "__init__", made), mock.patch.object(attention, "AttentionTap", tapped)]
    for owner, method, part in (
        (HookSet, "register", "hooks"),
        (HookSet, "remove", "hooks"),
        (Observation, "finish", "finish"),
        (Publisher, "publish", "publication"),
    ):
        patches.append(mock.patch.object(owner, method, _method(getattr(owner, method), part, around)))
    for patch in patches:
        patch.start()
    try:
        yield
    finally:
        for patch in reversed(patches):
            patch.stop()


def _around_see(see: Callable[[Any], None], around: Around) -> Callable[[Any], None]:
    def seen(source: Any) -> None:
        with around("attention", None):
            see(source)

    return seen


def _wrap(owner: Any, method: str, name: Callable[[Any], tuple[str, str]], around: Around) -> None:
    call = getattr(owner, method, None)
    if call is None:
        return

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        with around(*name(args[0] if args else None)):
            return call(*args, **kwargs)

    object.__setattr__(owner, method, wrapped)


def _method(call: Callable[..., Any], part: str, around: Around) -> Callable[..., Any]:
    def wrapped(self: Any, *args: Any, **kwargs: Any) -> Any:
        with around(part, ""):
            return call(self, *args, **kwargs)

    return wrapped


def _site(call: Any) -> str:
    site = getattr(call, "site", None)
    return "" if site is None else str(site.name)


class Stopwatch:
    """Own time of each part (what runs inside another part counts there, and there only), and of attention by call.

    On CUDA the device is waited for on both sides, so that the time holds what a part launched; that is a benchmark's way, not the probe's.
    """

    def __init__(self, device: torch.device) -> None:
        """Start with no part seen."""
        self.seconds: dict[str, float] = defaultdict(float)
        self.by_site: dict[tuple[str, str], float] = defaultdict(float)
        self._device = device
        self._nested = [0.0]
        self._site = ""

    def clear(self) -> None:
        """Forget what was measured."""
        self.seconds.clear()
        self.by_site.clear()

    @contextmanager
    def around(self, part: str, site: str | None) -> Iterator[None]:
        """Measure one call."""
        site = self._site if site is None else site  # what a tap reports belongs to the site that was entered last
        self._site = site
        self._nested.append(0.0)
        begin = now(self._device)
        try:
            yield
        finally:
            took = now(self._device) - begin
            inside = self._nested.pop()
            self._nested[-1] += took
            self.seconds[part] += took - inside
            self.by_site[part, site] += took - inside
