"""The slips by which a loss may have been made otherwise than meant, and the search for the fewest that give just this loss."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product
from typing import Literal

from probe.assemble.loss_figures import EPSILONS, Cause, Figures, Kind, near
from probe.measure.variants import Variant
from probe.records import Modality
from probe.sites.reduction import By

MATCH = 3e-4
"""How well a slip must explain the loss, relative."""

_SMOOTHINGS = (0.1, 0.05, 0.2)


@dataclass(frozen=True, slots=True)
class Slip:
    """One way in which a loss may have been made otherwise than meant. ``foretold``: the Trainer's settings say so."""

    kind: Kind
    sentence: str
    foretold: bool = False
    variant: Variant = "meant"
    smoothing: float | None = None
    by: By | None = None
    divisor: Literal["counted", "given"] = "counted"
    without: Modality | None = None
    factor: float = 1.0


def slips_that_explain(f: Figures) -> list[Cause]:
    """Return the fewest slips that together give the loss; empty if none do."""
    assert f.loss is not None
    match = max(MATCH, EPSILONS.get(f.dtype, 0.0), f.tolerance if f.expectation.standard_error() else 0.0)
    plain = Slip("unexplained", "", foretold=True)
    ways = [[plain, *slips] for slips in (_laid(f), _smoothed(f), _divided(f), _left_out(f), _scaled(f))]
    for chosen in sorted(product(*ways), key=_surprise):
        laid, smoothed, divided, left_out, scaled = chosen
        if _surprise(chosen)[0] > 2:
            break
        value = f.expectation.value(
            variant=laid.variant, smoothing=smoothed.smoothing, by=divided.by, divisor=divided.divisor, without=left_out.without
        )
        if value is not None and near(f.loss, value * scaled.factor, match):
            return [Cause(slip.kind, slip.sentence) for slip in chosen if slip.sentence]
    return []


def _surprise(slips: tuple[Slip, ...]) -> tuple[int, int]:
    """Return how many slips nothing foretells, then how many there are."""
    return sum(not slip.foretold for slip in slips), sum(bool(slip.sentence) for slip in slips)


def _laid(f: Figures) -> list[Slip]:
    """Labels laid over logits in another way."""
    name, shift = f.reduction.model_class, f.reduction.label_shift
    by_smoother = f.settings.smoothing > 0 and not f.settings.loss_function
    less = "the labels are shifted by one position less than they should be: each position is trained to predict the token that it reads"
    more = "the labels are shifted by one position more than they should be"
    if by_smoother and shift and not f.settings.smoother_shifts:
        less = (
            f"with label smoothing the Trainer takes the loss itself, and does not shift the labels of {name} (it is not among its causal "
            "language models): each position is trained to predict the token that it reads"
        )
    if by_smoother and not shift and f.settings.smoother_shifts:
        more = f"with label smoothing the Trainer takes the loss itself, and shifts the labels of {name}, which are not to be shifted"
    return [
        Slip("shift", less, by_smoother and shift > 0 and not f.settings.smoother_shifts, variant="shift_less"),
        Slip("shift", more, by_smoother and shift == 0 and f.settings.smoother_shifts, variant="shift_more"),
        Slip("padding", "labels at padding positions are left out of the loss, although they are not -100", variant="padding_out"),
    ]


def _smoothed(f: Figures) -> list[Slip]:
    """Label smoothing that is missing, or there without being asked for."""
    epsilon = f.expectation.smoothing
    if not epsilon:
        return [Slip("smoothing", f"the loss is smoothed by {e:g}, and label_smoothing_factor is 0", smoothing=e) for e in _SMOOTHINGS]
    if f.unnamed:
        why = f"label_smoothing_factor={epsilon:g} has no effect: the Trainer looks for `labels`, and the batch calls them otherwise"
        return [Slip("smoothing", why, True, smoothing=0.0)]
    return [Slip("smoothing", f"label_smoothing_factor={epsilon:g} has no effect: the loss is not smoothed", smoothing=0.0)]


