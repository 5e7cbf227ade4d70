"""The example voice cloner: what probe finds in it, and the verdict on it and on its broken variants."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import WhisperFeatureExtractor

import probe
from benchmarks.verdicts.__main__ import train_all
from benchmarks.verdicts.page import page
from benchmarks.verdicts.training import FULL, Outcome, Plan, train
from benchmarks.verdicts.truth import SILENCE
from benchmarks.verdicts.variants import BY_NAME, VARIANTS
from clone_voice import AUDIO_IN, AUDIO_OUT, CODEBOOKS, CloningCollator, CloningDataset, small_cloner, spoken_clips
from voice_codec import fit_codec
from voices import BEATS, SOUNDS, Utterance, Voice, random_reading, random_voice, say

SEEDS = (0, 1, 2, 3, 4)
TINY = Plan(speakers=3, texts=3, steps=8, every=1, counterfactual_every=2)


def pitch_of(wave: np.ndarray, start: int, samples: int) -> float:
    """Return the pitch of a stretch in Hz between 70 and 400, by the first peak of its autocorrelation that is nearly the highest."""
    piece = wave[start : start + samples] * np.hanning(samples)
    correlation = np.correlate(piece, piece, mode="full")[samples - 1 :]
    lags = np.arange(16_000 // 400, 16_000 // 70)
    peaks = [lag for lag in lags if correlation[lag] == correlation[lag - 2 : lag + 3].max()]
    return 16_000 / next(lag for lag in peaks if correlation[lag] > 0.8 * correlation[lags].max())


def test_a_voice_has_the_pitch_and_resonances_it_is_said_to_have() -> None:
    """Pitch is the voice's, raised by the accent; the first resonance of a vowel is the tract's factor times the table's."""
    rng = np.random.default_rng(0)
    for voice in (Voice(100.0, 1.0), Voice(180.0, 0.9), Voice(260.0, 1.2)):
        wave = say(Utterance("aaaaa", (2, 2, 2, 2, 2), (0.0, 0.0, 2.0, 2.0, -2.0)), voice, rng)
        assert (wave.shape, wave.dtype) == ((16_000,), np.float32)
        assert np.abs(wave).max() == pytest.approx(0.5)
        assert pitch_of(wave, 1_600, 3_200) == pytest.approx(voice.pitch_hz, rel=0.02)
        assert pitch_of(wave, 8_000, 3_200) == pytest.approx(voice.pitch_hz * 2 ** (2 / 12), rel=0.02)
    low = say(Utterance("aaaaa", (2,) * 5, (0.0,) * 5), Voice(60.0, 1.25), rng)
    spectrum = np.abs(np.fft.rfft(low * np.hanning(16_000)))
    peaks = np.arange(300, 1500, 60)
    assert peaks[spectrum[peaks].argmax()] == pytest.approx(730.0 * 1.25, abs=60.0)


def test_sounds_differ_and_seeds_repeat() -> None:
    """The same utterance, voice and generator give the same samples; another sound or another voice other ones."""
    one = Utterance("asmih", (2,) * 5, (0.0,) * 5)
    same = [say(one, Voice(120.0, 1.0), np.random.default_rng(4)) for _ in range(2)]
    np.testing.assert_array_equal(*same)
    for utterance, voice in (
        (Utterance("aumih", (2,) * 5, (0.0,) * 5), Voice(120.0, 1.0)),
        (one, Voice(150.0, 1.0)),
        (one, Voice(120.0, 1.2)),
    ):
        assert np.abs(say(utterance, voice, np.random.default_rng(4)) - same[0]).max() > 0.05


def test_readings_fill_the_second() -> None:
    """Every reading lasts ten beats in sounds of one to three, and voices lie within their ranges."""
    rng = np.random.default_rng(1)
    for _ in range(50):
        reading = random_reading("aeiou", rng)
        assert sum(reading.beats) == BEATS
        assert set(reading.beats) <= {1, 2, 3}
        voice = random_voice(rng)
        assert 90 <= voice.pitch_hz <= 280
        assert 0.85 <= voice.tract <= 1.3


def test_the_codec_quantises_what_is_left() -> None:
    """Each further codebook brings the sum of the entries nearer to the frames, and tokens are the nearest entries."""
    rng = np.random.default_rng(2)
    clips = [rng.standard_normal((6, 40)).astype(np.float32) for _ in range(30)]
    codec = fit_codec(clips, codebooks=3, entries=8, stride=4)
    left = np.stack([clip.astype(np.float64).reshape(6, 10, 4).mean(-1).T for clip in clips])
    errors = [np.square(left).sum()]
    for book, tokens in enumerate(np.stack([codec.encode(clip) for clip in clips]).transpose(2, 0, 1)):
        distances = np.square(left[..., None, :] - codec.entries_KVM[book]).sum(-1)
        np.testing.assert_array_equal(tokens, distances.argmin(-1))
        left = left - codec.entries_KVM[book][tokens]
        errors.append(np.square(left).sum())
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.6 * errors[0]


