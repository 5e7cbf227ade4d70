"""How a loss might have laid labels over logits: the meant way and the common slips, each summed for the loss audit."""

from __future__ import annotations

from typing import Literal, get_args

Variant = Literal["meant", "shift_less", "shift_more", "padding_out"]
"""``meant``: labels as the model's class lays them. ``shift_less`` (``shift_more``): one position less (more) of shift. ``padding_out``:
as meant, without labels at positions that are padding (hidden by the attention mask, or in the run of padding ids that ends a row)."""

VARIANTS: tuple[Variant, ...] = get_args(Variant)

SUMS = ("labelled", "cross_entropy", "uniform")
"""Over the labelled positions of a variant: their number, the cross-entropy, and the mean over the vocabulary of -log p (nats)."""

MEANS = ("micro_cross_entropy", "micro_uniform", "rank_cross_entropy", "rank_uniform")
"""Means per labelled position of a micro-batch (``micro_``) or of all micro-batches of a rank (``rank_``), summed over micro-batches or
ranks; one without a labelled position adds 0."""

COLUMNS = tuple(f"{variant}:{column}" for variant in VARIANTS for column in (*SUMS, *MEANS))
"""Columns of the audit's cell of a head or codebook."""
