"""A small voice synthesiser in NumPy: spells a text aloud, so that there is speech with a known text where none can be had.

Source and filter: a pulse train with the pitch of the speaker (voice) and white noise (breath, hiss) are shaped, every 8 ms, by the
resonances of a vocal tract. Each letter, and each of a few pairs such as "sh" and "ee", is one sound; English spelling rules are not
known. It is no pleasure to listen to, but what it says can be read off its spectrogram, which is what a speech model does.

Shapes: N samples, F frames, K frequency bins.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

SAMPLE_RATE = 16_000
_FRAME = 512
_HOP = 128
_FFT = 1024

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Speaker:
    """A voice.

    Attributes:
        name: What to call it.
        pitch_hz: Fundamental frequency in Hz, about 80 (a low voice) to 300 (a child's). It falls from 106 % to 94 % of this in the
            course of a clip; the mean is this value.
        tract: Factor on all resonances: 1 for a vocal tract of 17 cm, more for a shorter one.
        tempo: Factor on the speed of speaking.
        breath: Share of noise in the voice, 0 to 1.
    """

    name: str
    pitch_hz: float
    tract: float = 1.0
    tempo: float = 1.0
    breath: float = 0.02


SPEAKERS = (
    Speaker("Ada", pitch_hz=210.0, tract=1.16, tempo=1.05),
    Speaker("Bruno", pitch_hz=98.0, tract=0.95, tempo=0.95),
    Speaker("Clara", pitch_hz=178.0, tract=1.10, tempo=1.15, breath=0.06),
    Speaker("Dario", pitch_hz=122.0, tract=1.00, tempo=1.10),
    Speaker("Emmi", pitch_hz=262.0, tract=1.26, tempo=1.00, breath=0.04),
    Speaker("Fritz", pitch_hz=140.0, tract=1.04, tempo=0.90, breath=0.08),
)


@dataclass(frozen=True, slots=True)
class _Sound:
    """One sound: length in ms, level of voice and of noise, three resonances in Hz, centre and width of the noise in Hz."""

    ms: float
    voice: float = 0.0
    noise: float = 0.0
    resonances: tuple[float, float, float] = (500.0, 1500.0, 2500.0)
    centre: float = 2500.0
    width: float = 2000.0


def _vowel(first: float, second: float, third: float, ms: float = 110.0) -> tuple[_Sound, ...]:
    return (_Sound(ms, voice=1.0, resonances=(first, second, third)),)


def _sonorant(first: float, second: float, third: float) -> tuple[_Sound, ...]:
    return (_Sound(70.0, voice=0.35, resonances=(first, second, third)),)


def _fricative(centre: float, width: float, noise: float, voice: float = 0.0) -> tuple[_Sound, ...]:
    return (_Sound(90.0, voice=voice, noise=noise, resonances=(300.0, 1500.0, 2600.0), centre=centre, width=width),)


def _stop(centre: float, width: float, voice: float = 0.0) -> tuple[_Sound, ...]:
    closure = _Sound(50.0, voice=voice, resonances=(250.0, 1200.0, 2400.0))
    return (closure, _Sound(25.0, voice=voice, noise=0.5, resonances=(350.0, 1500.0, 2500.0), centre=centre, width=width))


# Resonances of vowels: the averages for men in G. E. Peterson and H. L. Barney, "Control methods used in a study of the vowels" (1952).
# Those of l, r, w and y: D. H. Klatt, "Software for a cascade/parallel formant synthesizer" (1980), table II. The rest is our choice.
_SOUNDS: dict[str, tuple[_Sound, ...]] = {
    "a": _vowel(730, 1090, 2440),
    "e": _vowel(530, 1840, 2480),
    "i": _vowel(390, 1990, 2550),
    "o": _vowel(570, 840, 2410),
    "u": _vowel(640, 1190, 2390),
    "ee": _vowel(270, 2290, 3010, ms=150.0),
    "oo": _vowel(300, 870, 2240, ms=150.0),
    "l": _sonorant(310, 1050, 2880),
    "m": _sonorant(270, 1000, 2200),
    "n": _sonorant(270, 1600, 2600),
    "r": _sonorant(310, 1060, 1380),
    "w": _sonorant(290, 610, 2150),
    "y": _sonorant(260, 2070, 3020),
    "f": _fricative(4500, 6000, 0.10),
    "h": _fricative(1200, 2200, 0.12),
    "s": _fricative(5800, 1800, 0.30),
    "sh": _fricative(2900, 1500, 0.30),
    "th": _fricative(6500, 3000, 0.08),
    "v": _fricative(4500, 6000, 0.05, voice=0.25),
    "z": _fricative(5800, 1800, 0.18, voice=0.20),
    "b": _stop(700, 900, voice=0.12),
    "d": _stop(4000, 2000, voice=0.12),
    "g": _stop(1900, 900, voice=0.12),
    "k": _stop(1900, 900),
    "p": _stop(700, 900),
    "t": _stop(4200, 2000),
    " ": (_Sound(80.0),),
}
_SOUNDS |= {
    "c": _SOUNDS["k"],
    "q": _SOUNDS["k"],
    "x": _SOUNDS["k"] + _SOUNDS["s"],
    "j": _SOUNDS["d"] + _fricative(2900, 1500, 0.15, voice=0.2),
    "ch": _SOUNDS["t"] + _SOUNDS["sh"],
}


def speak(text: str, speaker: Speaker, *, seed: int = 0) -> NDArray[np.float32]:
    """Return ``text`` as ``speaker`` says it: (N,) float32 at 16 kHz, within [-1, 1], the same for the same arguments.

    Args:
        text: Letters a to z in either case. Anything else is a pause.
        speaker: Who speaks.
        seed: Varies the noise, the level and the exact lengths, as two readings of one text vary.

    Raises:
        ValueError: if no letter is left to say.
    """
    sounds = _spell(text)
    if not any(sound.voice or sound.noise for sound in sounds):
        raise ValueError(f"nothing to say in {text!r}: the synthesiser knows the letters a to z")
    # crc32 and not hash(): the latter differs from process to process.
    rng = np.random.default_rng([seed, zlib.crc32(text.encode()), zlib.crc32(speaker.name.encode())])
    tracks_FC = _tracks([_Sound(100.0), *sounds, _Sound(100.0)], speaker, rng)
    samples = len(tracks_FC) * _HOP
    voice_N = _pulses(samples, speaker) + speaker.breath * rng.standard_normal(samples)
    noise_N = rng.standard_normal(samples)
    level, hiss, resonances_FR, centre, width = tracks_FC[:, 0], tracks_FC[:, 1], tracks_FC[:, 2:5], tracks_FC[:, 5], tracks_FC[:, 6]
    wave_N = _shape(voice_N, level[:, None] * _resonator_bank(resonances_FR * speaker.tract))
    wave_N += _shape(noise_N, hiss[:, None] * _band(centre * speaker.tract, width))
    peak = 0.3 + 0.6 * rng.random()
    return np.asarray(wave_N * (peak / np.abs(wave_N).max()), dtype=np.float32)


def _spell(text: str) -> list[_Sound]:
    """Split the text into sounds: the longest known piece first."""
    sounds: list[_Sound] = []
    letters = text.lower()
    at = 0
    while at < len(letters):
        piece = letters[at : at + 2] if letters[at : at + 2] in _SOUNDS else letters[at]
        sounds.extend(_SOUNDS.get(piece, _SOUNDS[" "]))
        at += len(piece)
    return sounds


def _tracks(sounds: list[_Sound], speaker: Speaker, rng: np.random.Generator) -> Floats:
    """Return, for every frame, the level of voice and noise, three resonances, and centre and width of the noise: (F, 7).

    The values glide from sound to sound within about 30 ms, as the mouth does.
    """
    values = np.array([(sound.voice, sound.noise, *sound.resonances, sound.centre, sound.width) for sound in sounds])
    ms = np.array([sound.ms for sound in sounds]) / speaker.tempo * rng.uniform(0.9, 1.1, len(sounds))
    tracks_FC = np.repeat(values, np.maximum(1, np.round(ms * SAMPLE_RATE / 1000 / _HOP).astype(int)), axis=0)
    kernel = np.hanning(6)[1:-1] / np.hanning(6).sum()
    padded = np.pad(tracks_FC, ((2, 1), (0, 0)), mode="edge")
    return np.stack([np.convolve(column, kernel, mode="valid") for column in padded.T], axis=1)


def _pulses(samples: int, speaker: Speaker) -> Floats:
    """Return the voice before the vocal tract: all harmonics below half the sample rate at one level, (N,), of unit power.

    The sum of K cosines in closed form (the Dirichlet kernel), so nothing is aliased:
    sum over k = 1 … K of cos(k x) = sin((K + 1/2) x) / (2 sin(x / 2)) - 1/2.
    """
    pitch_N = speaker.pitch_hz * np.linspace(1.06, 0.94, samples)
    phase_N = np.mod(2 * np.pi * np.cumsum(pitch_N) / SAMPLE_RATE, 2 * np.pi)
    harmonics = int(SAMPLE_RATE / 2 / pitch_N.max())
    below_N = 2 * np.sin(phase_N / 2)
    at_pulse = np.abs(below_N) < 1e-6
    kernel_N = np.where(at_pulse, harmonics + 0.5, np.sin((harmonics + 0.5) * phase_N) / np.where(at_pulse, 1.0, below_N))
    return np.asarray((kernel_N - 0.5) / np.sqrt(harmonics / 2))


def _resonator_bank(resonances_FR: Floats) -> NDArray[np.complex128]:
    """Return the frequency response of resonators one after another, with the fall of the glottal source: (F, K).

    Source of the resonator: D. H. Klatt (1980), equations 1 and 2; its bandwidths are set to 60, 90 and 150 Hz, and a fixed fourth
    resonance of 3500 Hz is added.
    """
    hertz_K = np.fft.rfftfreq(_FFT, 1 / SAMPLE_RATE)
    z_K = np.exp(-2j * np.pi * hertz_K / SAMPLE_RATE)
    fall_K = 1.0 / (1.0 + hertz_K / 300.0)
    response_FK = np.broadcast_to(fall_K.astype(np.complex128), (len(resonances_FR), len(hertz_K))).copy()
    fixed_F1 = np.full((len(resonances_FR), 1), 3500.0)
    for frequency_F, bandwidth in zip(np.concatenate([resonances_FR, fixed_F1], axis=1).T, (60.0, 90.0, 150.0, 250.0), strict=True):
        radius = np.exp(-np.pi * bandwidth / SAMPLE_RATE)
        b_F = 2 * radius * np.cos(2 * np.pi * frequency_F / SAMPLE_RATE)
        c = -(radius**2)
        response_FK *= (1 - b_F - c)[:, None] / (1 - b_F[:, None] * z_K - c * z_K**2)
    return response_FK


def _band(centre_F: Floats, width_F: Floats) -> Floats:
    """Return a bell-shaped pass band: (F, K), 1 at the centre."""
    hertz_K = np.fft.rfftfreq(_FFT, 1 / SAMPLE_RATE)
    return np.asarray(np.exp(-(((hertz_K - centre_F[:, None]) / width_F[:, None]) ** 2)))


def _shape(wave_N: Floats, response_FK: NDArray[np.complex128] | Floats) -> Floats:
    """Filter a signal with a response that changes every frame: overlapping windows, multiplied in frequency, added up again, (N,)."""
    frames = len(response_FK)
    padded = np.pad(wave_N, (_FRAME // 2, _FRAME))
    window = np.hanning(_FRAME + 1)[:-1] / (_FRAME / _HOP / 2)
    index_FW = np.arange(frames)[:, None] * _HOP + np.arange(_FRAME)
    shaped_FW = np.fft.irfft(np.fft.rfft(padded[index_FW] * window, _FFT) * response_FK, _FFT)
    out = np.zeros(frames * _HOP + _FFT)
    for frame, piece in enumerate(shaped_FW):
        out[frame * _HOP : frame * _HOP + _FFT] += piece
    return out[_FRAME // 2 : _FRAME // 2 + frames * _HOP]
