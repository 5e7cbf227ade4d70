"""The arguments of a forward by parameter name, however the caller passed them."""

from __future__ import annotations

import copy
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


def with_replaced(
    forward: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], replaced: Mapping[str, Any]
) -> tuple[list[Any], dict[str, Any]] | str:
    """Return the arguments of one call with some replaced by name: keywords, positional ones, or fields of a copied batch object.

    Nothing that was given is changed; what is not replaced is passed on as it is.

    Returns:
        Positional and keyword arguments, or the reason why one cannot be replaced.
    """
    placed, named, names = list(args), dict(kwargs), _positional_names(forward)
    for name, value in replaced.items():
        if name in named:
            named[name] = value
            continue
        for i, given in enumerate(placed):
            opened = {} if isinstance(given, Tensor) else shallow(given)
            if name in opened:
                placed[i] = _copy_with(given, name, value)
                if placed[i] is None:
                    return f"{name} cannot be replaced in a copy of the {type(given).__name__} that the forward was given"
                break
            if not opened and i < len(names) and names[i] == name:
                placed[i] = value
                break
        else:
            return f"{name} is not among the arguments that the forward was given"
    return placed, named


def _copy_with(batch: Any, name: str, value: Any) -> Any:
    """Return a shallow copy of a batch object with one field replaced; ``None`` if it cannot be copied so."""
    before = batch[name]
    try:
        copied = copy.copy(batch)
        if hasattr(type(copied), "__setitem__"):
            copied[name] = value
        else:
            setattr(copied, name, value)
        if copied[name] is not value:
            return None
    except (TypeError, AttributeError, KeyError):
        return None
    if batch[name] is before:
        return copied
    _put_back(batch, name, before)  # the copy shares its fields with the original
    return None


def _put_back(batch: Any, name: str, before: Any) -> None:
    if hasattr(type(batch), "__setitem__"):
        batch[name] = before
    else:
        setattr(batch, name, before)


def _positional_names(forward: Any) -> list[str]:
    try:
        parameters = inspect.signature(forward).parameters.values()
    except (TypeError, ValueError):
        return []
    return [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
