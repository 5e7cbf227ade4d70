"""The hooks: the only place that registers them, and the rules that tell a training forward from everything else.

A call counts when all of this holds: it is not being traced by ``torch.compile``; it is not inside a backward pass (checkpointing runs
forwards again there); the root's forward is running on this thread and was entered with gradients enabled (evaluation, prediction and
``generate`` run without). Hooks stand only while a sampled step runs, so there is nothing to copy, pickle or save at any other time.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from probe.capture.arguments import by_name
from probe.capture.breaker import Breaker
from probe.capture.buffer import StepBuffer
from probe.capture.microbatch import MicroBatch
from probe.capture.observer import Call, Observer
from probe.foreign.torch_private import in_backward
from probe.records import Site


class Forward:
    """The training forward of the root that is running, if one is.

    With ``nn.DataParallel`` several threads run replicas that share these hooks: the thread that enters the root first owns the
    forward, the others are not observed.
    """

    def __init__(self, buffer: StepBuffer, *, batch: Mapping[str, Any]) -> None:
        """Be ready for the root forwards of one ``training_step`` that was given ``batch``."""
        self.buffer = buffer
        self.batch = batch
        self.micro: MicroBatch | None = None
        self.calls: list[Call] = []
        self.other_threads = False
        self._nested = 0
        self._owner: int | None = None
        self._lock = threading.Lock()

    def begin(self, arguments: Mapping[str, Any]) -> MicroBatch | None:
        """Open a micro-batch for this thread; ``None`` if one is open (another thread's, or this is the root calling itself)."""
        with self._lock:
            if self.micro is not None:
                mine = self._owner == threading.get_ident()
                self._nested += mine
                self.other_threads |= not mine
                return None
            self._owner = threading.get_ident()
            self.micro = MicroBatch(len(self.buffer.micro_batches), self.batch, arguments)
            self.buffer.micro_batches.append(self.micro)
            return self.micro

    def here(self) -> MicroBatch | None:
        """Return the open micro-batch if the calling thread owns it."""
        return self.micro if self._owner == threading.get_ident() else None

    def end_nested(self) -> bool:
        """Tell whether the root call that returns now is one that the root made to itself, and count it as ended."""
        if self._nested:
            self._nested -= 1
            return True
        return False

    def end(self) -> None:
        """Close the micro-batch."""
        self.micro, self._owner = None, None


class HookSet:
    """Pre- and post-forward hooks at the root and at every site that some observer wants to see."""

    def __init__(
        self, modules: Mapping[str, nn.Module], sites: Mapping[str, Site], observers: Sequence[Observer], breaker: Breaker
    ) -> None:
        """Plan the hooks; none is registered yet.

        Args:
            modules: Module by site name, the root under "".
            sites: Site by name, the root under "".
            observers: All observers, in the order in which they see a call (and the reverse when it returns).
            breaker: Where an observer's error goes.
        """
        self._modules = modules
        self._sites = sites
        self._breaker = breaker
        self._watching: dict[str, list[Observer]] = {"": []}
        for observer in observers:
            for name in observer.sites():
                if name in modules:
                    self._watching.setdefault(name, []).append(observer)
        self._forward: Forward | None = None
        self._handles: list[RemovableHandle] = []

    def register(self, forward: Forward) -> None:
        """Register all hooks for one ``training_step``."""
        self.remove()
        self._forward = forward
        for name in self._watching:
            module = self._modules[name]
            before, after = (self._enter_root, self._leave_root) if name == "" else self._site_hooks(name)
            self._handles.append(module.register_forward_pre_hook(before, with_kwargs=True))
            # First among the post-hooks: FSDP2's own would reshard the weights that a head is evaluated with.
            self._handles.append(module.register_forward_hook(after, prepend=True, with_kwargs=True, always_call=True))

    def remove(self) -> None:
        """Remove every hook that was registered."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._forward = None

    def _enter_root(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        forward = self._forward
        if torch.compiler.is_compiling() or forward is None or in_backward() or not torch.is_grad_enabled():
            return
        micro = forward.begin(by_name(module.forward, args, kwargs))
        if micro is not None:
            self._enter("", module, args, kwargs, forward, micro)

    def _leave_root(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        forward = self._forward
        if torch.compiler.is_compiling() or forward is None or in_backward() or not torch.is_grad_enabled():
            return
        micro = forward.here()
        if micro is None or forward.end_nested():
            return
        micro.output = output
        while forward.calls and forward.calls[-1].module is not module:
            self._leave(forward.calls[-1].module, None, forward)
        self._leave(module, output, forward)
        micro.output = None
        forward.end()

    def _site_hooks(self, name: str) -> tuple[Any, Any]:
        def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            forward = self._forward
            if torch.compiler.is_compiling() or forward is None or in_backward():
                return
            micro = forward.here()
            if micro is not None:
                self._enter(name, module, args, kwargs, forward, micro)

        def after(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            forward = self._forward
            if torch.compiler.is_compiling() or forward is None or in_backward() or forward.here() is None:
                return
            self._leave(module, output, forward)

        return before, after

    def _enter(
        self, name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], forward: Forward, micro: MicroBatch
    ) -> None:
        call = Call(self._sites[name], module, micro, args, kwargs)
        forward.calls.append(call)
        for observer in self._watching[name]:
            if not self._breaker.is_off(observer.name):
                with self._breaker.guard(observer.name, name or "the model"), torch.no_grad():
                    observer.enter(call, forward.buffer)

    def _leave(self, module: nn.Module, output: Any, forward: Forward) -> None:
        if not forward.calls or forward.calls[-1].module is not module:
            return
        call = forward.calls.pop()
        call.output = output
        with self._breaker.guard("hooks", call.site.name or "the model"):
            call.entered.close()
        for observer in reversed(self._watching[call.site.name]):
            if not self._breaker.is_off(observer.name):
                with self._breaker.guard(observer.name, call.site.name or "the model"), torch.no_grad():
                    observer.leave(call, forward.buffer)


@contextmanager
def listening(modules: Mapping[str, nn.Module], hear: Callable[[str, Any], None]) -> Iterator[None]:
    """Hand the output of every call of these modules to ``hear(name, output)`` while the context is open.

    For forwards that the probe itself runs, outside any training forward. What ``hear`` raises passes through the model to whoever
    runs it.
    """
    handles: list[RemovableHandle] = []
    try:
        for name, module in modules.items():
            handles.append(module.register_forward_hook(partial(_heard, name, hear)))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _heard(name: str, hear: Callable[[str, Any], None], module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
    hear(name, output)
