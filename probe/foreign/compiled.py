"""What torch.compile has taken, how to run a stretch of it eagerly, and how to stand round it: torch's names for all of these.

Checked on torch 2.13.0. ``nn.Module._compiled_call_impl`` (set by ``module.compile()``), the class name ``OptimizedModule`` (what
``torch.compile(module)`` returns), ``_torchdynamo_orig_callable`` (on what ``torch.compile(function)`` returns) and
``get_compiler_config`` (on all three) are private, and so is ``skip_code``; ``torch.compiler.set_stance`` is public since torch 2.6.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import torch
from torch import nn
from torch._dynamo.eval_frame import skip_code

from probe.foreign.patching import wrap_instance_method

_Function = TypeVar("_Function", bound=Callable[..., Any])


@dataclass(frozen=True, slots=True)
class Region:
    """One module that ``torch.compile`` has taken, with all that is in it.

    Attributes:
        top: The wrapper that ``torch.compile(module)`` returned, or the module whose ``compile()`` was called, or whose ``forward`` was
            replaced by a compiled one.
        kind: Which of these. Hooks of a wrapper, and of a module with a compiled ``forward``, run outside the compiled code; those of
            a module with a compiled call are part of it.
        replays: Whether it was compiled for CUDA graphs (``mode="reduce-overhead"``), which replay kernels and no Python.
    """

    top: nn.Module
    kind: Literal["wrapper", "call", "forward"]
    replays: bool

    def inside(self) -> set[int]:
        """Return the ids of the modules whose hooks would be part of the compiled code."""
        found = {id(module) for module in self.top.modules()}
        return found if self.kind == "call" else found - {id(self.top)}


def compiled_regions(model: nn.Module) -> list[Region]:
    """Return what ``torch.compile`` has taken of a model, outer regions before those in them."""
    found: list[Region] = []
    for module in model.modules():
        forward = module.__dict__.get("forward")
        if type(module).__name__ == "OptimizedModule":
            found.append(Region(module, "wrapper", _replays(module)))
        elif (call := getattr(module, "_compiled_call_impl", None)) is not None:
            found.append(Region(module, "call", _replays(call)))
        elif hasattr(forward, "_torchdynamo_orig_callable"):
            found.append(Region(module, "forward", _replays(forward)))
    return found


def has_compiled_regions(model: nn.Module) -> bool:
    """Tell whether ``torch.compile`` has taken the model or some module in it."""
    return bool(compiled_regions(model))


def wrap_compiled_call(module: nn.Module, wrapper: Callable[..., Any]) -> Callable[[], None]:
    """Stand round the compiled call of a module whose ``compile()`` was called: ``wrapper(call, module, args, kwargs)`` runs eagerly.

    Returns:
        A function that takes the wrapper off again.
    """
    return wrap_instance_method(module, "_compiled_call_impl", wrapper)


def can_force_eager() -> bool:
    """Tell whether this torch can run compiled callables eagerly for a while."""
    return hasattr(torch.compiler, "set_stance")


def force_eager() -> AbstractContextManager[Any]:
    """Return a context in which compiled callables run eagerly, without a recompile before, in or after it."""
    context: AbstractContextManager[Any] = torch.compiler.set_stance("force_eager")
    return context


def only_inline(function: _Function) -> _Function:
    """Keep ``torch.compile`` from making code of a function for its own sake; where compiled code calls it, it is still a part of that.

    For what is called between two graphs of a broken one: it would be a graph more for every caller, until their number is at its limit.
    """
    skip_code(function.__code__)
    return function


@only_inline
def is_traced_away() -> bool:
    """Tell whether a module is being made into something that is used elsewhere: by ``torch.export``, ONNX or ``torch.jit.trace``."""
    exporting = getattr(torch.compiler, "is_exporting", None)
    return torch._C._get_tracing_state() is not None or (exporting is not None and exporting())


def _replays(compiled: Any) -> bool:
    """Tell whether a compiled callable was made for CUDA graphs; only inductor's configuration can be asked."""
    ask = getattr(compiled, "get_compiler_config", None)
    config = ask() if callable(ask) else None
    return isinstance(config, dict) and bool(config.get("triton.cudagraphs"))
