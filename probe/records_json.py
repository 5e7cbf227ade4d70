"""Records to one line of strict JSON and back, driven by the type hints of the dataclasses in ``probe.records``.

The format of a line is the dataclass, field by field. Left out: ``None``, empty tables, and numbers that are not finite (in a list,
where the position means something, ``null`` stands in). Read back: unknown keys are ignored, left-out tables are empty, ``null`` in a
list of numbers is NaN in memory. A new field is a new minor schema; a new value of a ``Literal``, a renamed
or a retyped field is a new major one.
"""

from __future__ import annotations

import functools
import json
import math
import numbers
import types
from collections.abc import Mapping
from dataclasses import MISSING, Field, fields, is_dataclass
from typing import Any, Literal, TypeVar, Union, cast, get_args, get_origin, get_type_hints

from probe.errors import ProbeTypeError, ProbeValueError
from probe.records import StepRecord

SCHEMA_MAJOR = 1
SCHEMA_MINOR = 0

R = TypeVar("R")


def to_json(record: Any) -> str:
    """Return a dataclass of ``probe.records`` as one line of ASCII JSON, without the newline.

    Raises:
        ProbeTypeError: if a field holds something that is no plain host data (a tensor, an object); the message names the field.
    """
    try:
        plain = _encode(record)
    except _NotPlainError as error:
        raise ProbeTypeError(f"{type(record).__name__}{''.join(reversed(error.way))}{error}") from None
    return json.dumps(plain, ensure_ascii=True, allow_nan=False, separators=(",", ":"))


def from_json(line: str) -> StepRecord:
    """Return the record that :func:`to_json` wrote.

    Raises:
        ProbeValueError: if the line is cut off, is no strict JSON, or holds a value of another type than the field; it names the field.
    """
    return parse(line, StepRecord)


def parse(line: str, kind: type[R]) -> R:
    """Return one line of JSON as ``kind``, any dataclass of ``probe.records``.

    Raises:
        ProbeValueError: as :func:`from_json`.
    """
    try:
        data = json.loads(line, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise ProbeValueError(f"not a line of strict JSON: {error}") from error
    restored: R = _decode(kind, data, kind.__name__)
    return restored


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


class _NotPlainError(Exception):
    """Something that is no plain host data, and the way to it, innermost first."""

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.way: list[str] = []


def _encode(value: Any) -> Any:
    """Return ``value`` as what ``json`` writes; ``None`` for a number that is not finite."""
    kind = type(value)
    if kind is float:
        return value if math.isfinite(value) else None
    if value is None or kind is str or kind is int or kind is bool:
        return value
    if kind is tuple or kind is list:
        return [_encode(part) if type(part) in _PLAIN else _below(part, f"[{index}]") for index, part in enumerate(value)]
    if is_dataclass(kind):
        return _encode_dataclass(value)
    if isinstance(value, Mapping):
        pairs = ((_key(name), _below(part, f"[{name!r}]")) for name, part in value.items())
        return {name: plain for name, plain in pairs if plain is not None}
    if isinstance(value, str):
        return value
    if isinstance(value, numbers.Integral):
        return int(value)
    if isinstance(value, numbers.Real):
        return _encode(float(value))
    if isinstance(value, (tuple, list)):
        return _encode(list(value))
    raise _NotPlainError(f" holds a {kind.__name__}; a record holds only numbers, strings and tuples")


_PLAIN = frozenset({float, int, str, bool, type(None)})


def _encode_dataclass(value: Any) -> dict[str, Any]:
    found, kind = {}, cast(type, type(value))
    for name in _names(kind):
        part = getattr(value, name)
        plain = _encode(part) if type(part) in _PLAIN else _below(part, f".{name}")
        if plain is not None and (plain not in ([], {}) or is_dataclass(part)):
            found[name] = plain
    return found


def _below(part: Any, step: str) -> Any:
    """Return a part of something encoded; of an error in it, note the step that leads there."""
    try:
        return _encode(part)
    except _NotPlainError as error:
        error.way.append(step)
        raise


def _key(name: Any) -> str:
    if not isinstance(name, str):
        raise _NotPlainError(f" has the key {name!r}; keys are strings")
    return name


@functools.cache
def _names(kind: type) -> tuple[str, ...]:
    return tuple(field.name for field in fields(kind))


def _decode(hint: Any, value: Any, path: str) -> Any:
    """Return ``value``, as ``json`` read it, as the type that ``hint`` names."""
    origin = get_origin(hint)
    if origin is Union or origin is types.UnionType:
        return _decode_optional(hint, value, path)
    if origin is Literal:
        if value not in get_args(hint):
            raise ProbeValueError(f"{path}: expected one of {', '.join(map(repr, get_args(hint)))}, got {value!r:.80}")
        return value
    if origin is tuple:
        return _decode_tuple(get_args(hint), _expect(value, list, path), path)
    if origin is dict:
        part = get_args(hint)[1]
        return {name: _decode(part, item, f"{path}[{name!r}]") for name, item in _expect(value, dict, path).items()}
    if is_dataclass(hint) and isinstance(hint, type):
        return _decode_dataclass(hint, _expect(value, dict, path), path)
    if hint is float:
        return _decode_float(value, path)
    return _expect(value, hint, path)


def _expect(value: Any, kind: type, path: str) -> Any:
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise ProbeValueError(f"{path}: expected {kind.__name__}, got {value!r:.80}")
    return value


def _decode_float(value: Any, path: str) -> float:
    if value is None:
        return math.nan
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ProbeValueError(f"{path}: expected a number, got {value!r:.80}")
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise ProbeValueError(f"{path}: the number is too large")
    return number


def _decode_optional(hint: Any, value: Any, path: str) -> Any:
    kinds = [kind for kind in get_args(hint) if kind is not type(None)]
    if len(kinds) != 1:
        raise ProbeTypeError(f"{path}: a record field is one type or None, not {hint}")
    return None if value is None else _decode(kinds[0], value, path)


def _decode_tuple(kinds: tuple[Any, ...], value: list[Any], path: str) -> tuple[Any, ...]:
    if len(kinds) == 2 and kinds[1] is Ellipsis:
        return tuple(_decode(kinds[0], item, f"{path}[{index}]") for index, item in enumerate(value))
    if len(value) != len(kinds):
        raise ProbeValueError(f"{path}: expected {len(kinds)} values, got {len(value)}")
    return tuple(_decode(kind, item, f"{path}[{index}]") for index, (kind, item) in enumerate(zip(kinds, value)))


def _decode_dataclass(kind: type, value: dict[str, Any], path: str) -> Any:
    arguments = {}
    for field, hint in _hints(kind):
        where = f"{path}.{field.name}"
        if field.name in value:
            arguments[field.name] = _decode(hint, value[field.name], where)
        elif field.default is MISSING and field.default_factory is MISSING:
            arguments[field.name] = _left_out(hint, where)
    return kind(**arguments)


def _left_out(hint: Any, path: str) -> Any:
    """Return what :func:`_encode` leaves out of a required field: an empty table, or a number that was not finite."""
    origin = get_origin(hint)
    if origin in (tuple, dict):
        return origin()
    if hint is float:
        return math.nan
    if type(None) in get_args(hint):
        return None
    raise ProbeValueError(f"{path} is missing")


@functools.cache
def _hints(kind: type) -> tuple[tuple[Field[Any], Any], ...]:
    """Return the fields of a dataclass with their resolved types (resolving costs more than decoding, so once a class)."""
    hints = get_type_hints(kind)
    return tuple((field, hints[field.name]) for field in fields(kind))
