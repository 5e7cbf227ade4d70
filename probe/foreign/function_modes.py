"""The torch function modes of a thread: which is entered innermost, and how to step out of some of them for a while.

Checked on torch 2.13.0: ``torch.overrides._get_current_function_mode_stack``, ``_push_mode`` and ``_pop_mode`` (there since 2.0), with
which torch itself enters and leaves a ``TorchFunctionMode``. The stack belongs to the calling thread.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeVar

from torch import overrides
from torch.overrides import TorchFunctionMode

_Mode = TypeVar("_Mode", bound=TorchFunctionMode)


def innermost(kind: type[_Mode]) -> _Mode | None:
    """Return the mode of that class that this thread entered last and has not left, or ``None``."""
    return next((mode for mode in reversed(_entered()) if isinstance(mode, kind)), None)


@contextmanager
def stepped_out_of(kind: type[TorchFunctionMode]) -> Iterator[None]:
    """Run the context as if no mode of that class were entered; then this thread's modes are as before, in their order."""
    before = _entered()
    _replace([mode for mode in before if not isinstance(mode, kind)])
    try:
        yield
    finally:
        _replace(before)


def _entered() -> list[TorchFunctionMode]:
    """Return this thread's modes, outermost first."""
    modes: list[TorchFunctionMode] = overrides._get_current_function_mode_stack()  # type: ignore[no-untyped-call]
    return modes


def _replace(modes: list[TorchFunctionMode]) -> None:
    for _ in _entered():
        overrides._pop_mode()  # type: ignore[no-untyped-call]
    for mode in modes:
        overrides._push_mode(mode)  # type: ignore[no-untyped-call]
