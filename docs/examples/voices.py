"""Synthetic speakers of known pitch and formants, and short utterances that they speak: what a small voice cloner is trained on.

An utterance is five of ten sounds, one second long. What is said (the sounds) and how it is said (how long each sound lasts, how its
pitch is accented) are drawn apart from who says it (pitch and vocal tract), so that a target can be spoken in the voice of a reference
that says something else, and cannot be told from it otherwise.

Shapes: N samples, P frames of 10 ms, L sounds, R resonances.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

SAMPLE_RATE = 16_000
BEAT = 1_600
"""Samples of a beat, 100 ms: every sound lasts a whole number of beats."""
BEATS = 10
SOUNDS = "aeioumnlsh"
LENGTH = 5
"""Sounds of an utterance."""

_FRAME = 160
_FRAMES = BEATS * BEAT // _FRAME
_ACCENTS = (-2.0, 0.0, 2.0)
_HIGHEST_HZ = 7_600.0
_RAMP = (np.arange(_FRAME) + 0.5) / _FRAME

Floats = NDArray[np.float64]

# Level of voice, of noise, three resonances in Hz, centre of the noise in Hz. Vowels: the averages for men in G. E. Peterson and
# H. L. Barney, "Control methods used in a study of the vowels" (1952). The rest is our choice.
_VALUES: dict[str, tuple[float, float, float, float, float, float]] = {
    "a": (1.0, 0.0, 730.0, 1090.0, 2440.0, 2500.0),
    "e": (1.0, 0.0, 530.0, 1840.0, 2480.0, 2500.0),
    "i": (1.0, 0.0, 270.0, 2290.0, 3010.0, 2500.0),
    "o": (1.0, 0.0, 570.0, 840.0, 2410.0, 2500.0),
    "u": (1.0, 0.0, 300.0, 870.0, 2240.0, 2500.0),
    "m": (0.5, 0.0, 270.0, 1000.0, 2200.0, 2500.0),
    "n": (0.5, 0.0, 270.0, 1600.0, 2600.0, 2500.0),
    "l": (0.5, 0.0, 310.0, 1050.0, 2880.0, 2500.0),
    "s": (0.0, 0.4, 300.0, 1500.0, 2600.0, 5800.0),
    "h": (0.3, 0.4, 300.0, 1500.0, 2600.0, 2900.0),
}


@dataclass(frozen=True, slots=True)
class Voice:
    """A speaker.

    Attributes:
        pitch_hz: Fundamental frequency without accents, in Hz.
        tract: Factor on all resonances: 1 for a vocal tract of 17 cm, more for a shorter one.
    """

    pitch_hz: float
    tract: float


@dataclass(frozen=True, slots=True)
class Utterance:
    """What is said, and how.

    Attributes:
        sounds: ``LENGTH`` letters of ``SOUNDS``.
        beats: How many beats each lasts, 1 to 3; ``BEATS`` together.
        accents: By how many semitones the pitch of each is raised.
    """

    sounds: str
    beats: tuple[int, ...]
    accents: tuple[float, ...]


def random_voice(rng: np.random.Generator) -> Voice:
    """Draw a speaker: a pitch between 90 and 280 Hz (even in semitones), a vocal tract between 0.85 and 1.3, one apart from the other."""
    return Voice(pitch_hz=float(90.0 * (280.0 / 90.0) ** rng.random()), tract=float(rng.uniform(0.85, 1.3)))


def random_sounds(rng: np.random.Generator) -> str:
    """Draw what to say."""
    return "".join(SOUNDS[index] for index in rng.integers(len(SOUNDS), size=LENGTH))


def random_reading(sounds: str, rng: np.random.Generator) -> Utterance:
    """Draw how to say it: lengths and accents, each apart from the others."""
    beats = np.ones(LENGTH, dtype=int)
    while beats.sum() < BEATS:
        beats[rng.choice(np.flatnonzero(beats < 3))] += 1
    accents = tuple(float(_ACCENTS[index]) for index in rng.integers(len(_ACCENTS), size=LENGTH))
    return Utterance(sounds, tuple(int(count) for count in beats), accents)


def say(utterance: Utterance, voice: Voice, rng: np.random.Generator) -> NDArray[np.float32]:
    """Return the utterance in that voice: (16000,) float32 at 16 kHz, of peak 0.5. ``rng`` draws the noise only."""
    values_LC = np.array([_VALUES[sound] for sound in utterance.sounds])
    accents_P = _track(np.array(utterance.accents), utterance)
    resonances_PR = np.stack([_track(values_LC[:, column], utterance) for column in (2, 3, 4)], axis=1)
    pitch_P = voice.pitch_hz * 2.0 ** (accents_P / 12.0)
    wave_N = _harmonics(pitch_P, _track(values_LC[:, 0], utterance), resonances_PR * voice.tract)
    for sound in sorted(set(utterance.sounds)):
        level, centre = _VALUES[sound][1], _VALUES[sound][5] * voice.tract
        if level:
            where_P = _track(np.array([float(other == sound) for other in utterance.sounds]), utterance)
            wave_N = wave_N + _stretched(level * where_P) * _hiss(centre, rng)
    return np.asarray(0.5 * wave_N / np.abs(wave_N).max(), dtype=np.float32)


def _track(values_L: Floats, utterance: Utterance) -> Floats:
    """Return a value a sound as one a frame, (P,), gliding from sound to sound within 30 ms."""
    steps_P = np.repeat(values_L, np.array(utterance.beats) * (BEAT // _FRAME))
    return np.convolve(np.pad(steps_P, 1, mode="edge"), (0.25, 0.5, 0.25), mode="valid")


def _harmonics(pitch_P: Floats, level_P: Floats, resonances_PR: Floats) -> Floats:
    """Return the voice, (N,): the sum over k of level * A(k * pitch) * cos(k * phase), A the response of the vocal tract."""
    phase_N = 2.0 * np.pi * np.cumsum(_stretched(pitch_P)) / SAMPLE_RATE
    turn_N = np.exp(1j * phase_N).astype(np.complex64)
    each_N, wave_N = np.ones_like(turn_N), np.zeros(len(turn_N))
    for number in range(1, int(_HIGHEST_HZ / pitch_P.max()) + 1):
        each_N = each_N * turn_N
        wave_N += _stretched(level_P * _response(number * pitch_P, resonances_PR)) * each_N.real
    return wave_N


def _response(hertz_P: Floats, resonances_PR: Floats) -> Floats:
    """Return how loud a harmonic is: a falling source through one second-order resonance after another.

    Source: the magnitude of 1 / (1 - (f/F)² + j f B/F²), a resonance at F of bandwidth B, here 60, 90 and 150 Hz.
    """
    out_P = 1.0 / (1.0 + hertz_P / 300.0)
    for resonance_P, bandwidth in zip(resonances_PR.T, (60.0, 90.0, 150.0), strict=True):
        ratio_P = hertz_P / resonance_P
        out_P = out_P / np.hypot(1.0 - ratio_P**2, ratio_P * bandwidth / resonance_P)
    return out_P


def _hiss(centre_hz: float, rng: np.random.Generator) -> Floats:
    """Return white noise through a bell-shaped band, (N,)."""
    samples = _FRAMES * _FRAME
    hertz = np.fft.rfftfreq(samples, 1.0 / SAMPLE_RATE)
    band = np.exp(-(((hertz - centre_hz) / 900.0) ** 2))
    return np.fft.irfft(np.fft.rfft(rng.standard_normal(samples)) * band, samples)


def _stretched(values_P: Floats) -> Floats:
    """Return a track of frames as one of samples, (N,), linear between the middles of frames."""
    padded_P1 = np.pad(values_P, 1, mode="edge")[:, None]
    between_PF = padded_P1[:-1] * (1.0 - _RAMP) + padded_P1[1:] * _RAMP
    return between_PF.reshape(-1)[_FRAME // 2 : -_FRAME // 2]
