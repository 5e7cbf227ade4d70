from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from transformers import WhisperFeatureExtractor

from models import CASES
from probe.counterfactual.conditions import Condition, find_conditions
from probe.counterfactual.interventions import WHISPER_SILENCE, intervene
from probe.sites.discovery import discover
from probe.sites.facts import ModelFacts, read_facts
from probe.sites.reference import INPUT_ONLY, audio_roles

WHISPER = ModelFacts("WhisperForConditionalGeneration", "whisper", True, 32, 0, (), (), 0)
NAMES = [name for name, case in CASES.items() if case.available()]
CONDITIONS = {
    "whisper": (Condition("input_features", "features"),),
    "qwen2_audio": (Condition("input_features", "features"),),
    "voxtral": (Condition("input_features", "features"),),
    "higgs_audio_v2": (Condition("audio_input_ids", "codes"),),
    "original": (Condition("audio_features", "features"), Condition("audio_in_ids", "codes")),
}


def batch_of(name: str, samples: int) -> tuple[Any, dict[str, Any], ModelFacts, Any]:
    case = CASES[name]
    model = case.build(0).eval()
    batch = case.collate([case.dataset(samples, 1)[index] for index in range(samples)])
    facts = read_facts(model)
    return model, {key: batch[key] for key in batch.keys()}, facts, audio_roles(facts, discover(model).sites)  # noqa: SIM118 (no mapping)


@pytest.mark.parametrize("name", NAMES)
def test_models_hear_the_change_and_nothing_else_moves(name: str) -> None:
    """Every model runs on the changed audio and answers otherwise; the losses stay finite, so all shapes and lengths still fit."""
    model, inputs, facts, roles = batch_of(name, 6)
    conditions = find_conditions(inputs, facts=facts, roles=roles)
    if name not in CONDITIONS:
        assert isinstance(conditions, str)
        return
    assert conditions == CONDITIONS[name]
    with torch.no_grad():
        plain = model(**inputs)
        for what in ("swap", "reverse", "silence"):
            changed = intervene(what, inputs, conditions, facts=facts, roles=roles)
            if isinstance(changed, str):
                assert what == "silence"
                assert "codes" in [condition.kind for condition in conditions]
                continue
            assert list(changed) == [condition.name for condition in conditions]
            other = model(**{**inputs, **changed})
            assert other.loss.isfinite()
            assert (other.logits - plain.logits).abs().max() > 1e-5
            assert other.logits.shape == plain.logits.shape


@pytest.mark.skipif("higgs_audio_v2" not in NAMES, reason="transformers has no HiggsAudioV2")
def test_higgs_targets_stay() -> None:
    """Of Higgs Audio's codes, those with a label (and all frames of the same run) are as they were; every reference changes."""
    _, inputs, facts, roles = batch_of("higgs_audio_v2", 4)
    assert facts.border_codes == (32, 33)
    for what in ("swap", "reverse"):
        changed = intervene(what, inputs, CONDITIONS["higgs_audio_v2"], facts=facts, roles=roles)
        assert not isinstance(changed, str)
        differs = (changed["audio_input_ids"] != inputs["audio_input_ids"]).any(-1)
        for sample in range(4):
            # The placeholders of a sample: a run of reference, then one of target; as many frames of codes.
            ids = inputs["input_ids"][sample]
            slots = [position for position in range(len(ids)) if int(ids[position]) in facts.audio_placeholders]
            reference = next(k for k in range(1, len(slots)) if slots[k] != slots[k - 1] + 1)
            assert differs[sample, :reference].any()
            assert not differs[sample, reference:].any()


def test_whispers_extractor_gives_the_silence() -> None:
    """Zeros through Whisper's extractor, padded, unpadded, and with its normalisation, are -1.5 to the bit in every frame."""
    extractor = WhisperFeatureExtractor()
    for arguments in ({}, {"padding": "longest"}, {"padding": "max_length", "return_attention_mask": True}, {"do_normalize": True}):
        given = extractor([np.zeros(8000), np.zeros(16000)], sampling_rate=16000, return_tensors="pt", **arguments)
        assert (given["input_features"] == WHISPER_SILENCE).all()


@pytest.mark.skipif(not hasattr(transformers, "VoxtralProcessor"), reason="transformers has no Voxtral")
def test_voxtral_gives_the_same_silence() -> None:
    """Voxtral's processor cuts the features of the same extractor into chunks."""
    holder = SimpleNamespace(feature_extractor=WhisperFeatureExtractor(feature_size=128))
    chunks = transformers.VoxtralProcessor._retrieve_input_features(
        holder,
        [np.zeros(40 * 16000)],
        3000,
        sampling_rate=16000,
        padding=True,
        pad_to_multiple_of=480000,
        truncation=False,
        return_tensors="pt",
    )
    assert chunks.shape == (2, 128, 3000)
    assert (chunks == WHISPER_SILENCE).all()


@pytest.mark.skipif(not hasattr(transformers, "VoxtralRealtimeFeatureExtractor"), reason="transformers has no Voxtral Realtime")
def test_voxtral_realtime_has_a_silence_of_its_own() -> None:
    """Its extractor fixes the maximum; what it gives for zeros is what it is silenced with, even where every clip sounds throughout."""
    extractor = transformers.VoxtralRealtimeFeatureExtractor()
    silent = extractor(np.zeros(16000), sampling_rate=16000, return_tensors="pt")["input_features"]
    assert silent.unique().tolist() == [-0.625]
    facts = ModelFacts("VoxtralRealtimeForConditionalGeneration", "voxtral_realtime", False, 32, 0, (), (), 1)
    inputs = {"input_features": torch.rand(2, 128, 100)}
    changed = intervene("silence", inputs, (Condition("input_features", "features"),), facts=facts, roles=INPUT_ONLY)
    assert not isinstance(changed, str)
    assert (changed["input_features"] == -0.625).all()


@pytest.mark.parametrize("amplitude", [1.0, 0.1, 1e-3, 1e-6])
def test_sound_is_in_whispers_range(amplitude: float) -> None:
    """From full scale down to next to nothing, and as numbers of int16, tones and noise stay within what tells Whisper's features."""
    random = np.random.default_rng(0)
    time = np.arange(16000) / 16000
    extractor = WhisperFeatureExtractor()
    clips = [amplitude * np.sin(2 * np.pi * 200 * time), amplitude * np.clip(0.3 * random.standard_normal(16000), -1, 1)]
    clips[1][9000:] = 0.0
    for scale in (1.0, 32768.0):
        features = extractor([scale * clip for clip in clips], sampling_rate=16000, return_tensors="pt")["input_features"]
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            inputs = {"input_features": features.to(dtype)}
            changed = intervene("silence", inputs, CONDITIONS["whisper"], facts=WHISPER, roles=INPUT_ONLY)
            assert not isinstance(changed, str)
            assert (changed["input_features"] == WHISPER_SILENCE).all()