def test_probe_finds_its_way_in_the_cloner() -> None:
    """Encoder, projector, audio head with its codebooks and the placeholders are found without being told."""
    with probe.attach(small_cloner(0)) as p:
        roles = {site.role: site for site in p.sites if site.role != "attention"}
        assert roles["audio_encoder"].name == "audio_tower"
        assert roles["projector"].name == "projector"
        assert (roles["lm_head"].modality, roles["lm_head"].codebooks) == ("audio", CODEBOOKS)
        assert {site.kind for site in p.sites.of("attention")} == {"encoder", "joint"}


def test_reference_and_target_are_of_one_speaker_and_two_clips() -> None:
    """Every pair is of one speaker and of two readings; labels are the target's codes, features the reference's."""
    clips = spoken_clips(speakers=3, texts=3, seed=1)
    data = CloningDataset(clips)
    assert len(data) == 9 * 2
    pairs = [data[index] for index in range(len(data))]
    assert all(reference.speaker == target.speaker and reference is not target for reference, target in pairs)
    batch = CloningCollator()(pairs[:4])
    assert (batch["input_ids"] == AUDIO_IN).sum(1).tolist() == [BEATS] * 4
    for row, (reference, target) in enumerate(pairs[:4]):
        assert torch.equal(batch["input_features"][row], reference.features)
        at = batch["input_ids"][row] == AUDIO_OUT
        assert torch.equal(batch["audio_labels"][row][at], target.codes)
        assert (batch["audio_labels"][row][~at] == -100).all()
        text = batch["input_ids"][row][BEATS:-BEATS].tolist()
        assert "".join(SOUNDS[token] for token in text) == target.utterance.sounds


def test_silence_by_hand_is_what_the_extractor_gives() -> None:
    """The truth's silence is that of the feature extractor on a clip of zeros."""
    features = WhisperFeatureExtractor(chunk_length=1)(np.zeros(16_000, np.float32), sampling_rate=16_000, return_tensors="pt")
    assert (features.input_features == SILENCE).all()


@pytest.mark.parametrize("name", ["projector-silenced", "encoder-constant"])
def test_audio_that_is_cut_off_is_ignored_at_once(name: str, tmp_path: Path) -> None:
    """Where the reference cannot reach the predictions, three passes are enough, in the first steps."""
    outcome = train(name, 0, tmp_path, TINY)
    assert outcome.verdict is not None, outcome.reason
    assert outcome.verdict.use == "ignored"
    assert "last digit" in outcome.verdict.because


@pytest.mark.parametrize("name", ["healthy", "other-speaker", "target-as-reference", "projector-detached"])
def test_a_fresh_model_gets_no_verdict(name: str, tmp_path: Path) -> None:
    """In its first steps no model whose audio reaches the predictions is accused of ignoring it."""
    outcome = train(name, 0, tmp_path, TINY)
    assert outcome.verdict is None
    assert "may not have learnt" in outcome.reason


def test_a_dropped_reference_is_not_measured(tmp_path: Path) -> None:
    """Without a reference among the inputs there is no verdict, and the reason says so."""
    outcome = train("reference-dropped", 0, tmp_path, TINY)
    assert outcome.right
    assert outcome.truth is None
    assert outcome.reason


@pytest.mark.parametrize(
    ("name", "plan"),
    [
        ("healthy", Plan(speakers=24, texts=8, steps=280, every=20, counterfactual_every=20)),
        ("other-speaker", Plan(speakers=24, texts=8, steps=300, every=100, counterfactual_every=100)),
    ],
)
def test_the_verdict_is_right(name: str, plan: Plan, tmp_path: Path) -> None:
    """A cloner that learns to use its reference is said to; one whose references are of anybody, to ignore them. So says the truth."""
    outcome = train(name, 0, tmp_path, plan)
    assert outcome.right, outcome
    agrees_with_truth(outcome)


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_all_verdicts_over_all_seeds() -> None:
    """Every variant gets the right verdict on every seed, and the truth measured by hand agrees with it."""
    outcomes = train_all([(variant.name, seed) for seed in SEEDS for variant in VARIANTS], processes=2)
    assert [outcome for outcome in outcomes if not outcome.right] == []
    for outcome in outcomes:
        agrees_with_truth(outcome)
    assert f"**{len(outcomes)} of {len(outcomes)} right.**" in page(outcomes, FULL)


def agrees_with_truth(outcome: Outcome) -> None:
    """Assert that what was measured by hand after training is what the right verdict means."""
    expected, truth = BY_NAME[outcome.variant].expected, outcome.truth
    if expected is None:
        assert truth is None
        return
    assert truth is not None
    if expected == "ignored":
        assert max(abs(truth.swap), abs(truth.silence), abs(truth.reverse)) < 0.02, outcome
    else:
        assert truth.swap - 3 * truth.swap_error > 0.05, outcome
        assert (truth.reverse > truth.swap / 3) == (expected == "leaked"), outcome
