from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from probe.counterfactual.conditions import Condition, find_conditions
from probe.sites.facts import ModelFacts
from probe.sites.reference import INPUT_ONLY, AudioRoles

pytestmark = pytest.mark.pure  # of torch and probe alone: the same with every transformers

BOOKS = 3
LISTENER = ModelFacts("Any", "any", False, 32, 0, (("audio_token_id", 7),), (7,), 1)
SPEAKER = ModelFacts("Any", "any", False, 32, BOOKS, (("audio_token_id", 7),), (7,), 1)
SPEAKS = AudioRoles(predicts=True, codebooks=BOOKS)
FEATURES = torch.zeros(2, 8, 30)
CODES = torch.zeros(2, 5, BOOKS, dtype=torch.long)


def found(inputs: dict[str, Any], *named: str, facts: ModelFacts = LISTENER, roles: AudioRoles = INPUT_ONLY) -> tuple[Condition, ...] | str:
    return find_conditions(inputs, facts=facts, roles=roles, named=named)


@pytest.mark.parametrize(
    ("name", "tensor", "kind"),
    [
        ("input_features", FEATURES, "features"),
        ("audio_features", FEATURES.bfloat16(), "features"),
        ("input_features", torch.zeros(2, 3, 8, 30), "features"),
        ("input_values", torch.zeros(2, 400), "waveform"),
        ("input_values", torch.zeros(2, 1, 400), "waveform"),
    ],
)
def test_audio_features(name: str, tensor: Tensor, kind: Any) -> None:
    """What feeds an audio encoder is found by name, dtype and shape."""
    assert found({"input_ids": torch.zeros(2, 4, dtype=torch.long), name: tensor}) == (Condition(name, kind),)


def test_nothing_to_find() -> None:
    """Without audio the reason names what was looked for; features of no clip say their shape."""
    reason = found({"input_ids": torch.zeros(2, 4, dtype=torch.long)})
    assert isinstance(reason, str)
    assert "input_features" in reason
    reason = found({"audio_features": torch.zeros(0, 8, 30)})
    assert isinstance(reason, str)
    assert "no clip" in reason
    assert "(0, 8, 30)" in reason


def test_a_waveform_into_a_model_that_predicts_audio_has_to_be_named() -> None:
    """Such a model may make its labels of it; log-mel features cannot be its target, and what the user names counts."""
    inputs = {"input_values": torch.zeros(2, 1, 400)}
    reason = found(inputs, facts=SPEAKER, roles=SPEAKS)
    assert isinstance(reason, str)
    assert "may hold the target" in reason
    assert found(inputs, "input_values", facts=SPEAKER, roles=SPEAKS) == (Condition("input_values", "waveform"),)
    assert found({"input_features": FEATURES}, facts=SPEAKER, roles=SPEAKS) == (Condition("input_features", "features"),)


def test_reference_codes() -> None:
    """Codes of reference and target are found where labels or ids tell them apart; without either the reason says so."""
    codes = {"audio_input_ids": CODES, "audio_input_ids_mask": torch.ones(2, 5, dtype=torch.bool)}
    labelled = codes | {"audio_labels": CODES - 100}
    assert found(labelled, facts=SPEAKER, roles=SPEAKS) == (Condition("audio_input_ids", "codes"),)
    reason = found(codes, facts=SPEAKER, roles=SPEAKS)
    assert isinstance(reason, str)
    assert "no audio labels" in reason
    by_ids = AudioRoles(predicts=True, given=frozenset({7}), codebooks=BOOKS)
    assert found(codes, facts=SPEAKER, roles=by_ids) == (Condition("audio_input_ids", "codes"),)
    assert found(codes, facts=SPEAKER, roles=AudioRoles(predicts=False, codebooks=BOOKS)) == (Condition("audio_input_ids", "codes"),)


def test_features_come_before_codes_that_may_be_targets() -> None:
    """A model with an encoder is conditioned on its features; codes join them only where their name says that they are given."""
    inputs = {"audio_features": FEATURES, "audio_input_ids": CODES, "audio_labels": CODES}
    assert found(inputs, facts=SPEAKER, roles=SPEAKS) == (Condition("audio_features", "features"),)
    joined = {"audio_in_ids": torch.zeros(BOOKS, 9, dtype=torch.long), "audio_out_ids": torch.zeros(BOOKS, 9, dtype=torch.long)}
    both = (Condition("audio_features", "features"), Condition("audio_in_ids", "codes"))
    assert found({"audio_features": FEATURES, **joined}, facts=SPEAKER, roles=SPEAKS) == both
    assert found(joined, facts=SPEAKER, roles=SPEAKS) == both[1:]
    none = {"audio_features": FEATURES, "audio_in_ids": torch.zeros(BOOKS, 0, dtype=torch.long)}
    assert found(none, facts=SPEAKER, roles=SPEAKS) == both[:1]


def test_targets_are_never_conditions() -> None:
    """Codes that are to be predicted are not found, and they and labels are refused by name."""
    inputs = {"audio_out_ids": torch.zeros(BOOKS, 9, dtype=torch.long), "label_audio_ids": torch.zeros(BOOKS, 9, dtype=torch.long)}
    reason = found(inputs, facts=SPEAKER, roles=SPEAKS)
    assert isinstance(reason, str)
    assert "no codes of given audio" in reason
    for name in inputs:
        refused = found(inputs, name, facts=SPEAKER, roles=SPEAKS)
        assert isinstance(refused, str)
        assert "to predict" in refused


def test_named_inputs() -> None:
    """What the user named is all that counts, in that order; rows of numbers by an unknown name have no time."""
    inputs = {"input_features": FEATURES, "speaker": torch.zeros(2, 16), "voice_codes": torch.zeros(2, 9, dtype=torch.int32), "n": 3}
    assert found(inputs, "voice_codes", "speaker") == (Condition("voice_codes", "codes"), Condition("speaker", "features"))
    assert found({"input_values": torch.zeros(2, 16)}, "input_values") == (Condition("input_values", "waveform"),)
    for name in ("absent", "n"):
        reason = found(inputs, name)
        assert isinstance(reason, str)
        assert f"'{name}'" in reason
        assert "voice_codes" in reason
    for wrong in (torch.zeros(4), torch.zeros(2, 0), torch.zeros(2, 3, dtype=torch.complex64)):
        reason = found({"x": wrong}, "x")
        assert isinstance(reason, str)
        assert "none of audio" in reason
