"""Scores of a head that the model does without, from the log-probabilities that the model's output offers instead of logits.

TRL's fused head returns ``FusedCausalLMOutput(loss, log_probs, entropy, is_top1, label_mask, ...)``, each (B, S - 1), or (B, S) for
labels that were shifted before; 0 where there is no label. Source: ``trl.trainer.utils.add_fused_lm_head`` (trl 1.16.0).

Shapes: B samples, S positions, P positions that the output tells of.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from probe.capture.microbatch import MicroBatch, named_output
from probe.capture.observers.head_cells import named_sums
from probe.capture.observers.head_scoring import Scored
from probe.measure.chunks import accumulator
from probe.measure.variants import Variant
from probe.records import Site
from probe.sites.facts import ModelFacts
from probe.sites.labels import NotAligned, align
from probe.sites.laying import IGNORED, Aligned

FROM_OUTPUT = "from the log_probs that the model returned in place of logits"


@dataclass(frozen=True, slots=True)
class Offered:
    """What the root's output tells of each position.

    Attributes:
        log_probs: (B, P), any float dtype.
        meant: (B, P) bool: positions that have a label.
        aligned: The labels as they lie over the positions, or why they do not.
    """

    log_probs: Tensor
    meant: Tensor
    aligned: Aligned | NotAligned


def offered_rows(site: Site, micro: MicroBatch, facts: ModelFacts) -> Offered | NotAligned | None:
    """Return the log-probabilities of a text head's labels that the root's output offers; ``None`` if it offers none. No sync."""
    log_probs_BP = named_output(micro.output, "log_probs")
    if site.modality != "text" or not isinstance(log_probs_BP, Tensor) or log_probs_BP.dim() != 2 or not log_probs_BP.is_floating_point():
        return None
    log_probs_BP = log_probs_BP.detach()
    aligned = _labels(log_probs_BP, site, micro, facts)
    meant_BP = _beside(log_probs_BP, named_output(micro.output, "label_mask"))
    if meant_BP is None:
        if isinstance(aligned, NotAligned):
            return aligned
        meant_BP = aligned.labels != IGNORED
    return Offered(log_probs_BP, meant_BP != 0, aligned)


def score_offered(site: Site, micro: MicroBatch, facts: ModelFacts) -> Scored | NotAligned | None:
    """Score a text head from the root's output; ``None`` if that offers no ``log_probs``. No sync.

    What the output does not offer stays without rows: top 5, calibration, the most frequent prediction, and other ways to lay the labels;
    so does its share of ``uniform``, which is NaN (it can be told from no log-probability of the label alone).
    """
    found = offered_rows(site, micro, facts)
    if not isinstance(found, Offered):
        return found
    log_probs_BP, meant_BP, aligned = found.log_probs, found.meant, found.aligned
    entropy_BP = _beside(log_probs_BP, named_output(micro.output, "entropy"))
    correct_BP = _beside(log_probs_BP, named_output(micro.output, "is_top1"))
    scored_BP = meant_BP & log_probs_BP.isfinite()
    labelled = _total(scored_BP)
    columns = {
        "cross_entropy": -_total(log_probs_BP, scored_BP),
        "squared_cross_entropy": _total(log_probs_BP.to(accumulator(log_probs_BP.device)).square(), scored_BP),
        "labelled": labelled,
        "nonfinite_rows": _total(meant_BP & ~log_probs_BP.isfinite()),
    }
    for name, offered in (("entropy", entropy_BP), ("correct", correct_BP)):
        if offered is not None:
            columns |= {name: _total(offered, scored_BP), f"{name}_rows": labelled}
    audit: dict[Variant, Tensor] = {"meant": _audit(log_probs_BP, scored_BP)}
    if isinstance(aligned, Aligned) and "padding_out" in aligned.others:
        audit["padding_out"] = _audit(log_probs_BP, scored_BP & (aligned.others["padding_out"] != IGNORED))
    how = aligned.how if isinstance(aligned, Aligned) else "as the output lays them"
    return Scored({None: named_sums(log_probs_BP.device, **columns)}, {None: audit}, how, evaluated=FROM_OUTPUT)


def _labels(log_probs_BP: Tensor, site: Site, micro: MicroBatch, facts: ModelFacts) -> Aligned | NotAligned:
    """Lay the labels over the positions of the output: all of them if the labels came shifted or are not, else all but the last."""
    samples, positions = log_probs_BP.shape
    reason = ""
    for total in (positions, positions + 1):
        found = align(log_probs_BP.new_zeros(()).expand(samples, total, 1), site=site, facts=facts, micro=micro)
        if isinstance(found, NotAligned):
            if found.absent:
                return found
            reason = reason or f"{found.reason} of which the output's log_probs are"
        elif total - positions == (0 if found.how.startswith("already shifted") else min(facts.label_shift, 1)):
            others = {way: laid[:, :positions] for way, laid in found.others.items()}
            return Aligned(found.labels[:, :positions], found.logits, found.how, others)
        else:
            reason = f"labels that are {found.how} do not lie over the output's log_probs of shape {tuple(log_probs_BP.shape)}"
    return NotAligned(reason)


def _beside(log_probs_BP: Tensor, offered: Any) -> Tensor | None:
    return offered.detach() if isinstance(offered, Tensor) and offered.shape == log_probs_BP.shape else None


def _total(values: Tensor, where: Tensor | None = None) -> Tensor:
    kept = values if where is None else torch.where(where, values, 0)
    return kept.sum(dtype=accumulator(values.device))


def _audit(log_probs_BP: Tensor, scored_BP: Tensor) -> Tensor:
    rows = _total(scored_BP)
    return torch.stack([rows, -_total(log_probs_BP, scored_BP), torch.full_like(rows, torch.nan)])
