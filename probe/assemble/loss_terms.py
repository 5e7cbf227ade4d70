"""The loss that is expected of a step: the cross-entropies of its heads, put together by a rule that is fixed before they are known.

X = (1 - ε) · cross-entropy + ε · mean over the vocabulary of -log p, summed over the labels of one head or codebook (ε: label smoothing).

* "items": Σ over heads of weight · X ÷ the number of labels, over all ranks if the Trainer averages tokens over them, else on each rank
  by itself, averaged over ranks.
* "micro-batch": Σ over heads of weight · the mean of X ÷ labels over all micro-batches of all ranks; one without labels counts as 0.

Source: ``fixed_cross_entropy`` and ``LabelSmoother`` of transformers, ``torch.nn.CrossEntropyLoss``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import sqrt
from typing import Literal

from probe.measure.variants import Variant
from probe.records import Modality
from probe.sites.reduction import By


@dataclass(frozen=True, slots=True)
class TermSums:
    """One head or codebook: its weight in the loss and the sums of its audit's cell.

    Attributes:
        weight: As in :class:`probe.sites.reduction.Term`.
        columns: :data:`probe.measure.variants.COLUMNS`, over all micro-batches and ranks.
        counted: Its labels as this version of the Trainer counts them.
        variance: Of the summed cross-entropy, where only some rows were evaluated; else 0.
        modality: Of its tokens.
    """

    weight: float
    columns: Mapping[str, float]
    counted: float
    variance: float = 0.0
    modality: Modality = "text"

    def labelled(self, variant: Variant = "meant") -> float:
        """Return how many labels a variant lays over logits."""
        return self.columns[f"{variant}:labelled"]

    def mixed(self, variant: Variant, of: str, smoothing: float) -> float:
        """Return X for the columns ``<of>cross_entropy`` and ``<of>uniform``."""
        plain = self.columns[f"{variant}:{of}cross_entropy"]
        return plain if not smoothing else (1 - smoothing) * plain + smoothing * self.columns[f"{variant}:{of}uniform"]


@dataclass(frozen=True, slots=True)
class Expectation:
    """The numbers and the rule of one step.

    Attributes:
        terms: At least one.
        by: The rule.
        smoothing: ε.
        micro_batches: Over all ranks.
        ranks: Whose sums these are.
        averaged: The number of labels is of all ranks together.
        items: ``num_items_in_batch`` as the Trainer gave it, added up over ranks unless it is of all of them already; ``None`` without.
        auxiliary: What a declared auxiliary loss adds, as a mean over micro-batches.
    """

    terms: tuple[TermSums, ...]
    by: By
    smoothing: float = 0.0
    micro_batches: int = 1
    ranks: int = 1
    averaged: bool = False
    items: float | None = None
    auxiliary: float = 0.0

    @property
    def steps(self) -> float:
        """Micro-batches of one rank."""
        return self.micro_batches / self.ranks

    @property
    def labelled(self) -> float:
        """Labels that the loss is over, of all terms."""
        return sum(term.labelled() for term in self.terms)

    def value(
        self,
        *,
        variant: Variant = "meant",
        smoothing: float | None = None,
        by: By | None = None,
        divisor: Literal["counted", "given"] = "counted",
        without: Modality | None = None,
    ) -> float | None:
        """Return the loss by the rule, or as a slip would make it; ``None`` if there is nothing to divide by.

        Args:
            variant: How labels lie over logits.
            smoothing: Instead of ``smoothing``.
            by: Instead of ``by``.
            divisor: "given": ``num_items_in_batch`` as the Trainer gave it, instead of the labels of each term.
            without: Leaves out the terms of a modality.
        """
        epsilon = self.smoothing if smoothing is None else smoothing
        terms = tuple(term for term in self.terms if term.modality != without)
        if not any(term.labelled(variant) for term in terms):
            return None
        if (by or self.by) == "micro-batch":
            total = sum(term.weight * term.mixed(variant, "micro_", epsilon) for term in terms)
            return total / self.micro_batches + self.auxiliary
        total = 0.0
        for term in terms:
            count = self.items if divisor == "given" else term.counted if variant == "meant" else term.labelled(variant)
            if not count:
                return None
            total += term.weight * self._sum(term, variant, epsilon) / count
        return total + self.auxiliary

    def standard_error(self) -> float:
        """Return the standard error of ``value()``; 0 where every labelled row was evaluated."""
        return sqrt(
            sum(t.variance * ((1 - self.smoothing) * t.weight / t.counted) ** 2 for t in self.terms if t.counted and t.variance > 0)
        )

    def _sum(self, term: TermSums, variant: Variant, epsilon: float) -> float:
        """Return Σ X; where each rank divides by its own number, the mean of the ranks' means times all labels."""
        if self.averaged or self.ranks == 1:
            return term.mixed(variant, "", epsilon)
        return term.mixed(variant, "rank_", epsilon) / self.ranks * term.labelled(variant)