def _divided(f: Figures) -> list[Slip]:
    """A mean over something else than the labels that the loss is over."""
    e, slips = f.expectation, []
    if e.by == "items" and e.items is not None:
        counted = max(term.counted for term in e.terms)
        if any(not near(term.counted, e.items, 1e-9) for term in e.terms):
            slips.append(Slip("items", _wrong_items(f), True, divisor="given"))
        else:
            counted = e.items
        lost = f"num_items_in_batch ({counted:,.0f}) does not reach the loss: each micro-batch takes the mean over its own labels"
        slips.append(Slip("items", lost, by="micro-batch"))
    return slips


def _left_out(f: Figures) -> list[Slip]:
    """The loss of one modality that does not get into the loss."""
    present = {term.modality for term in f.expectation.terms if term.labelled()}
    if len(present) < 2:
        return []
    return [
        Slip(modality, f"the loss of the {modality} tokens is not in the loss, although there are labels for them", without=modality)
        for modality in sorted(present)
    ]


def _wrong_items(f: Figures) -> str:
    e = f.expectation
    said = f"num_items_in_batch is {e.items:,.0f}, and the loss is over "
    if len(e.terms) > 1:
        counts = [term.counted for term in e.terms]
        many = f"{min(counts):,.0f} … {max(counts):,.0f} labels ({f.reduction.together})"
        return f"{said}{many}: all of them are divided by the same number"
    shifts = f.reduction.label_shift and not f.settings.skips_first
    first = " (it counts the first label of each row, which nothing predicts)" if shifts else ""
    return f"{said}{e.terms[0].counted:,.0f} labels{first}"


def _scaled(f: Figures) -> list[Slip]:
    """A factor that accumulation, or the number of ranks, puts before the loss."""
    s, e, steps = f.settings, f.expectation, f.expectation.steps
    given = e.items is not None
    slips: list[Slip] = []
    times = 1.0 / steps if e.by == "items" and s.divides(items=given) else steps if e.by != "items" and not s.divides(items=given) else 1.0
    ranks = float(s.ranks) if e.by != "items" and s.averages_tokens and given and s.ranks > 1 else 1.0
    if times * ranks != 1.0:
        told = [_accumulation(f, times)] if times != 1.0 else []
        told += [_all_ranks(f)] if ranks != 1.0 else []
        slips.append(Slip("accumulation" if times != 1.0 else "ranks", "; ".join(told), True, factor=times * ranks))
    if steps > 1:
        summed = f"the loss is summed over the {steps:g} micro-batches of the step and divided by nothing"
        slips += [
            Slip("accumulation", summed, factor=steps),
            Slip("accumulation", f"the loss is divided by the {steps:g} micro-batches of the step once too often", factor=1 / steps),
        ]
    if s.ranks > 1:
        slips += [
            Slip("ranks", f"the loss is multiplied by the number of ranks, {s.ranks}, once too often", factor=float(s.ranks)),
            Slip("ranks", f"the loss is divided by the number of ranks, {s.ranks}, once too often", factor=1 / s.ranks),
        ]
    return slips


def _accumulation(f: Figures, times: float) -> str:
    """Say why accumulation scales the loss, as the settings foretell it."""
    steps, name, smoothed = f"{f.expectation.steps:g}", f.reduction.model_class, f.expectation.smoothing > 0
    if times < 1:
        why = "Trainer.loss_is_scaled_for_ga is False" if f.settings.scaled is False else "the Trainer divides it"
        return f"the loss is divided by the {steps} accumulated micro-batches although num_items_in_batch has already done so ({why})"
    begin = f"the losses of the {steps} accumulated micro-batches are added up and not divided by {steps}"
    if f.settings.backward_share != 1.0 and f.expectation.items is None:
        return f"{begin}: transformers {f.settings.version} divides only what it logs"
    if f.settings.scaled:
        return f"{begin}: Trainer.loss_is_scaled_for_ga is True"
    if f.settings.loss_function:
        return f"{begin}: the Trainer leaves that to compute_loss_func={f.settings.loss_function}"
    if smoothed:
        return f"{begin}: the Trainer leaves that to num_items_in_batch, which its label smoothing does not use"
    return f"{begin}: the Trainer leaves that to num_items_in_batch, because {name}.forward takes **kwargs, but the model does not use it"


def _all_ranks(f: Figures) -> str:
    return (
        f"the loss is multiplied by the {f.settings.ranks} ranks (average_tokens_across_devices), which is right only where it was divided "
        "by the labels of all of them"
    )
