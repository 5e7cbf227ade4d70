"""One head in one micro-batch: what scoring it gives, and the scoring of logits that are there.

Shapes: B samples, T shown tokens, V vocabulary, K codebooks.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from probe.capture.observers.head_cells import codebooks_of, head_sums
from probe.capture.observers.head_tokens import rows_to_show, shown_tokens
from probe.measure.heads import UNCHANGED, HeadScore, Logits, score
from probe.measure.variants import Variant
from probe.records import Site
from probe.sites.facts import ModelFacts
from probe.sites.laying import Aligned


@dataclass(frozen=True, slots=True)
class Scored:
    """One head in one micro-batch, by codebook (``None``: a head that has no codebooks, or one).

    Attributes:
        sums: ``HEAD_COLUMNS``.
        audit: ``SUMS`` of each way to lay the labels that there is.
        how: How they were laid.
        counts: int32 (V,): how often each token was predicted at a labelled position; absent where that was not counted.
        shown: Predicted and target ids (B, T) of a few samples, or ``None``.
        evaluated: Why the probe evaluated the head itself, or where else the numbers are from; "" if the head was called.
    """

    sums: Mapping[int | None, Tensor]
    audit: Mapping[int | None, Mapping[Variant, Tensor]]
    how: str
    counts: Mapping[int | None, Tensor] = field(default_factory=dict)
    shown: tuple[Tensor, Tensor] | None = None
    evaluated: str = ""


def by_codebook(site: Site, aligned: Aligned) -> dict[int | None, Aligned]:
    """Return labels and logits of each codebook, as views; under ``None`` as they are where there are no codebooks."""
    if not codebooks_of(site):
        one = aligned if site.modality != "audio" else _codebook(aligned, 0)
        return {None: one}
    return {k: _codebook(aligned, k) for k in codebooks_of(site)}


def change_of(site: Site, facts: ModelFacts) -> Logits:
    """Return what the model does to the logits of this head before its loss."""
    return Logits(facts.logit_factor, facts.logit_softcap) if site.modality == "text" else UNCHANGED


def score_logits(site: Site, aligned: Aligned, *, change: Logits, counts: Mapping[int | None, Tensor], show: bool) -> Scored:
    """Score logits that lie under their labels, codebook by codebook; see :func:`probe.measure.heads.score` for what that costs.

    Args:
        site: The head.
        aligned: Its logits and labels.
        change: What the model does to the logits before its loss.
        counts: Zeros to count predictions in, by codebook.
        show: Whether to return tokens of a few samples (of the first codebook).
    """
    parts: dict[int | None, HeadScore] = {}
    shown = None
    for k, one in by_codebook(site, aligned).items():
        rows = rows_to_show(one.labels) if show and not parts else 0
        parts[k] = score(one.logits, one.labels, others=one.others, change=change, keep=rows, histogram=counts.get(k))
        if rows:
            shown = shown_tokens(parts[k].predictions, one.labels)
    sums = {k: head_sums(part.sums, counted=k in counts) for k, part in parts.items()}
    return Scored(sums, {k: part.audit for k, part in parts.items()}, aligned.how, counts, shown)


def whole(scored: Scored) -> tuple[Tensor, dict[Variant, Tensor]]:
    """Return the sums and the audit of the whole head: its codebooks added up."""
    audits = list(scored.audit.values())
    if len(audits) == 1:
        return next(iter(scored.sums.values())), dict(audits[0])
    return torch.stack(list(scored.sums.values())).sum(0), {way: torch.stack([each[way] for each in audits]).sum(0) for way in audits[0]}


def _codebook(aligned: Aligned, k: int) -> Aligned:
    others = {way: laid[..., k] for way, laid in aligned.others.items()}
    return Aligned(aligned.labels[..., k], aligned.logits[..., k, :], aligned.how, others)
