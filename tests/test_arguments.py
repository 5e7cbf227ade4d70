"""The arguments of a forward by name, however they were passed."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from probe.capture.arguments import by_name, shallow

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
