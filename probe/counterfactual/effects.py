"""What an intervention did to each sample, and the columns in which samples, micro-batches and ranks add up.

Shapes: B samples, N rows of a head.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import get_args

import torch
from torch import Tensor

from probe.capture.cells import Cell
from probe.counterfactual.scoring import HeadRows
from probe.records import Intervention, Modality

INTERVENTIONS: tuple[Intervention, ...] = get_args(Intervention)
COUNTS = ("passes", "samples_unknown")
SUMS = (
    *("loss", "changed", "tokens", "samples", "wins"),
    *("delta_squared", "delta_tokens", "tokens_squared"),
    *("divergence", "divergence_tokens"),
)
"""``loss``, ``changed``: cross-entropy as it is and under the intervention, added over the ``tokens`` that have both. ``samples`` with
such a token, ``wins`` those of them whose loss is lower as it is (a tie counts half). Of a sample's difference d and tokens n: Σ d²,
Σ d n, Σ n². ``divergence``: KL over ``divergence_tokens`` rows. The counts: passes of all ranks, and those that could not tell samples
apart."""


def effect_cell(modality: Modality, what: Intervention) -> str:
    """Return the name of the cell of one intervention and modality."""
    return f"counterfactual:{modality}:{what}"


def effect_cells(modalities: Sequence[Modality]) -> list[Cell]:
    """Return the cells of every modality that the model predicts: the same on every rank."""
    return [Cell(effect_cell(modality, what), counts=COUNTS, sums=SUMS) for modality in modalities for what in INTERVENTIONS]


def own_table(heads: Sequence[HeadRows]) -> Tensor:
    """Return loss and tokens of each sample, added over heads of one modality, (B, 2) float64."""
    return _over_heads([[head.samples.totals(t) for t in _counted(head.loss_N, head.loss_N.isfinite())] for head in heads], heads)


def paired_table(before: Sequence[HeadRows], after: Sequence[HeadRows], reached_B: Tensor | None = None) -> Tensor:
    """Return loss as it is, loss under the intervention and tokens of each sample, over the tokens that have both, (B, 3) float64.

    Samples that ``reached_B`` (bool) leaves out have no tokens; where samples cannot be told apart, none is left out.
    """
    tables = []
    for one, other in zip(before, after, strict=True):
        both_N = one.loss_N.isfinite() & other.loss_N.isfinite()
        loss_N, tokens_N = _counted(one.loss_N, both_N)
        changed_N, _ = _counted(other.loss_N, both_N)
        tables.append([one.samples.totals(values_N) for values_N in (loss_N, changed_N, tokens_N)])
    table_B3 = _over_heads(tables, before)
    if reached_B is None or len(reached_B) != len(table_B3) or not samples_known(before):
        return table_B3
    return torch.where(reached_B.unsqueeze(1), table_B3, 0.0)


def effect_sums(table_B3: Tensor, divergence: Tensor) -> Tensor:
    """Return ``SUMS`` of one pass.

    Args:
        table_B3: As :func:`paired_table` makes it.
        divergence: Σ KL and its rows, (2,).
    """
    loss_B, changed_B, tokens_B = table_B3.unbind(1)
    delta_B = changed_B - loss_B
    has_B = tokens_B > 0
    won_B = torch.where(has_B, (delta_B > 0) + 0.5 * (delta_B == 0), 0.0)
    columns = (loss_B, changed_B, tokens_B, has_B, won_B, delta_B.square(), delta_B * tokens_B, tokens_B.square())
    return torch.cat([torch.stack([column.sum(dtype=table_B3.dtype) for column in columns]), divergence.to(table_B3)])


def samples_known(heads: Sequence[HeadRows]) -> bool:
    """Tell whether the rows of all these heads know their sample, of the same batch."""
    return all(head.samples.known for head in heads) and len({head.samples.count for head in heads}) <= 1


def _counted(loss_N: Tensor, where_N: Tensor) -> tuple[Tensor, Tensor]:
    return torch.where(where_N, loss_N, 0.0), where_N


def _over_heads(tables: Sequence[Sequence[Tensor]], heads: Sequence[HeadRows]) -> Tensor:
    """Add tables (columns of (B,)) over heads; all samples into one row where some head does not know whose its rows are."""
    stacked = [torch.stack(list(columns), 1) for columns in tables]
    if not samples_known(heads):
        stacked = [table.sum(0, keepdim=True) for table in stacked]
    return torch.stack([table.to(stacked[0]) for table in stacked]).sum(0)
