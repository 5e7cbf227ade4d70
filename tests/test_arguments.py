"""The arguments of a forward by name, however they were passed."""

from __future__ import annotations

from collections import UserDict
from typing import Any

import pytest
import torch

from probe.capture.arguments import by_name, shallow, with_replaced

pytestmark = pytest.mark.pure  # of torch and probe alone: the same with every transformers


class Batch:
    """A batch that is no mapping: keys and [] only."""

    def __init__(self, **content: Any) -> None:
        self._content = content

    def keys(self) -> list[str]:
        return list(self._content)

    def __getitem__(self, name: str) -> Any:
        return self._content[name]


def forward(input_ids: Any, attention_mask: Any = None, **kwargs: Any) -> None:
    """A forward like a model's."""


def test_positional_and_keyword_arguments_get_their_names() -> None:
    """Positional arguments take the parameters' names; keywords keep theirs."""
    assert by_name(forward, (1,), {"labels": 3}) == {"input_ids": 1, "labels": 3}


def test_a_batch_object_as_the_only_argument_is_opened() -> None:
    """model(batch) with an object that has keys() and [] is read by its keys."""
    assert by_name(forward, (Batch(input_ids=1, labels=2),), {}) == {"input_ids": 1, "labels": 2}


def test_a_tensor_is_no_batch_object() -> None:
    """A tensor argument stays one value."""
    tensor = torch.zeros(2)
    assert by_name(forward, (tensor,), {})["input_ids"] is tensor


def test_a_forward_without_a_signature_still_gives_every_value() -> None:
    """Arguments without a known name are numbered, not dropped."""
    assert by_name(lambda *args: None, (1, 2), {}) == {"arg0": 1, "arg1": 2}
    assert by_name(3, (1,), {}) == {"arg0": 1}


def test_shallow_copies_and_never_fails_on_other_objects() -> None:
    """The copy is one level deep: removing a key from the batch later does not touch it."""
    batch = {"labels": [1]}
    copied = shallow(batch)
    batch.pop("labels")
    assert copied == {"labels": [1]}
    assert shallow([1, 2]) == {}
    assert shallow(None) == {}


def replaced(args: tuple[Any, ...], kwargs: dict[str, Any], **values: Any) -> Any:
    """Return the arguments of a call of ``forward`` with some replaced."""
    return with_replaced(forward, args, kwargs, values)


def test_keywords_and_positions_are_replaced() -> None:
    """By name, and what was given is not changed."""
    ids, mask, new = torch.zeros(1), torch.ones(1), torch.full((1,), 2.0)
    kwargs = {"labels": 1, "speech": mask}
    args, named = replaced((ids, mask), kwargs, input_ids=new, speech=new)
    assert args[0] is new and args[1] is mask and named["labels"] == 1 and named["speech"] is new
    assert kwargs["speech"] is mask


def test_an_unknown_name_is_a_reason() -> None:
    """Nothing is added to a call; beyond the signature there are no names."""
    assert replaced((1,), {"labels": 2}, speech=3) == "speech is not among the arguments that the forward was given"
    assert isinstance(replaced((), {}, attention_mask=3), str)
    assert isinstance(with_replaced(object(), (1,), {}, {"input_ids": 3}), str)


class Attributes:
    """A batch object whose fields are attributes, like the original trainer's."""

    def __init__(self, **content: Any) -> None:
        self.__dict__.update(content)

    def keys(self) -> list[str]:
        return list(self.__dict__)

    def __getitem__(self, name: str) -> Any:
        return self.__dict__[name]


class Shared(Batch):
    """A batch object whose copies share its fields."""

    def __setitem__(self, name: str, value: Any) -> None:
        self._content[name] = value


@pytest.mark.parametrize("kind", [dict, UserDict, Attributes])
def test_a_batch_object_is_copied(kind: Any) -> None:
    """A field of a positional mapping or batch object is replaced in a copy of the same class; the original keeps its own."""
    batch = kind(input_ids=1, speech=2)
    (copied,), named = replaced((batch,), {}, speech=3)
    assert type(copied) is kind and named == {}
    assert (copied["speech"], copied["input_ids"], batch["speech"]) == (3, 1, 2)


@pytest.mark.parametrize("kind", [Batch, Shared])
def test_a_batch_object_that_cannot_be_copied_is_a_reason(kind: Any) -> None:
    """Neither one that takes no field, nor one whose copy is the original in disguise; that one is as it was."""
    batch = kind(input_ids=1, speech=2)
    assert replaced((batch,), {}, speech=3) == f"speech cannot be replaced in a copy of the {kind.__name__} that the forward was given"
    assert batch["speech"] == 2
