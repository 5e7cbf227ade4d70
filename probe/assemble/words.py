"""The word error rate of one text against another; the only user of jiwer, which is optional."""

from __future__ import annotations

from importlib.util import find_spec

NO_JIWER = "install jiwer (pip install trainer-probe[wer])"


def can_compare_words() -> bool:
    """Tell whether jiwer is installed."""
    return find_spec("jiwer") is not None


def word_error_rate(target: str, predicted: str) -> float | None:
    """Return substituted, inserted and deleted words ÷ words of the target (may be above 1); ``None`` if the target has no word.

    Words are what stands between spaces, with case and punctuation as they are. Source: jiwer.wer.

    Raises:
        ImportError: jiwer is not installed.
    """
    import jiwer

    return float(jiwer.wer(target, predicted)) if target.split() else None
