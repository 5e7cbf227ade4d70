"""Finds speech with a known text: a folder given by the user, else espeak-ng, else our own synthesiser."""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

import synthesiser
import wav

LONGEST_S = 30.0
ESPEAK_VOICES = ("en-us", "en-gb", "en-us+f2", "en-gb-scotland", "en-us+m3", "en-us+f5")

_SLOTS = (
    ("open", "close", "find", "bring", "paint", "watch", "move", "hold"),
    ("the", "one", "my", "that"),
    ("red", "green", "white", "black", "small", "old", "round", "heavy"),
    ("lamp", "door", "book", "chair", "window", "box", "clock", "boat"),
    ("now", "today", "again", "tomorrow", "slowly", "at noon"),
)


@dataclass(frozen=True, slots=True)
class Clip:
    """One utterance: (N,) float32 samples at 16 kHz, what is said, and who says it."""

    samples: NDArray[np.float32]
    text: str
    speaker: str

    @property
    def seconds(self) -> float:
        """Length in seconds."""
        return len(self.samples) / wav.SAMPLE_RATE


@dataclass(frozen=True, slots=True)
class Speech:
    """Clips, and one sentence on where they come from."""

    clips: tuple[Clip, ...]
    source: str


def load_speech(folder: Path | None, *, clips: int, seed: int) -> Speech:
    """Return speech from the folder if one is given; else ``clips`` sentences spoken by espeak-ng, or by our synthesiser without it."""
    if folder is not None:
        return from_folder(folder)
    texts = sentences(clips, seed)
    return from_espeak(texts) if shutil.which("espeak-ng") else from_synthesiser(texts, seed=seed)


def sentences(count: int, seed: int) -> list[str]:
    """Return ``count`` commands such as "open the red door now", drawn at random."""
    rng = np.random.default_rng(seed)
    return [" ".join(str(rng.choice(words)) for words in _SLOTS) for _ in range(count)]


def from_folder(folder: Path) -> Speech:
    """Return every WAV file below ``folder`` that has a text file of the same name beside it, e.g. ``a/b.wav`` and ``a/b.txt``.

    Left out, and counted in the description: files without text, with an empty one, and those of more than 30 s, which Whisper would cut
    off while their text went on.

    Raises:
        ValueError: if nothing is left, or a file cannot be read.
    """
    files = sorted(path for path in folder.rglob("*") if path.suffix.lower() == ".wav")
    clips, without_text, too_long = [], 0, 0
    for path in files:
        text_file = path.with_suffix(".txt")
        text = " ".join(text_file.read_text(encoding="utf-8").split()) if text_file.is_file() else ""
        if not text:
            without_text += 1
            continue
        clip = Clip(wav.read_wav(path), text, speaker=path.parent.name)
        if clip.seconds > LONGEST_S:
            too_long += 1
            continue
        clips.append(clip)
    left_out = f"left out: {without_text} without text, {too_long} longer than {LONGEST_S:.0f} s"
    if not clips:
        raise ValueError(f"{folder}: no usable pair of NAME.wav and NAME.txt among {len(files)} WAV files ({left_out})")
    return Speech(tuple(clips), f"{len(clips)} recordings from {folder} ({left_out})")


def from_espeak(texts: Sequence[str]) -> Speech:
    """Return the texts spoken by espeak-ng, voice by voice in turn.

    Raises:
        RuntimeError: if espeak-ng fails; the message holds what it said.
    """
    clips = []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "clip.wav"
        for number, text in enumerate(texts):
            voice = ESPEAK_VOICES[number % len(ESPEAK_VOICES)]
            command = ["espeak-ng", "-v", voice, "-w", str(path), "--", text]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode != 0 or not path.is_file():
                raise RuntimeError(f"{' '.join(command)} ended with {done.returncode}: {done.stderr.strip()}")
            clips.append(Clip(wav.read_wav(path), text, voice))
            path.unlink()
    return Speech(tuple(clips), f"{len(clips)} sentences spoken by espeak-ng in {min(len(texts), len(ESPEAK_VOICES))} voices")


def from_synthesiser(texts: Sequence[str], *, seed: int) -> Speech:
    """Return the texts spoken by ``synthesiser.py``, speaker by speaker in turn."""
    speakers = synthesiser.SPEAKERS
    clips = []
    for number, text in enumerate(texts):
        speaker = speakers[number % len(speakers)]
        clips.append(Clip(synthesiser.speak(text, speaker, seed=seed + number), text, speaker.name))
    voices = min(len(texts), len(speakers))
    return Speech(tuple(clips), f"{len(clips)} sentences from our own synthesiser in {voices} voices (espeak-ng is not installed)")
