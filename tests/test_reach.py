from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from probe.counterfactual.conditions import Condition
from probe.counterfactual.interventions import intervene
from probe.counterfactual.reach import reached_samples
from probe.sites.facts import ModelFacts
from probe.sites.reference import INPUT_ONLY, AudioRoles
from waiting import NoWaiting

pytestmark = pytest.mark.pure  # of torch and probe alone: the same with every transformers

PLACE, BOOKS = 7, 2
FACTS = ModelFacts("Any", "any", False, 32, BOOKS, (("audio_token_id", PLACE),), (PLACE,), 1)
FEATURES = (Condition("input_features", "features"),)


def ids(*counts: int) -> Tensor:
    return torch.tensor([[1] + [PLACE] * count + [1] * (8 - count) for count in counts])


def noise(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def reached(what: Any, inputs: dict[str, Any], conditions: Any = FEATURES, roles: AudioRoles = INPUT_ONLY) -> list[bool] | None:
    replaced = intervene(what, inputs, conditions, facts=FACTS, roles=roles)
    assert not isinstance(replaced, str)
    with NoWaiting():
        found = reached_samples(inputs, replaced, conditions, facts=FACTS, roles=roles)
    return None if found is None else found.tolist()


def test_samples_without_audio_are_not_reached() -> None:
    """Of a batch that is partly text, only the samples that own a clip are; two clips reach one sample."""
    inputs = {"input_ids": ids(2, 0, 1), "input_features": noise(0, 3, 4, 20)}
    for what in ("swap", "silence", "reverse"):
        assert reached(what, inputs) == [True, False, True]


def test_samples_without_a_donor_are_not_reached() -> None:
    """Where all clips are the same nothing was swapped; silence reaches them all but the one that is silent already."""
    same = noise(0, 1, 4, 20).clamp(-1, 0.5).repeat(3, 1, 1)
    assert reached("swap", {"input_features": same}) == [False] * 3
    same[1] = -1.5
    assert reached("silence", {"input_features": same}) == [True, False, True]
    assert reached("swap", {"input_features": same}) == [True] * 3


def test_joined_codes_reach_the_sample_of_their_segment() -> None:
    """A change in one segment is not that of its neighbours in the same tensor; any of several conditions will do."""
    inputs = {"input_ids": ids(1, 0, 1, 1), "audio_in_ids": torch.tensor([[1, 2, 3, 4, 4, 4], [1, 2, 3, 4, 4, 4]])}
    inputs["audio_in_ids_start"] = torch.tensor([0, 3, 5])
    codes = (Condition("audio_in_ids", "codes"),)
    assert reached("reverse", inputs, codes) == [True, False, False, False]
    inputs["input_features"] = torch.zeros(3, 4, 20)
    inputs["input_features"][2, :, 3:] = noise(1, 4, 17)
    assert reached("reverse", inputs, (*FEATURES, *codes)) == [True, False, False, True]


def test_reference_codes() -> None:
    """A sample that holds a target only is not reached."""
    frames = {"audio_input_ids": torch.arange(24).view(3, 4, BOOKS), "audio_input_ids_mask": torch.ones(3, 4)}
    labels = torch.full((3, 4, BOOKS), -100)
    labels[1] = 3
    inputs = {"input_ids": ids(4, 4, 4), **frames, "audio_labels": labels}
    speaks = AudioRoles(predicts=True, codebooks=BOOKS)
    assert reached("swap", inputs, (Condition("audio_input_ids", "codes"),), speaks) == [True, False, True]
    unknown = inputs | {"audio_labels": labels[:, :3]}
    assert reached_samples(unknown, frames, (Condition("audio_input_ids", "codes"),), facts=FACTS, roles=speaks) is None


def test_where_nobody_tells_all_count() -> None:
    """More clips than samples and no placeholder: any sample may have been reached."""
    assert reached("swap", {"input_ids": ids(0, 0), "input_features": noise(0, 3, 4, 20)}) == [True, True]
