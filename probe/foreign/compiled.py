"""What torch.compile has taken, and how to run a stretch of it eagerly: torch's names for both.

Checked on torch 2.13.0. ``nn.Module._compiled_call_impl`` (set by ``module.compile()``) and the class name ``OptimizedModule`` (what
``torch.compile(module)`` returns) are private; ``torch.compiler.set_stance`` is public since torch 2.6.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn


def has_compiled_regions(model: nn.Module) -> bool:
    """Tell whether ``torch.compile`` has taken the model or some module in it."""
    return any(
        type(module).__name__ == "OptimizedModule" or getattr(module, "_compiled_call_impl", None) is not None for module in model.modules()
    )


def can_force_eager() -> bool:
    """Tell whether this torch can run compiled callables eagerly for a while."""
    return hasattr(torch.compiler, "set_stance")


def force_eager() -> AbstractContextManager[Any]:
    """Return a context in which compiled callables run eagerly, without a recompile before, in or after it."""
    context: AbstractContextManager[Any] = torch.compiler.set_stance("force_eager")
    return context
