"""What one public metric is: name, unit, range, definition, source, and whether it enters the Trainer's own log.

A name may hold one placeholder: ``<kind>`` (of attention), ``<part>`` (of the model), ``K`` in ``codebook_K`` (from 0).
"""

from __future__ import annotations

import re
from dataclasses import dataclass

KINDS = ("cross", "joint", "decoder", "encoder")

_PLACEHOLDERS = {"<kind>": "|".join(KINDS), "<part>": "[^/]+", "codebook_K": r"codebook_\d+"}
SHARE = "0 … 1"
POSITIVE = "≥ 0"


@dataclass(frozen=True, slots=True)
class Metric:
    """One public metric.

    Attributes:
        name: The public name, perhaps with one placeholder.
        unit: What one unit of the value is ("nats per token", "share").
        range: The values that can occur, in words or as an interval.
        definition: What the number is, over what it is taken.
        source: The code, formula or paper that defines it elsewhere.
        headline: Whether it enters the Trainer's own log (at most ``catalogue.HEADLINE_LIMIT`` do).
    """

    name: str
    unit: str
    range: str
    definition: str
    source: str
    headline: bool = False

    @property
    def pattern(self) -> re.Pattern[str]:
        """A regular expression that matches the concrete names of this metric, whole."""
        expression = re.escape(self.name)
        for placeholder, choices in _PLACEHOLDERS.items():
            expression = expression.replace(re.escape(placeholder), f"(?:{choices})")
        return re.compile(expression)

    @property
    def is_pattern(self) -> bool:
        """Whether the name stands for several concrete names."""
        return any(placeholder in self.name for placeholder in _PLACEHOLDERS)
