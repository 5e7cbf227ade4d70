"""Which input of a batch is what: audio features, audio codes, token ids, labels — by the names that models and collators use."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor

AUDIO_FEATURES = ("input_features", "audio_features", "input_values", "audio_values", "speech_features", "speech")
FEATURE_MASKS = ("feature_attention_mask", "input_features_mask", "audio_feature_attention_mask")
AUDIO_CODES = ("audio_input_ids", "audio_in_ids", "audio_out_ids", "audio_codes", "codec_ids")
AUDIO_CODE_MASKS = {"audio_input_ids": "audio_input_ids_mask"}
TEXT_LABELS = ("labels", "label_ids", "shift_labels")


def audio_features(inputs: Mapping[str, Any]) -> tuple[str, Tensor] | None:
    """Return the name and tensor of the audio features, (B, mel, T) or a waveform (B, samples), floating point; else ``None``."""
    for name in AUDIO_FEATURES:
        tensor = inputs.get(name)
        if isinstance(tensor, Tensor) and tensor.is_floating_point() and tensor.dim() >= 2:
            return name, tensor
    return None


def audio_codes(inputs: Mapping[str, Any], *, codebooks: int) -> Iterator[tuple[str, Tensor, Tensor | None]]:
    """Yield name, codes and mask of each input that holds discrete audio codes, (B, F, K) or (K, n) for K codebooks."""
    for name in AUDIO_CODES if codebooks else ():
        tensor = inputs.get(name)
        if isinstance(tensor, Tensor) and not tensor.is_floating_point() and tensor.dim() >= 2 and codebooks in tensor.shape:
            mask = inputs.get(AUDIO_CODE_MASKS.get(name, ""))
            yield name, tensor, mask if isinstance(mask, Tensor) else None


def text_labels(inputs: Mapping[str, Any]) -> tuple[str, Tensor] | None:
    """Return the name and tensor of the text labels (B, S), or ``None``."""
    for name in TEXT_LABELS:
        tensor = inputs.get(name)
        if isinstance(tensor, Tensor) and not tensor.is_floating_point() and tensor.dim() == 2:
            return name, tensor
    return None


def samples_in(inputs: Mapping[str, Any]) -> int:
    """Return the number of samples in a micro-batch: the first size of the token ids, else of the audio features, else of any tensor."""
    features = audio_features(inputs)
    candidates = [inputs.get("input_ids"), features[1] if features else None, *inputs.values()]
    return next((int(t.shape[0]) for t in candidates if isinstance(t, Tensor) and t.dim() >= 1), 0)
