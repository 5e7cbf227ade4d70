"""The one use of wrapt: methods wrapped on a class or on one instance, and put back as they were."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import wrapt

Wrapper = Callable[[Callable[..., Any], Any, tuple[Any, ...], dict[str, Any]], Any]


if TYPE_CHECKING:
    _FunctionWrapper = wrapt.FunctionWrapper[..., Any]
else:
    _FunctionWrapper = wrapt.FunctionWrapper  # not subscriptable before wrapt 2


class _Copyable(_FunctionWrapper):
    """A wrapper that a deep copy of its owner leaves behind: the copy gets its own unwrapped method."""

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return copy.deepcopy(self.__wrapped__, memo)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.__wrapped__.__reduce_ex__(protocol)


def wrap_class_method(owner: type, name: str, wrapper: Wrapper) -> Callable[[], None]:
    """Wrap a method on a class, for instances that exist and for those to come.

    Returns:
        A function that puts the original back. It does nothing if somebody else has replaced the method since.
    """
    original = owner.__dict__[name]
    replacement = wrapt.FunctionWrapper(original, wrapper)
    setattr(owner, name, replacement)

    def undo() -> None:
        if owner.__dict__.get(name) is replacement:
            setattr(owner, name, original)

    return undo


def wrap_instance_method(instance: Any, name: str, wrapper: Wrapper) -> Callable[[], None]:
    """Wrap a bound method on one instance only.

    Returns:
        A function that takes the wrapper off again: the instance's dictionary is as before.
    """
    before = instance.__dict__.get(name)
    replacement = _Copyable(getattr(instance, name), wrapper)
    instance.__dict__[name] = replacement

    def undo() -> None:
        if instance.__dict__.get(name) is replacement:
            if before is None:
                del instance.__dict__[name]
            else:
                instance.__dict__[name] = before

    return undo
