"""An independent count of module calls inside training forwards, made without hooks and without private names of PyTorch.

While a counter is open it stands in for ``torch.nn.Module.__call__`` and for ``torch.autograd.backward`` and ``grad``; the model itself
is not touched, so it may be copied, saved, wrapped and given a new ``forward`` meanwhile. Not for compiled models.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn


class CallCounter:
    """Counts calls of named modules, one count a module and training forward of the root.

    A training forward is a call of the root with gradients enabled, outside a backward pass. What is called during a backward pass is
    recomputed by checkpointing; what is called below a root without gradients is evaluation, prediction or generation. A training
    forward that raises is not kept.

    Attributes:
        calls: Per name, the number of calls in each training forward, in order.
        recomputed: Per name, the calls inside backward passes.
        elsewhere: Per name, all other calls: without gradients at the root, or with no call of the root around them.
    """

    def __init__(self, model: nn.Module, names: Iterable[str]) -> None:
        self._root = model
        self._names: dict[int, list[str]] = {}
        self._kept: list[nn.Module] = []  # an id is only sound while its module lives
        for name in names:
            module = model.get_submodule(name)
            self._kept.append(module)
            self._names.setdefault(id(module), []).append(name)
        self.calls: dict[str, list[int]] = {name: [] for named in self._names.values() for name in named}
        self.recomputed: Counter[str] = Counter()
        self.elsewhere: Counter[str] = Counter()
        self.micro_batches = 0
        self._current: Counter[str] | None = None
        self._backwards = 0
        self._undo: list[Callable[[], None]] = []

    def total(self, name: str) -> int:
        """Return the calls of one module over all training forwards."""
        return sum(self.calls[name])

    def __enter__(self) -> CallCounter:
        self._replace(nn.Module, "__call__", self._counting)
        self._replace(torch.autograd, "backward", self._marking)
        self._replace(torch.autograd, "grad", self._marking)
        return self

    def __exit__(self, *exception: object) -> None:
        while self._undo:
            self._undo.pop()()

    def _replace(self, owner: Any, name: str, make: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
        before = getattr(owner, name)
        setattr(owner, name, make(before))
        self._undo.append(lambda: setattr(owner, name, before))

    def _counting(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def counted(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            opens = module is self._root and self._current is None and not self._backwards and torch.is_grad_enabled()
            if opens:
                self._current = Counter()
            self._note(module)
            if not opens:
                return call(module, *args, **kwargs)
            try:
                result = call(module, *args, **kwargs)
                self._keep()
                return result
            finally:
                self._current = None

        return counted

    def _marking(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def marked(*args: Any, **kwargs: Any) -> Any:
            self._backwards += 1
            try:
                return call(*args, **kwargs)
            finally:
                self._backwards -= 1

        return marked

    def _note(self, module: nn.Module) -> None:
        for name in self._names.get(id(module), ()):
            if self._backwards:
                self.recomputed[name] += 1
            elif self._current is None:
                self.elsewhere[name] += 1
            else:
                self._current[name] += 1

    def _keep(self) -> None:
        assert self._current is not None
        self.micro_batches += 1
        for name, counts in self.calls.items():
            counts.append(self._current[name])
