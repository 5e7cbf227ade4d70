"""The window: hooks stand, and kernels are watched, inside one ``training_step`` of a sampled step; both end before it returns."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import nn

from probe.capture.breaker import Breaker
from probe.capture.buffer import StepBuffer
from probe.capture.hooks import Forward, HookSet
from probe.capture.kernels import run_kernel
from probe.foreign.attention_kernels import implementations, watched_kernels
from probe.foreign.compiled import can_force_eager, force_eager, has_compiled_regions
from probe.settings import CompileMode

_OFF = "hooks are not run inside torch.compile regions with compile='off'; compile='window' runs sampled steps eagerly and sees them"
_FLEX = "a compiled model with flex attention: run eagerly, flex attention would build the full matrix of scores"
_OLD = "hooks are not run inside torch.compile regions, and this torch has no torch.compiler.set_stance (2.6 has)"


class Window:
    """Arms the hooks for one micro-batch of a sampled step and disarms them, whatever happens inside.

    Attributes:
        compiled: Whether any part of the model was taken by ``torch.compile`` (then armed steps run eagerly).
        closed: Why nothing inside the model can be observed; "" if it can.
    """

    def __init__(
        self, hooks: HookSet, breaker: Breaker, *, around: nn.Module, compile_mode: CompileMode, layers: Sequence[nn.Module] = ()
    ) -> None:
        """Decide how to arm.

        Args:
            hooks: All hooks, planned.
            breaker: Where an error goes.
            around: The outermost module that is called in training (a DDP or compile wrapper, or the root itself).
            compile_mode: What the user chose for compiled models.
            layers: The attention layers whose kernels are watched.
        """
        self._hooks = hooks
        self._breaker = breaker
        self._around = around
        self._layers = layers
        self.compiled = has_compiled_regions(around)
        self.closed = ""
        if self.compiled:
            flex = any("flex" in name for module in around.modules() for name in implementations(module))
            self.closed = _OFF if compile_mode == "off" else _FLEX if flex else "" if can_force_eager() else _OLD

    @contextmanager
    def armed(self, buffer: StepBuffer, *, batch: Mapping[str, Any]) -> Iterator[None]:
        """Observe the training forwards that run inside the context.

        Args:
            buffer: Where captures go.
            batch: What ``training_step`` was given, by name.
        """
        with ExitStack() as stack:
            with self._breaker.guard("hooks"):
                if self.closed:
                    buffer.totals.omit("model", self.closed)
                else:
                    if self.compiled:
                        stack.enter_context(force_eager())
                    self._watch_kernels(stack)
                    forward = Forward(buffer, batch=batch)
                    stack.callback(self._disarm, forward, buffer)
                    self._hooks.register(forward)
            yield

    def _watch_kernels(self, stack: ExitStack) -> None:
        if self._layers and not self._breaker.is_off("attention"):
            with self._breaker.guard("attention", "the attention kernels"):
                stack.enter_context(watched_kernels(self._layers, self._around, run_kernel))

    def _disarm(self, forward: Forward, buffer: StepBuffer) -> None:
        self._hooks.remove()
        if forward.other_threads:
            buffer.totals.omit("data_parallel", "nn.DataParallel runs a replica a device; one replica's share of each batch was observed")
