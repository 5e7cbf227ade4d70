"""The demo's voice synthesiser: pitch, speakers, repeatability and range, measured without its own code."""

from __future__ import annotations

import itertools
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from synthesiser import SPEAKERS, Speaker, speak

pytestmark = pytest.mark.pure  # of torch and probe alone: the same with every transformers

RATE = 16_000
WINDOW = 1024


def measured_pitch_hz(samples: NDArray[np.float32]) -> float:
    """Return the median fundamental frequency over the voiced windows, by normalised autocorrelation between 60 and 400 Hz."""
    longest, shortest = RATE // 60, RATE // 400
    loud = 0.1 * np.abs(samples).max()
    pitches = []
    for start in range(0, len(samples) - WINDOW - longest, WINDOW // 2):
        piece = samples[start : start + WINDOW + longest].astype(np.float64)
        if np.sqrt(np.mean(piece**2)) < loud:
            continue
        head = piece[:WINDOW]
        later = np.lib.stride_tricks.sliding_window_view(piece, WINDOW)[:longest]
        match = later @ head / (np.linalg.norm(head) * np.linalg.norm(later, axis=1))
        # The first peak that is nearly as high as the highest: a multiple of the period matches as well as the period itself.
        peaks = [n for n in range(shortest, longest - 1) if match[n] >= match[n - 1] and match[n] >= match[n + 1]]
        peaks = [n for n in peaks if match[n] > 0.9 * match[shortest:].max()]
        if peaks and match[peaks[0]] > 0.5:
            pitches.append(RATE / peaks[0])
    assert len(pitches) >= 5, "too few voiced windows"
    return float(np.median(pitches))


def spectrum(samples: NDArray[np.float32]) -> NDArray[np.float64]:
    """Return the long-term spectrum in bands of about a third of an octave, in dB, its mean taken out."""
    power = np.abs(np.fft.rfft(samples.astype(np.float64))) ** 2
    hertz = np.fft.rfftfreq(len(samples), 1 / RATE)
    edges = np.geomspace(200, 7000, 17)
    bands = np.array([power[(hertz >= low) & (hertz < high)].mean() for low, high in itertools.pairwise(edges)])
    decibels = 10 * np.log10(bands)
    return np.asarray(decibels - decibels.mean())


@pytest.mark.parametrize("speaker", SPEAKERS, ids=lambda speaker: speaker.name)
def test_the_pitch_is_the_speakers(speaker: Speaker) -> None:
    """The fundamental frequency is within 5 % of what the speaker's entry says."""
    assert measured_pitch_hz(speak("an owl in a mellow arena", speaker)) == pytest.approx(speaker.pitch_hz, rel=0.05)


@pytest.mark.parametrize("pitch_hz", [85.0, 130.0, 300.0])
def test_the_pitch_follows_any_value(pitch_hz: float) -> None:
    """Speakers that are not in the table get their pitch, too."""
    speaker = Speaker("someone", pitch_hz=pitch_hz)
    assert measured_pitch_hz(speak("an owl in a mellow arena", speaker)) == pytest.approx(pitch_hz, rel=0.05)


def test_speakers_differ_in_more_than_pitch() -> None:
    """A longer vocal tract moves the resonances: at one pitch, the spectra of two speakers differ, those of two readings hardly."""
    low, high = (Speaker("x", pitch_hz=120.0, tract=tract, breath=0.0) for tract in (0.9, 1.25))
    text = "we are all on a low wall"
    readings = [spectrum(speak(text, low, seed=seed)) for seed in (1, 2)]
    other = spectrum(speak(text, high, seed=1))
    assert np.abs(other - readings[0]).mean() > 3 * np.abs(readings[1] - readings[0]).mean()


def test_every_two_speakers_sound_different() -> None:
    """No two speakers of the table give the same clip."""
    clips = [speak("open the door", speaker) for speaker in SPEAKERS]
    assert all(len(a) != len(b) or not np.allclose(a, b, atol=0.05) for a, b in itertools.combinations(clips, 2))


@pytest.mark.parametrize(
    ("text", "resonances_hz"),
    [("aaaaaa", (730, 1090, 2440)), ("e e e e", (530, 1840, 2480)), ("iiiiii", (390, 1990, 2550)), ("eeeeee", (270, 2290, 3010))],
)
@pytest.mark.parametrize("tract", [1.0, 1.2])
def test_vowels_have_their_resonances(text: str, resonances_hz: tuple[int, ...], tract: float) -> None:
    """The spectrum of a vowel peaks at its resonances, which a shorter vocal tract moves up."""
    samples = speak(text, Speaker("x", pitch_hz=80.0, tract=tract, breath=0.0)).astype(np.float64)
    power = np.abs(np.fft.rfft(samples)) ** 2
    hertz = np.fft.rfftfreq(len(samples), 1 / RATE)
    centres = np.arange(160, 4000, 20)
    level = np.array([power[np.abs(hertz - centre) < 80].mean() for centre in centres])  # 160 Hz wide: two harmonics of 80 Hz
    peaks = centres[1:-1][(level[1:-1] >= level[:-2]) & (level[1:-1] >= level[2:])]
    for resonance in resonances_hz:
        assert np.abs(peaks - resonance * tract).min() <= 80, f"no peak near {resonance * tract:.0f} Hz: {peaks}"
    assert len(peaks) <= 14, "too many peaks for the check to mean anything"


def test_hiss_is_high_and_silence_is_silent() -> None:
    """An "s" has its energy above 4 kHz, a vowel below 1.5 kHz, and a pause has none."""

    def share_above(samples: NDArray[np.float32], cut_hz: float) -> float:
        power = np.abs(np.fft.rfft(samples.astype(np.float64))) ** 2
        return float(power[np.fft.rfftfreq(len(samples), 1 / RATE) > cut_hz].sum() / power.sum())

    speaker = SPEAKERS[1]
    assert share_above(speak("ssss", speaker), 4000) > 0.9
    assert share_above(speak("aaaa", speaker), 1500) < 0.1
    pause = speak("a" + " " * 10 + "a", speaker)
    middle = pause[len(pause) // 2 - 1600 : len(pause) // 2 + 1600]
    assert np.abs(middle).max() < 1e-3 * np.abs(pause).max()


def test_clips_repeat_and_seeds_vary_them() -> None:
    """The same arguments give the same samples, also in another process; another seed gives another reading."""
    speaker = SPEAKERS[0]
    first = speak("find my old clock", speaker, seed=3)
    code = "import sys, synthesiser as s; sys.stdout.buffer.write(s.speak('find my old clock', s.SPEAKERS[0], seed=3).tobytes())"
    folder = Path(__file__).parents[1] / "docs" / "examples"
    other_process = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, check=True).stdout
    np.testing.assert_array_equal(first, np.frombuffer(other_process, dtype=np.float32))
    again = speak("find my old clock", speaker, seed=4)
    assert len(again) != len(first) or not np.allclose(again, first, atol=0.05)


def test_samples_are_in_range() -> None:
    """Samples are float32 in one dimension, within [-1, 1], loud enough to be heard, and as long as the text asks for."""
    texts = ["x", "the quick brown fox jumps over the lazy dog", "Grüße, 42!", "shh"]
    for seed, (text, speaker) in enumerate(itertools.product(texts, SPEAKERS)):
        samples = speak(text, speaker, seed=seed)
        assert samples.dtype == np.float32
        assert samples.ndim == 1
        assert np.isfinite(samples).all()
        assert 0.25 < np.abs(samples).max() <= 1.0
    seconds = len(speak("the quick brown fox jumps over the lazy dog", SPEAKERS[3])) / RATE
    assert 2.0 < seconds < 6.0


@pytest.mark.parametrize("text", ["", "  ", "42 !?"])
def test_nothing_to_say_is_an_error(text: str) -> None:
    """A text without a letter is refused with the text in the message."""
    with pytest.raises(ValueError, match="nothing to say"):
        speak(text, SPEAKERS[0])
