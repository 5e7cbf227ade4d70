"""The cells of an LM head: what is added up for each head and codebook, and for the loss audit.

Shapes: L ways to lay the labels (``probe.measure.variants.VARIANTS``).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from probe.capture.cells import Cell
from probe.measure.chunks import accumulator
from probe.measure.heads import COLUMNS
from probe.measure.variants import COLUMNS as AUDIT_COLUMNS
from probe.measure.variants import MEANS, SUMS, VARIANTS, Variant
from probe.records import Site

_ROWS = ("correct_rows", "top5_rows", "entropy_rows")
HEAD_COLUMNS = (*COLUMNS, *_ROWS, "evaluated_rows", "sampling_variance", "top_token_rows", "top_token")
"""What is added up for a head beside ``probe.measure.heads.COLUMNS``. ``correct_rows``, ``top5_rows``, ``entropy_rows``: labelled
positions that the column of that name is over (fewer than ``labelled`` where a model's own output offers only some of them).
``evaluated_rows``: labelled positions that the probe evaluated itself, of a head that the model does without.
``sampling_variance``: variance of ``cross_entropy`` as an estimate, where only some of the labelled positions were evaluated; variances
of micro-batches add. ``top_token``: at the end of the step, how often this rank's most frequent prediction was made;
``top_token_rows``: labelled positions that it was looked for in."""

_LABELLED = COLUMNS.index("labelled")
_TOP_TOKEN_ROWS = HEAD_COLUMNS.index("top_token_rows")


def head_cell(site: str, codebook: int | None = None) -> str:
    """Return the name of the cell of a head, or of one codebook of it; its columns are :data:`HEAD_COLUMNS`, all sums."""
    return f"head:{site}" if codebook is None else f"head:{site}:{codebook}"


def audit_cell(site: str, codebook: int | None = None) -> str:
    """Return the name of the audit's cell of a head or codebook; its columns are ``probe.measure.variants.COLUMNS``, all sums."""
    return f"audit:{site}" if codebook is None else f"audit:{site}:{codebook}"


def codebooks_of(site: Site) -> Sequence[int]:
    """Return the codebooks that have cells of their own: none where there is only one."""
    return range(site.codebooks if site.codebooks > 1 else 0)


def cells_of(site: Site) -> list[Cell]:
    """Return the cells of one head: of the whole, and of each codebook."""
    parts = (None, *codebooks_of(site))
    heads = [Cell(head_cell(site.name, k), sums=HEAD_COLUMNS) for k in parts]
    return heads + [Cell(audit_cell(site.name, k), sums=AUDIT_COLUMNS) for k in parts]


def head_sums(columns: Tensor, *, counted: bool) -> Tensor:
    """Widen ``probe.measure.heads.COLUMNS`` of one micro-batch to :data:`HEAD_COLUMNS`; ``counted``: its predictions were counted."""
    labelled = columns[_LABELLED].unsqueeze(0)
    widened = columns.new_zeros(len(HEAD_COLUMNS))
    widened[: len(COLUMNS)] = columns
    widened[len(COLUMNS) : len(COLUMNS) + len(_ROWS)] = labelled
    if counted:
        widened[_TOP_TOKEN_ROWS : _TOP_TOKEN_ROWS + 1] = labelled
    return widened


def named_sums(device: torch.device, **columns: Tensor) -> Tensor:
    """Return :data:`HEAD_COLUMNS` with 0-dim tensors in some of them and 0 in the others."""
    zero = torch.zeros((), dtype=accumulator(device), device=device)
    return torch.stack([columns[name].to(zero) if name in columns else zero for name in HEAD_COLUMNS])


def audit_sums(audit: Mapping[Variant, Tensor]) -> Tensor:
    """Return the audit's columns of one micro-batch from the ``SUMS`` of each variant that there is (0 for the others)."""
    some = next(iter(audit.values()))
    sums_L3 = torch.stack([audit.get(variant, torch.zeros_like(some)) for variant in VARIANTS])
    return torch.cat([sums_L3, _means(sums_L3), torch.zeros_like(sums_L3[:, :2])], 1).reshape(-1)


def rank_means(sums: Tensor) -> Tensor:
    """Return what to add to an audit's cell at the end of a step: the means over all its micro-batches, and 0 in every other column."""
    sums_L3 = sums.view(len(VARIANTS), -1)[:, : len(SUMS)]
    blank_L5 = sums.new_zeros(len(VARIANTS), len(SUMS) + len(MEANS) - 2)
    return torch.cat([blank_L5, _means(sums_L3)], 1).reshape(-1)


def _means(sums_L3: Tensor) -> Tensor:
    """Return cross-entropy and uniform a labelled position, 0 where there is none."""
    labelled_L1 = sums_L3[:, :1]
    return torch.where(labelled_L1 > 0, sums_L3[:, 1:] / torch.where(labelled_L1 > 0, labelled_L1, 1.0), 0.0)
