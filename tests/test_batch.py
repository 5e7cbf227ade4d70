"""Which input is what, by name and shape."""

from __future__ import annotations

import pytest
import torch

from probe.sites.batch import audio_codes, audio_features, samples_in, text_labels

pytestmark = pytest.mark.pure  # of torch and probe alone: the same with every transformers


def test_codes_need_codebooks_and_a_dimension_of_that_size() -> None:
    """Codes are recognised by a dimension as long as there are codebooks; a model without codebooks has none, whatever the shapes."""
    codes, mask = torch.zeros(2, 5, 3, dtype=torch.long), torch.ones(2, 5, dtype=torch.bool)
    inputs = {"audio_input_ids": codes, "audio_input_ids_mask": mask, "audio_in_ids": torch.zeros(4, 7, dtype=torch.long)}
    assert [(name, found is mask) for name, _, found in audio_codes(inputs, codebooks=3)] == [("audio_input_ids", True)]
    assert list(audio_codes({"audio_in_ids": torch.zeros(0, 7, dtype=torch.long)}, codebooks=0)) == []


def test_features_and_labels_are_told_by_name_and_kind() -> None:
    """Floating-point features and integer labels of the right rank are found; others of that name are not."""
    features, labels = torch.zeros(2, 4, 6), torch.zeros(2, 3, dtype=torch.long)
    assert audio_features({"input_features": features}) == ("input_features", features)
    assert audio_features({"input_features": labels}) is None
    assert text_labels({"label_ids": labels}) == ("label_ids", labels)
    assert text_labels({"labels": features}) is None
    assert samples_in({"x": "text", "input_features": features}) == 2
    assert samples_in({}) == 0
