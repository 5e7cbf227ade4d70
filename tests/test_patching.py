"""Wrapping methods, and putting them back."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from probe.foreign.patching import wrap_class_method, wrap_instance_method

pytestmark = pytest.mark.pure  # of torch and probe alone: the same with every transformers


class Thing:
    def __init__(self) -> None:
        self.calls: list[str] = []

    def work(self, what: str) -> str:
        self.calls.append(what)
        return what


def loud(wrapped: Any, instance: Any, args: Any, kwargs: Any) -> Any:
    return wrapped(*args, **kwargs).upper()


def test_a_class_method_is_wrapped_for_all_instances_and_put_back() -> None:
    """Instances made before and after are wrapped; undo restores the very same function."""
    original, before = Thing.__dict__["work"], Thing()
    undo = wrap_class_method(Thing, "work", loud)
    assert (before.work("a"), Thing().work("b")) == ("A", "B")
    undo()
    assert Thing.__dict__["work"] is original
    assert before.work("a") == "a"


def test_undo_leaves_somebody_elses_later_replacement() -> None:
    """If another tool has replaced the method since, its work is not undone."""
    original = Thing.__dict__["work"]
    undo = wrap_class_method(Thing, "work", loud)
    try:
        Thing.work = other = lambda self, what: "other"  # type: ignore[method-assign,assignment]
        undo()
        assert Thing.__dict__["work"] is other
    finally:
        Thing.work = original  # type: ignore[method-assign]


def test_an_instance_is_wrapped_alone_and_put_back() -> None:
    """Only this instance changes; undo leaves its dictionary as before."""
    thing, other = Thing(), Thing()
    before = dict(vars(thing))
    undo = wrap_instance_method(thing, "work", loud)
    assert (thing.work("a"), other.work("a")) == ("A", "a")
    undo()
    assert vars(thing) == before


def test_a_method_that_the_user_put_on_the_instance_comes_back() -> None:
    """A user's own replacement on the instance is wrapped, and restored by undo."""
    thing = Thing()
    mine = thing.work = lambda what: f"my {what}"  # type: ignore[method-assign]
    undo = wrap_instance_method(thing, "work", loud)
    assert thing.work("a") == "MY A"
    undo()
    assert vars(thing)["work"] is mine


def test_a_deep_copy_gets_its_own_unwrapped_method() -> None:
    """A copied instance runs its own method on itself, without the wrapper."""
    thing = Thing()
    undo = wrap_instance_method(thing, "work", loud)
    twin = copy.deepcopy(thing)
    assert twin.work("b") == "b"
    assert (twin.calls, thing.calls) == (["b"], [])
    undo()
