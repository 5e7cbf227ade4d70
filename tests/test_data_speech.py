"""Where the demo's speech comes from: a folder, espeak-ng or the synthesiser."""

from __future__ import annotations

import shutil
import wave
from pathlib import Path

import numpy as np
import pytest

import data_speech

pytestmark = pytest.mark.pure  # of torch and probe alone: the same with every transformers


def record(path: Path, seconds: float, text: str | None) -> None:
    """Write noise of that length as a 16 kHz WAV file, and the text beside it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    samples = np.random.default_rng(len(path.name)).integers(-3000, 3000, int(seconds * 16_000), dtype=np.int16)
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(16_000)
        file.writeframes(samples.tobytes())
    if text is not None:
        path.with_suffix(".txt").write_text(text, encoding="utf-8")


def test_a_folder_gives_its_recordings(tmp_path: Path) -> None:
    """Pairs are found in subfolders and in either case of the ending; what is left out is counted."""
    record(tmp_path / "anna" / "b.wav", 0.5, "Grüß  Gott\n")
    record(tmp_path / "ben" / "a.WAV", 0.25, "hello")
    record(tmp_path / "ben" / "mute.wav", 0.25, None)
    record(tmp_path / "ben" / "blank.wav", 0.25, " \n")
    record(tmp_path / "ben" / "long.wav", 30.1, "too long")
    speech = data_speech.load_speech(tmp_path, clips=99, seed=0)
    assert [(clip.text, clip.speaker, clip.seconds) for clip in speech.clips] == [("Grüß Gott", "anna", 0.5), ("hello", "ben", 0.25)]
    assert speech.source == f"2 recordings from {tmp_path} (left out: 2 without text, 1 longer than 30 s)"


def test_a_folder_without_pairs_is_an_error(tmp_path: Path) -> None:
    """The message says how many files there were and why none was used."""
    record(tmp_path / "a.wav", 0.1, None)
    with pytest.raises(ValueError, match=r"no usable pair .* among 1 WAV files \(left out: 1 without text, 0 longer than 30 s\)"):
        data_speech.from_folder(tmp_path)
    with pytest.raises(ValueError, match="among 0 WAV files"):
        data_speech.from_folder(tmp_path / "missing")


def test_without_a_folder_it_is_espeak_or_the_synthesiser(monkeypatch: pytest.MonkeyPatch) -> None:
    """espeak-ng is asked for when it is on the path; the synthesiser speaks when it is not."""
    monkeypatch.setattr(data_speech, "from_espeak", lambda texts: data_speech.Speech((), f"espeak {len(texts)}"))
    monkeypatch.setattr(shutil, "which", lambda name: "/usr/bin/espeak-ng" if name == "espeak-ng" else None)
    assert data_speech.load_speech(None, clips=3, seed=0).source == "espeak 3"
    monkeypatch.setattr(shutil, "which", lambda name: None)
    speech = data_speech.load_speech(None, clips=3, seed=0)
    assert "from our own synthesiser in 3 voices" in speech.source
    assert [clip.text for clip in speech.clips] == data_speech.sentences(3, 0)
    assert len({clip.speaker for clip in speech.clips}) == 3


def test_sentences_depend_on_the_seed_only() -> None:
    """The same seed gives the same sentences, another one others; they are not all one."""
    assert data_speech.sentences(20, 1) == data_speech.sentences(20, 1)
    assert data_speech.sentences(20, 1) != data_speech.sentences(20, 2)
    assert len(set(data_speech.sentences(50, 1))) > 40


@pytest.mark.skipif(shutil.which("espeak-ng") is None, reason="espeak-ng is not installed")
def test_espeak_speaks_in_different_voices() -> None:
    """Every voice gives audible speech of plausible length at 16 kHz, and no two voices the same."""
    speech = data_speech.from_espeak(["open the red door now"] * len(data_speech.ESPEAK_VOICES))
    assert [clip.speaker for clip in speech.clips] == list(data_speech.ESPEAK_VOICES)
    for clip in speech.clips:
        assert 0.8 < clip.seconds < 4.0
        assert 0.05 < np.abs(clip.samples).max() <= 1.0
    assert len({clip.samples.tobytes() for clip in speech.clips}) == len(speech.clips)


@pytest.mark.skipif(shutil.which("espeak-ng") is None, reason="espeak-ng is not installed")
def test_a_failing_espeak_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    """A voice that espeak-ng does not have is an error with the command and its message."""
    monkeypatch.setattr(data_speech, "ESPEAK_VOICES", ("zz-none",))
    with pytest.raises(RuntimeError, match=r"espeak-ng -v zz-none .* ended with"):
        data_speech.from_espeak(["hello"])
