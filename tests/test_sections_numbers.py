"""Numbers as a person reads them."""

from __future__ import annotations

import math
import random

import pytest

from probe.sections import numbers

pytestmark = pytest.mark.pure  # of torch and probe alone: the same with every transformers


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "-"), (0.0, "0"), (-0.0, "0"), (3.0, "3"), (-12345.0, "-12,345"), (1e-5, "1e-05"), (0.00132, "0.00132"), (4.5871, "4.587"),
        (123.456, "123.5"), (20103.5, "20,104"), (1_234_567.0, "1.23e+06"), (-2.5e-7, "-2.5e-07"), (math.nan, "NaN"), (-math.inf, "-Inf"),
    ],
)  # fmt: skip
def test_number(value: float | None, text: str) -> None:
    """Four digits that matter, whole numbers in full, no unknown shown as a number."""
    assert numbers.number(value) == text


def test_number_is_close_to_the_value() -> None:
    """What is shown is within one part in two hundred of the value, over 24 orders of magnitude."""
    rng = random.Random(1)
    for _ in range(2000):
        value = rng.choice((-1, 1)) * 10 ** rng.uniform(-12, 12)
        assert math.isclose(float(numbers.number(value).replace(",", "")), value, rel_tol=5e-3)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "-"),
        (0.0, "0 %"),
        (1.0, "100 %"),
        (0.2317, "23.2 %"),
        (0.0004, "0.04 %"),
        (0.99999, "99.999 %"),
        (1 - 1e-7, "100 %"),
        (1 + 1e-7, "100 %"),
        (1 - 2e-6, "99.999 %"),
        (1e-7, "1e-05 %"),
    ],
)
def test_share(value: float | None, text: str) -> None:
    """0 % and 100 % mean exactly none and all."""
    assert numbers.share(value) == text


def test_counts() -> None:
    """Nouns agree with their numbers, large counts keep three digits, ranges collapse."""
    assert numbers.counted(1, "micro-batch") == "1 micro-batch"
    assert numbers.counted(1200, "micro-batch") == "1,200 micro-batches"
    assert numbers.counted(0, "clip") == "0 clips"
    assert [numbers.scaled(value) for value in (999, 1000, 8_208_384, 1_543_714_304)] == ["999", "1 k", "8.21 M", "1.54 B"]
    assert numbers.scaled(999_999) == "1 M"
    assert numbers.span([4, 12, 4], "head") == "4 … 12 heads"
    assert numbers.span([1, 1], "call") == "1 call"
    assert numbers.span([], "head") == "no heads"
    assert numbers.interval(1.0, 1.0) == "1"
    assert numbers.interval(None, None) == "-"
    assert numbers.shape(()) == "[]"
    assert numbers.ids((1, 2, 3), 2) == "1, 2, …"
    assert numbers.fixed(0.5) == "0.500"


def test_passage_keeps_what_it_can() -> None:
    """Short text is untouched; four equal special tokens become one with its count, three do not; a long middle is counted."""
    assert numbers.passage("a [b] <c>", 100) == "a [b] <c>"
    assert numbers.passage("<p><p><p>x", 100) == "<p><p><p>x"
    assert numbers.passage("a<p><p><p><p>x[PAD][PAD][PAD][PAD][PAD]", 100) == "a<p> (4 times) x[PAD] (5 times)"
    assert numbers.passage("hahahahahaha", 100) == "hahahahahaha"
    text = "".join(chr(97 + index % 26) for index in range(1000))
    short = numbers.passage(text, 100)
    assert short == f"{text[:50]} […900 characters…] {text[-50:]}"
