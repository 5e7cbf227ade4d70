"""Numbers, shapes and shortened texts as a person reads them; one function a kind."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence

MISSING = "-"

_ROUNDING = 1e-4  # per cent: what probabilities in single precision miss of their sum

_SCALES = ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k"))
_REPEATED = re.compile(r"(<[^<>\s]{1,40}>|\[[^\[\]\s]{1,40}\])\1{3,}")


def number(value: float | None) -> str:
    """Four significant digits; whole numbers below a million in full; "-" for ``None``."""
    if value is None:
        return MISSING
    if not math.isfinite(value):
        return "NaN" if math.isnan(value) else f"{'-' if value < 0 else ''}Inf"
    if value == int(value) and abs(value) < 1e6:
        return f"{int(value):,}"
    return f"{value:.3g}" if not 1e-3 <= abs(value) < 1e6 else f"{value:.4g}" if abs(value) < 1e4 else f"{value:,.0f}"


def fixed(value: float | None, digits: int = 3) -> str:
    """A fixed number of digits after the point, so that columns line up; "-" for ``None``."""
    return MISSING if value is None else f"{value:.{digits}f}"


def share(value: float | None) -> str:
    """A share as a percentage. 0 % and 100 % mean that, up to rounding in the sums: what is only near them gets the digits to say so."""
    if value is None:
        return MISSING
    percent = 100.0 * value
    if percent == 0.0 or abs(percent - 100.0) < _ROUNDING:
        return f"{percent:.0f} %"
    if 0.0 < percent < 0.1:
        return f"{percent:.2g} %"
    if 99.9 < percent < 100.0:
        return f"{math.floor(percent * 1000) / 1000:.3f} %"
    return f"{percent:.1f} %"


def counted(value: int, noun: str) -> str:
    """A count with its noun: "1 clip", "1,024 clips"; a noun in "-s", "-x" or "-ch" takes "-es"."""
    plural = "es" if noun.endswith(("s", "x", "ch")) else "s"
    return f"{value:,} {noun}{'' if value == 1 else plural}"


def scaled(value: int) -> str:
    """A large count in three digits: "244 M", "1.54 B"."""
    for size, letter in _SCALES:
        if value >= 0.9995 * size:  # else it would round up to 1e+03 of the next smaller
            return f"{value / size:.3g} {letter}"
    return str(value)


def shape(sizes: Sequence[int]) -> str:
    """A shape as PyTorch prints it."""
    return f"[{', '.join(map(str, sizes))}]"


def dtype(name: str) -> str:
    """A dtype without "torch."."""
    return name.removeprefix("torch.")


def interval(low: float | None, high: float | None) -> str:
    """A range "low … high", one value where both are equal, "-" where neither is known."""
    if low is None and high is None:
        return MISSING
    return number(low) if low == high else f"{number(low)} … {number(high)}"


def span(values: Iterable[int], noun: str) -> str:
    """The range of some counts with their noun: "1 head", "4 … 12 heads"; "no heads" for none."""
    kept = sorted(set(values))
    if not kept:
        return f"no {noun}s"
    return counted(kept[0], noun) if len(kept) == 1 else f"{kept[0]:,} … {kept[-1]:,} {noun}s"


def ids(values: Sequence[int], limit: int) -> str:
    """Token ids, the first ``limit`` of them."""
    return ", ".join(map(str, values[:limit])) + (", …" if len(values) > limit else "")


def passage(text: str, limit: int) -> str:
    """A decoded text short enough to read: four or more equal special tokens in a row become one with its count, a long middle "[…]"."""
    short = _REPEATED.sub(lambda match: f"{match[1]} ({len(match[0]) // len(match[1])} times) ", text)
    short = short.strip(" ")
    if len(short) <= limit:
        return short
    half = limit // 2
    return f"{short[:half]} […{len(short) - 2 * half:,} characters…] {short[-half:]}"
