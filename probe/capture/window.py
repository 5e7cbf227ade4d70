"""The window: hooks stand, and kernels are watched, inside one ``training_step`` of a sampled step; both end before it returns.

Of a model with compiled regions it runs such a step eagerly, so that hooks run, or leaves it compiled (``compile="in_graph"``): then
hooks stand outside the regions only, and what is in them is reported by :mod:`probe.capture.in_graph`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import nn

from probe.capture.breaker import Breaker
from probe.capture.buffer import StepBuffer
from probe.capture.compiled_sites import CompiledSites, divide_sites
from probe.capture.hooks import Forward, HookSet
from probe.capture.in_graph import InGraph
from probe.capture.kernels import run_kernel
from probe.foreign.attention_kernels import implementations, watched_kernels
from probe.foreign.compiled import can_force_eager, compiled_regions, force_eager
from probe.settings import CompileMode

_OFF = "hooks are not run inside torch.compile regions with compile='off'; compile='window' runs sampled steps eagerly and sees them"
_FLEX = "a compiled model with flex attention: run eagerly, flex attention would build the full matrix of scores"
_OLD = "hooks are not run inside torch.compile regions, and this torch has no torch.compiler.set_stance (2.6 has)"


class Window:
    """Arms the hooks for one micro-batch of a sampled step and disarms them, whatever happens inside.

    Attributes:
        compiled: Whether any part of the model was taken by ``torch.compile``.
        runs_eagerly: Whether armed steps of a compiled model run eagerly.
        never_eager: Why nothing of this model may run eagerly; "" if it may.
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
        regions = compiled_regions(around)
        self.compiled = bool(regions)
        self.never_eager = self.closed = ""
        self._compiled_sites: CompiledSites | None = None
        self._in_graph: InGraph | None = None
        if self.compiled:
            flex = any("flex" in name for module in around.modules() for name in implementations(module))
            self.never_eager = _OFF if compile_mode == "off" else _FLEX if flex else "" if can_force_eager() else _OLD
        if self.compiled and compile_mode == "in_graph":
            self._compiled_sites = divide_sites(hooks.watched(), regions)
            self._in_graph = InGraph(self._compiled_sites.reported, hooks, breaker)
            hooks.leave_out(self._compiled_sites.left_out, door=self._compiled_sites.door)
            # Kernels that are watched where layers look them up are guarded on by the compiled layers that look there too.
            self._layers = ()
        else:
            self.closed = self.never_eager
        self.runs_eagerly = self.compiled and self._in_graph is None and not self.closed

    def begin(self) -> None:
        """Register what has to stand before the model is called for the first time, for as long as it trains."""
        if self._in_graph is not None:
            with self._breaker.guard("hooks"):
                self._in_graph.register()

    def end(self) -> None:
        """Remove every hook."""
        self._hooks.remove()
        if self._in_graph is not None:
            self._in_graph.remove()

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
                    if self.runs_eagerly:
                        stack.enter_context(force_eager())
                    self._watch_kernels(stack)
                    forward = Forward(buffer, batch=batch)
                    stack.callback(self._disarm, forward, buffer)
                    self._hooks.register(forward)
                    self._listen(stack, forward)
            yield

    def _listen(self, stack: ExitStack, forward: Forward) -> None:
        """Let compiled code report, and name what of it is not seen."""
        if self._in_graph is not None and self._compiled_sites is not None:
            stack.enter_context(self._in_graph.open(forward))
            for what, why in self._compiled_sites.reasons.items():
                forward.buffer.totals.omit(what, why)

    def _watch_kernels(self, stack: ExitStack) -> None:
        if self._layers and not self._breaker.is_off("attention"):
            with self._breaker.guard("attention", "the attention kernels"):
                stack.enter_context(watched_kernels(self._layers, self._around, run_kernel))

    def _disarm(self, forward: Forward, buffer: StepBuffer) -> None:
        self._hooks.remove()
        if forward.other_threads:
            buffer.totals.omit("data_parallel", "nn.DataParallel runs a replica a device; one replica's share of each batch was observed")
