"""Sites inside compiled regions: one operator call each, which stands in the compiled code and reports the site's output in sampled steps.

``torch.compile`` makes code once and does not look for hooks again, so what is to be seen of a compiled step has to be part of the
code. It is one operator, ``probe::observe(output, site)``: it returns nothing, and it says that it changes ``site``, a tensor of two
numbers on the host, or it would be dropped as dead code. Its Python body runs when the compiled code does; what it does is decided there
and not when the code is made, so nothing is ever compiled again: outside sampled steps it returns at once. ``site`` tells who asked and
which site it is. It lies in the dictionary of the site's module under one name for all of them, so that layers that share one compiled
code share it still.

Source: torch.library, "Custom operators"; torch 2.13.0's ``torch._dynamo.config.skip_nnmodule_hook_guards`` (hooks are not guarded on).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from probe.capture.breaker import Breaker
from probe.capture.hooks import Forward, HookSet, Watched, stand
from probe.capture.observer import main_tensor
from probe.foreign.compiled import is_traced_away, only_inline
from probe.foreign.torch_private import in_backward

SITE = "_probe_site"
"""Name in a module's dictionary of the tensor that tells the operator which site it is: (2,) int64 on the host."""

SEEN = ("statistics", "heads", "audio_checks")
"""The observers to whom a site's output, in the moment in which it returns, is enough."""

_UNREPORTED = (
    "the compiled code did not report it in this step: either it was not called, or the model had been called before training began, and "
    "torch.compile does not look for hooks again (then call torch.compiler.reset() before training)"
)


class ReportingHook:
    """The post-forward hook that puts the operator into the compiled code; it has no state.

    Wherever the model is copied or pickled, a hook that does nothing, of the standard library, takes its place.
    """

    @only_inline
    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """Call the operator on the main tensor of the output, unless the model is being exported or it is no plain tensor."""
        if is_traced_away():
            return
        tensor, site = main_tensor(output), module.__dict__.get(SITE)
        if site is not None and type(tensor) in (Tensor, nn.Parameter):
            torch.ops.probe.observe(tensor.detach(), site)  # type: ignore[union-attr]

    def __reduce__(self) -> tuple[Any, ...]:
        """Become ``nullcontext().__exit__``, which takes any arguments and returns ``None``: no copy needs this package."""
        return getattr, (nullcontext(), "__exit__")


class InGraph:
    """The sites of one model that compiled code reports, while training goes on; open in its sampled steps only."""

    def __init__(self, sites: Sequence[Watched], hooks: HookSet, breaker: Breaker) -> None:
        """Plan the hooks; none is registered yet.

        Args:
            sites: The sites inside compiled regions.
            hooks: Shows the observers what is reported.
            breaker: Where an error goes.
        """
        self._hooks, self._breaker = hooks, breaker
        self._modules = list({id(one.module): one.module for one in sites}.values())
        self._sites = [[one.site for one in sites if one.module is module] for module in self._modules]
        self._handles: list[RemovableHandle] = []
        self._forward: Forward | None = None
        self._step: int | None = None
        self._reported: set[int] = set()
        self._warned = False

    def register(self) -> None:
        """Register the hooks that compiled code will contain: before it is made, and for the whole training."""
        self.remove()
        for place, module in enumerate(self._modules):
            module.__dict__[SITE] = torch.tensor([id(self), place])
        self._handles = stand(self._modules, ReportingHook())

    def remove(self) -> None:
        """Leave the modules as they were. Compiled code that contains the operator is made anew at its next call."""
        for handle in self._handles:
            handle.remove()
        for module in self._modules if self._handles else ():
            module.__dict__.pop(SITE, None)
        self._handles = []

    @contextmanager
    def open(self, forward: Forward) -> Iterator[None]:
        """Let the operator report what runs inside the context, a part of a sampled step."""
        if forward.buffer.step != self._step:
            self._step = forward.buffer.step
            self._reported.clear()
        self._forward = forward
        _OPEN[id(self)] = self
        try:
            yield
        finally:
            del _OPEN[id(self)]
            self._forward = None
            if forward.buffer.micro_batches:
                self._name_unreported(forward)

    def report(self, place: int, output: Tensor) -> None:
        """Show the observers one call of a site, if it is a part of the training forward and no recompute of it."""
        forward = self._forward
        if forward is None or forward.here() is None or in_backward():
            return
        with self._breaker.guard("hooks", self._sites[place][0].name), forward.buffer.meter.section("hooks"):
            self._reported.add(place)
            for site in self._sites[place]:
                # Who looks at heads would hold what feeds them, and the compiled code uses that memory again.
                seeing = SEEN if site.role == "lm_head" else tuple(name for name in SEEN if name != "heads")
                # A tensor object of its own: the compiled code's own may outlive its content.
                self._hooks.show(site.name, output.detach(), to=seeing)

    def _name_unreported(self, forward: Forward) -> None:
        for place, sites in enumerate(self._sites):
            for site in sites:
                if place in self._reported:
                    forward.buffer.totals.reasons.pop(f"site:{site.name}", None)
                else:
                    forward.buffer.totals.omit(f"site:{site.name}", _UNREPORTED)
        if self._sites and not self._reported and not self._warned:
            self._warned = True
            shown = ", ".join(site.name for sites in self._sites for site in sites)
            self._breaker.say(f"compile='in_graph': nothing was reported of {_short(shown)} in step {self._step}: {_UNREPORTED}")


def _short(names: str) -> str:
    return names if len(names) <= 100 else f"{names[:97]}..."


_OPEN: dict[int, InGraph] = {}
"""Who listens just now, by what the operator is told: nobody but in a sampled step, between its begin and its end."""


@only_inline
def _observe(output: Tensor, site: Tensor) -> None:
    if _OPEN:
        _report(output, site)


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _report(output: Tensor, site: Tensor) -> None:
    owner, place = site.tolist()
    listener = _OPEN.get(owner)
    if listener is not None:
        listener.report(place, output)


def _shapes_only(output: Tensor, site: Tensor) -> None:
    """Stand for the operator where there are shapes and no data."""


only_inline(main_tensor)

# Not torch.library.custom_op, whose call takes about ten times as long: it stands in every step.
_LIBRARY: Any = torch.library.Library("probe", "FRAGMENT")  # type: ignore[no-untyped-call,unused-ignore]
_TAGS = tuple(tag for name in ("pt2_compliant_tag", "flexible_layout") if (tag := getattr(torch.Tag, name, None)) is not None)
_LIBRARY.define("observe(Tensor output, Tensor(a!) site) -> ()", tags=_TAGS)
_LIBRARY.impl("observe", _observe, "CompositeExplicitAutograd")
torch.library.register_fake("probe::observe", _shapes_only, lib=_LIBRARY)
