"""Reading model configs of any make: transformers' own, mappings, plain objects, or none at all."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

_MOST = 64


def config_of(model: nn.Module) -> Any:
    """Return the model's config, or ``None``."""
    config = getattr(model, "config", None)
    return None if callable(config) else config


def all_configs(model: nn.Module) -> tuple[Any, ...]:
    """Return the model's config and the configs inside it, outermost first, each once; empty if the model has none."""
    config = config_of(model)
    found: list[Any] = [] if config is None else [config]
    for parent in found:  # grows while it is walked: breadth first
        for name, value in fields_of(parent):
            if len(found) < _MOST and _is_config(name, value) and not any(value is old for old in found):
                found.append(value)
    return tuple(found)


def field_of(config: Any, name: str) -> Any:
    """Return a field of a config, be it an object or a mapping; ``None`` if it has none."""
    return config.get(name) if isinstance(config, Mapping) else getattr(config, name, None)


def number_of(config: Any, *names: str) -> int | None:
    """Return the first of the named fields that is a whole number above 0."""
    values = (field_of(config, name) for name in names)
    return next((value for value in values if isinstance(value, int) and not isinstance(value, bool) and value > 0), None)


def text_of(config: Any, name: str) -> str:
    """Return a field that is text; "" if there is none."""
    value = field_of(config, name)
    return value if isinstance(value, str) else ""


def fields_of(config: Any) -> list[tuple[str, Any]]:
    """List a config's public fields; numbers that its class holds as plain attributes count too, as hand-written configs have them."""
    if isinstance(config, Mapping):
        return [(name, value) for name, value in config.items() if isinstance(name, str)]
    merged: dict[str, Any] = {}
    for base in reversed(type(config).__mro__[:-1]):
        merged.update((name, value) for name, value in vars(base).items() if isinstance(value, (int, list, tuple)))
    merged.update(getattr(config, "__dict__", {}))
    return [(name, value) for name, value in merged.items() if not name.startswith("_")]


def _is_config(name: str, value: Any) -> bool:
    if isinstance(value, type) or value is None:
        return False
    return hasattr(value, "to_dict") or (name.endswith("_config") and (isinstance(value, Mapping) or hasattr(value, "__dict__")))
