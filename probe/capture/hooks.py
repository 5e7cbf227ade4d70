"""The hooks: the only place that registers them, and the rules that tell a training forward from everything else.

A call counts when all of this holds: it is not being traced by ``torch.compile``; it is not inside a backward pass (checkpointing runs
forwards again there); the root's forward is running on this thread and was entered with gradients enabled (evaluation, prediction and
``generate`` run without). Hooks stand only while a sampled step runs, so there is nothing to copy, pickle or save at any other time; the
one exception are those of :mod:`probe.capture.in_graph`, which copy and pickle as a hook that does nothing.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from probe.capture.arguments import by_name
from probe.capture.breaker import Breaker
from probe.capture.buffer import StepBuffer
from probe.capture.microbatch import MicroBatch
from probe.capture.observer import Call, Observer, Watcher
from probe.foreign.compiled import Region, wrap_compiled_call
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


@dataclass(frozen=True, slots=True)
class Watched:
    """A site (the root's name is ""), or a module watched beside them, and the names of the observers that want to see its calls."""

    site: Site
    module: nn.Module
    observers: tuple[str, ...]


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
        # In a step with hundreds of calls, calling what does nothing adds up.
        self._entering = {name: [each for each in all_ if _acts(each, "enter")] for name, all_ in self._watching.items()}
        self._leaving = {name: [each for each in reversed(all_) if _acts(each, "leave")] for name, all_ in self._watching.items()}
        self._forward: Forward | None = None
        self._undo: list[Callable[[], None]] = []
        self._left_out: frozenset[str] = frozenset()
        self._door: Region | None = None

    def watched(self) -> list[Watched]:
        """Return everything that some observer wants to see, the root first."""
        return [Watched(self._sites[name], self._modules[name], tuple(o.name for o in all_)) for name, all_ in self._watching.items()]

    def leave_out(self, names: Collection[str], *, door: Region | None) -> None:
        """Register no hooks at these sites from now on; with a door, the root's stand at that compiled region, which the root is in."""
        self._left_out, self._door = frozenset(names), door

    def register(self, forward: Forward) -> None:
        """Register all hooks for one ``training_step``."""
        self.remove()
        self._forward = forward
        with forward.buffer.meter.section("hooks"):
            for name in self._watching:
                module = self._modules[name] if name or self._door is None else self._door.top
                if name == "" and self._door is not None and self._door.kind == "call":
                    self._undo.append(wrap_compiled_call(module, self._around_root))
                elif name not in self._left_out:
                    before, after = (self._enter_root, self._leave_root) if name == "" else self._site_hooks(name)
                    self._undo.append(module.register_forward_pre_hook(before, with_kwargs=True).remove)
                    # First among the post-hooks: FSDP2's own would reshard the weights that a head is evaluated with.
                    self._undo.append(module.register_forward_hook(after, prepend=True, with_kwargs=True, always_call=True).remove)

    def remove(self) -> None:
        """Remove every hook that was registered."""
        if self._forward is None:
            return
        with self._forward.buffer.meter.section("hooks"):
            while self._undo:
                self._undo.pop()()
        self._forward = None

    def show(self, name: str, output: Tensor, *, to: Collection[str]) -> None:
        """Show the observers named in ``to`` a call that compiled code reports: the output of a site alone, when it has returned.

        The memory of ``output`` is the compiled code's, which will use it again: none of them may hold a part of it.
        """
        forward = self._forward
        micro = None if forward is None else forward.here()
        if forward is None or micro is None:
            return
        call = Call(self._sites[name], self._modules[name], micro, (), {}, output)
        for observer in self._leaving[name]:
            if observer.name in to:
                self._show_end(observer, call, forward)

    def _around_root(self, wrapped: Callable[..., Any], instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call what ``module.compile()`` made between the root's two hooks."""
        output = None
        self._enter_root(instance, args, kwargs)
        try:
            output = wrapped(*args, **kwargs)
        finally:
            self._leave_root(instance, args, kwargs, output)
        return output

    def _enter_root(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        forward = self._forward
        if torch.compiler.is_compiling() or forward is None or in_backward() or not torch.is_grad_enabled():
            return
        module = module if self._door is None else self._modules[""]
        with forward.buffer.meter.section("hooks"):
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
        module = module if self._door is None else self._modules[""]
        with forward.buffer.meter.section("hooks"):
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
                with forward.buffer.meter.section("hooks"):
                    self._enter(name, module, args, kwargs, forward, micro)

        def after(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            forward = self._forward
            if torch.compiler.is_compiling() or forward is None or in_backward() or forward.here() is None:
                return
            with forward.buffer.meter.section("hooks"):
                self._leave(module, output, forward)

        return before, after

    def _enter(
        self, name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], forward: Forward, micro: MicroBatch
    ) -> None:
        call = Call(self._sites[name], module, micro, args, kwargs)
        forward.calls.append(call)
        for observer in self._entering[name]:
            if not self._breaker.is_off(observer.name):
                spent = forward.buffer.meter.section(observer.name, launches=_launches(observer, "enter"))
                with spent, self._breaker.guard(observer.name, name or "the model"), torch.no_grad():
                    observer.enter(call, forward.buffer)

    def _leave(self, module: nn.Module, output: Any, forward: Forward) -> None:
        if not forward.calls or forward.calls[-1].module is not module:
            return
        call = forward.calls.pop()
        call.output = output
        with self._breaker.guard("hooks", call.site.name or "the model"):
            call.entered.close()
        for observer in self._leaving[call.site.name]:
            self._show_end(observer, call, forward)

    def _show_end(self, observer: Observer, call: Call, forward: Forward) -> None:
        if not self._breaker.is_off(observer.name):
            spent = forward.buffer.meter.section(observer.name, launches=_launches(observer, "leave"))
            with spent, self._breaker.guard(observer.name, call.site.name or "the model"), torch.no_grad():
                observer.leave(call, forward.buffer)


def _acts(observer: Observer, event: str) -> bool:
    """Tell whether an observer does anything at an event."""
    return getattr(type(observer), event, None) is not getattr(Watcher, event)


def _launches(observer: Observer, event: str) -> bool:
    """Tell whether what an observer does at an event puts work on the device."""
    return event not in getattr(observer, "on_host", ())


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


def stand(modules: Iterable[nn.Module], hook: Callable[[nn.Module, tuple[Any, ...], Any], None]) -> list[RemovableHandle]:
    """Register one post-forward hook at modules inside compiled regions, where it is part of the compiled code and cannot come and go."""
    return [module.register_forward_hook(hook, prepend=True) for module in modules]


def _heard(name: str, hear: Callable[[str, Any], None], module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
    hear(name, output)
