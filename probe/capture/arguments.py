"""The arguments of a forward by parameter name, however the caller passed them."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from torch import Tensor


def shallow(batch: Any) -> dict[str, Any]:
    """Return a batch as a new dictionary: a mapping, or any object with ``keys()`` and ``[]``; else an empty one."""
    if isinstance(batch, Mapping) or (hasattr(batch, "keys") and hasattr(batch, "__getitem__")):
        return {str(name): batch[name] for name in batch.keys()}  # noqa: SIM118  (the object need not be iterable)
    return {}


def by_name(forward: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of one call of ``forward`` by name.

    A single positional argument that is a batch object is opened. Positional arguments beyond the signature are named ``arg<i>``.
    """
    named: dict[str, Any] = {}
    if args:
        names = _positional_names(forward)
        for i, value in enumerate(args):
            opened = {} if isinstance(value, Tensor) else shallow(value)
            if opened:
                named.update(opened)
            else:
                named[names[i] if i < len(names) else f"arg{i}"] = value
    named.update(kwargs)
    return named


def _positional_names(forward: Any) -> list[str]:
    try:
        parameters = inspect.signature(forward).parameters.values()
    except (TypeError, ValueError):
        return []
    return [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
