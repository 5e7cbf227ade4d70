"""Neutral blocks that a section is made of; every string is plain text, as it is in the record (a sink escapes what it shows).

``tone`` says what a value is, not how it looks: "plain", "missing" (not measured, with the reason), "warning" (odd in itself: constant,
empty, not finite, never called), "critical".
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

Tone = Literal["plain", "missing", "warning", "critical"]


@dataclass(frozen=True, slots=True)
class Fact:
    """One labelled value."""

    label: str
    value: str
    tone: Tone = "plain"


@dataclass(frozen=True, slots=True)
class Facts:
    """Labelled values, one below the other."""

    rows: tuple[Fact, ...]
    title: str = ""


@dataclass(frozen=True, slots=True)
class Column:
    """The head of a column: numbers stand right-aligned, everything else left. Only a ``flexible`` column may be broken into lines."""

    name: str
    numeric: bool = False
    flexible: bool = False


@dataclass(frozen=True, slots=True)
class Table:
    """Rows of as many cells as there are columns. ``caption`` is what holds for all of them, ``footer`` what was left out, or ""."""

    title: str
    columns: tuple[Column, ...]
    rows: tuple[tuple[str, ...], ...]
    caption: str = ""
    footer: str = ""


@dataclass(frozen=True, slots=True)
class TokenPair:
    """A predicted token beside its target, as ids or as text; ``position`` counts labelled positions of the sample from 0."""

    position: int
    target: str
    predicted: str
    correct: bool


@dataclass(frozen=True, slots=True)
class Comparison:
    """Predicted against target tokens, in order; a jump in ``position`` is a gap. ``joined``: pieces of a text, which read on."""

    title: str
    pairs: tuple[TokenPair, ...]
    joined: bool = False


@dataclass(frozen=True, slots=True)
class Note:
    """One sentence that stands for itself."""

    text: str
    tone: Tone = "plain"


Block: TypeAlias = Facts | Table | Comparison | Note


@dataclass(frozen=True, slots=True)
class Section:
    """What one callback shows of one step."""

    title: str
    step: int
    blocks: tuple[Block, ...]
