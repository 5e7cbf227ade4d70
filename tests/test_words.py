"""Word error rates: against the definition by hand, and what there is without jiwer."""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest

from probe.assemble import words


@pytest.mark.parametrize(
    ("target", "predicted", "rate"),
    [
        ("the quick brown fox", "the quick brown fox", 0.0),
        ("the quick brown fox", "the  quack brown fox ", 1 / 4),
        ("the quick brown fox", "quick brown fox jumps", 2 / 4),
        ("fox", "the quick fox", 2.0),
        ("the fox", "", 1.0),
        ("The fox.", "the fox", 1.0),
        ("", "fox", None),
        ("  ", "", None),
    ],
)
def test_word_error_rate(target: str, predicted: str, rate: float | None) -> None:
    """Substitutions, insertions and deletions over the words of the target; case and punctuation count; no word, no rate."""
    found = words.word_error_rate(target, predicted)
    assert found == (None if rate is None else pytest.approx(rate))


def test_without_jiwer(monkeypatch: pytest.MonkeyPatch) -> None:
    """That jiwer is not installed is found out without loading it; the reason says how to install it."""
    assert words.can_compare_words()
    find: Any = importlib.util.find_spec
    monkeypatch.setattr(words, "find_spec", lambda name: None if name == "jiwer" else find(name))
    assert not words.can_compare_words()
    assert "pip install trainer-probe[wer]" in words.NO_JIWER
