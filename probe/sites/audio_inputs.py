"""What a model's audio features should be: their scale and mel bins, which of its inputs are clips, and how many frames a clip becomes.

Shapes: C clips, M mel bins, T frames, N samples of a waveform.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Literal

from torch import Tensor, nn

from probe.measure.audio_checks import LogMelScale, first_bin_above
from probe.records import Site
from probe.sites.batch import audio_features
from probe.sites.configs import config_of, number_of
from probe.sites.encoders import is_whisper_like
from probe.sites.names import child_of

Kind = Literal["log-mel", "waveform"]

_WAVEFORMS = ("input_values", "audio_values", "speech")
# A full-scale signal of any shape in 400 samples under a Hann window holds at most 200 * 150 in power on one side of its spectrum
# (Parseval; 150 is the window's sum of squares), and no filter of up to 128 bins weighs more than 0.042: (log10(1251) + 4) / 4 = 1.774.
# Called with do_normalize=True, of which the extractor keeps no trace, it brings the waveform to unit variance first. Speech may then come
# out some 0.35 higher (measured). 16-bit integers taken for floats come out 2.26 higher.
_HIGHEST = 2.2
_MOST_BINS = 128
# Two convolutions, the second of stride 2, then pooling by 2: see ``_get_feat_extract_output_lengths`` of these models.
_BY_MASK = {
    "qwen2_audio": "feature_attention_mask",
    "qwen2_5_omni": "feature_attention_mask",
    "qwen2_5_omni_thinker": "feature_attention_mask",
    "audioflamingo3": "input_features_mask",
    "musicflamingo": "input_features_mask",
}
_EVERY_FRAME = frozenset({"voxtral"})


def audio_clips(inputs: Mapping[str, Any]) -> tuple[Kind, Tensor] | None:
    """Return the clips among the inputs: log-mel features as they came (C, M, T), or waveforms (C, N), channels side by side.

    ``None`` without audio, and for features whose layout is not known (two dimensions under a name that does not say waveform).
    """
    found = audio_features(inputs)
    if found is None:
        return None
    name, x = found
    if name in _WAVEFORMS and (x.dim() == 2 or (x.dim() == 3 and x.shape[1] <= 2)):
        return "waveform", x.flatten(1)
    return ("log-mel", x) if x.dim() == 3 else None


def first_encoder(sites: Iterable[Site], modules: Mapping[str, nn.Module]) -> nn.Module | None:
    """Return the module of the first audio encoder among the sites, ``None`` without one."""
    return next((modules[site.name] for site in sites if site.role == "audio_encoder"), None)


def mel_bins_of(encoder: nn.Module | None) -> int | None:
    """Return how many mel bins an audio encoder takes: the channels of its first convolution, else what its config says."""
    if encoder is None:
        return None
    conv = child_of(encoder, "conv1") if is_whisper_like(encoder) else None
    return number_of(conv, "in_channels") if conv is not None else number_of(config_of(encoder), "num_mel_bins", "feature_size")


def mel_bins_in(features_CMT: Tensor, encoder: nn.Module | None) -> int | None:
    """Return the mel bins of log-mel features; ``None`` where it is not known which dimension counts them.

    Encoders with Whisper's front end take (C, M, T); others may take (C, T, M).
    """
    if encoder is not None and is_whisper_like(encoder):
        return int(features_CMT.shape[1])
    expected = mel_bins_of(encoder)
    return expected if expected is not None and expected in features_CMT.shape[1:] else None


def log_mel_scale(encoder: nn.Module | None, processors: Iterable[Any]) -> LogMelScale | None:
    """Return what the model's feature extractor can give; ``None`` where it is not known to be Whisper's.

    It is if the extractor among the processors says so, or, without one, if the encoder has Whisper's front end of at most 128 bins.
    """
    bins = mel_bins_of(encoder)
    extractor = next((each for each in map(_extractor, processors) if each is not None), None)
    if extractor is None:
        known = encoder is not None and is_whisper_like(encoder) and bins is not None and 8 <= bins <= _MOST_BINS
    else:
        bins = number_of(extractor, "feature_size")
        names = {base.__name__ for base in type(extractor).__mro__}
        known = "WhisperFeatureExtractor" in names and getattr(extractor, "sampling_rate", 0) == 16_000
    if not known or bins is None or bins > _MOST_BINS:
        return None
    return LogMelScale(_HIGHEST, first_bin_above(bins))


def frames_by_mask(inputs: Mapping[str, Any], model_type: str) -> Tensor | None:
    """Return how many frames the placeholders of a micro-batch stand for by the mask of its features, 0-dim int64; no sync.

    ``None`` where the model's own rule is not known, or the mask that it takes is not there.
    """
    mask_CT = inputs.get(_BY_MASK.get(model_type, ""))
    if not isinstance(mask_CT, Tensor) or mask_CT.dim() != 2:
        return None
    lengths_C = (mask_CT != 0).sum(-1)
    return (((lengths_C - 1) // 2 + 1 - 2) // 2 + 1).sum()


def every_frame_counts(model_type: str) -> bool:
    """Tell whether a model puts every frame of its projector into the sequence, padding included."""
    return model_type in _EVERY_FRAME


def _extractor(processor: Any) -> Any | None:
    extractor = getattr(processor, "feature_extractor", processor)
    return extractor if isinstance(getattr(extractor, "sampling_rate", None), int) else None
