"""Why the loss that was backpropagated is not the one that was expected: one sentence for each cause, from numbers alone.

First comes what makes a number meaningless: labels that are all masked (which explains a NaN), then NaN and Inf. Then the slips: those
that would give just this loss are searched, what the Trainer's settings already foretell before what merely might be, one slip before
two; without a match, what can be said of the difference. Last what is wrong although the numbers agree: labels at padding positions.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from typing import Literal

from probe.assemble.loss_terms import Expectation
from probe.foreign.trainer_loss import LossSettings
from probe.measure.variants import Variant
from probe.sites.reduction import By, Reduction

AGREEMENT = 1e-3
"""How far the ratio may be from 1 without a cause, relative (more for losses in half precision, see ``Figures.tolerance``)."""

MATCH = 3e-4
"""How well a slip must explain the loss, relative."""

_EPSILONS = {"float32": 0.0, "float64": 0.0, "bfloat16": 2.0**-7, "float16": 2.0**-10}
_SMOOTHINGS = (0.1, 0.05, 0.2)


@dataclass(frozen=True, slots=True)
class Figures:
    """One step's numbers, and what is known of its Trainer and its model.

    Attributes:
        loss: What was backpropagated; ``None`` if that is NaN or Inf.
        expectation: What was expected.
        settings: The Trainer's.
        reduction: The model's.
        dtype: Of the loss, by which it is rounded.
        own: What the model's own output loss would have come to, divided and multiplied as the Trainer does; ``None`` without.
        unnamed: Text labels came under another name than ``labels``, which the Trainer does not look for.
        nonfinite: Micro-batches with a NaN or Inf loss, and the index of the first.
        masked: Micro-batches without a single label to learn from.
        logged: The Trainer's log of this very step.
    """

    loss: float | None
    expectation: Expectation
    settings: LossSettings
    reduction: Reduction
    dtype: str = "float32"
    own: float | None = None
    unnamed: bool = False
    nonfinite: int = 0
    first_nonfinite: int = 0
    masked: int = 0
    logged: float | None = None

    @property
    def expected(self) -> float | None:
        """What was expected; ``None`` if there is no label."""
        return self.expectation.value()

    @property
    def tolerance(self) -> float:
        """Relative difference within which loss and expectation agree: rounding of the loss itself, and three standard errors."""
        error = 3 * self.expectation.standard_error() / self.expected if self.expected else 0.0
        return max(AGREEMENT, _EPSILONS.get(self.dtype, 0.0), error)

    @property
    def off(self) -> bool:
        """Whether there is something to explain."""
        return self.loss is not None and self.expected is not None and not _near(self.loss, self.expected, self.tolerance)


@dataclass(frozen=True, slots=True)
class Slip:
    """One way in which a loss may have been made otherwise than meant. ``foretold``: the Trainer's settings say so."""

    sentence: str
    foretold: bool = False
    variant: Variant = "meant"
    smoothing: float | None = None
    by: By | None = None
    divisor: Literal["counted", "given"] = "counted"
    factor: float = 1.0


def explain(figures: Figures) -> tuple[str, ...]:
    """Return the causes, most telling first; empty if nothing is off."""
    found = [*_masked(figures), *_nonfinite(figures)]
    if figures.off:
        found += _accumulated_auxiliary(figures) or slips_that_explain(figures) or [_unexplained(figures)]
        found += _log_of_a_share(figures)
    return (*found, *_padding(figures))


def _masked(f: Figures) -> Iterator[str]:
    batches = f.expectation.micro_batches
    if not f.expectation.labelled:
        yield "every label of this step is -100: there is nothing to learn from"
    elif f.masked:
        yield f"{f.masked} of {batches} micro-batches have no label to learn from: all of theirs are -100"


def _nonfinite(f: Figures) -> Iterator[str]:
    if not f.nonfinite:
        return
    which = (
        f"the loss of {f.nonfinite} of {f.expectation.micro_batches} micro-batches is NaN or Inf (first: micro-batch {f.first_nonfinite})"
    )
    if f.logged is not None and f.settings.hides_nonfinite:
        yield f"{which}, and logging_nan_inf_filter hides it: the log says {f.logged:.4g}"
    elif f.settings.hides_nonfinite:
        yield f"{which}, and logging_nan_inf_filter keeps it out of the log"
    else:
        yield which


def _padding(f: Figures) -> Iterator[str]:
    at_padding, labelled = 0.0, f.expectation.labelled
    for term in f.expectation.terms:
        if term.labelled("padding_out"):  # else padding could not be told
            at_padding += term.labelled() - term.labelled("padding_out")
    if at_padding > 0:
        some = f"{int(at_padding):,} of {int(labelled):,} labels"
        yield f"{some} lie at padding positions: the model learns to predict padding (mask them with -100)"


def slips_that_explain(f: Figures) -> list[str]:
    """Return the sentences of the fewest slips that together give the loss; empty if none do."""
    assert f.loss is not None
    match = max(MATCH, _EPSILONS.get(f.dtype, 0.0), f.tolerance if f.expectation.standard_error() else 0.0)
    plain = Slip("", foretold=True)
    ways = [[plain, *slips] for slips in (_laid(f), _smoothed(f), _divided(f), _scaled(f))]
    for chosen in sorted(product(*ways), key=_surprise):
        laid, smoothed, divided, scaled = chosen
        value = f.expectation.value(variant=laid.variant, smoothing=smoothed.smoothing, by=divided.by, divisor=divided.divisor)
        if _surprise(chosen)[0] <= 2 and value is not None and _near(f.loss, value * scaled.factor, match):
            return [slip.sentence for slip in chosen if slip.sentence]
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
        Slip(less, by_smoother and shift > 0 and not f.settings.smoother_shifts, variant="shift_less"),
        Slip(more, by_smoother and shift == 0 and f.settings.smoother_shifts, variant="shift_more"),
        Slip("labels at padding positions are left out of the loss, although they are not -100", variant="padding_out"),
    ]


def _smoothed(f: Figures) -> list[Slip]:
    """Label smoothing that is missing, or there without being asked for."""
    epsilon = f.expectation.smoothing
    if not epsilon:
        return [Slip(f"the loss is smoothed by {e:g}, and label_smoothing_factor is 0", smoothing=e) for e in _SMOOTHINGS]
    if f.unnamed:
        why = f"label_smoothing_factor={epsilon:g} has no effect: the Trainer looks for `labels`, and the batch calls them otherwise"
        return [Slip(why, True, smoothing=0.0)]
    return [Slip(f"label_smoothing_factor={epsilon:g} has no effect: the loss is not smoothed", smoothing=0.0)]


def _divided(f: Figures) -> list[Slip]:
    """A mean over something else than the labels that the loss is over."""
    e, slips = f.expectation, []
    if e.by == "items" and e.items is not None:
        counted = max(term.counted for term in e.terms)
        if any(not _near(term.counted, e.items, 1e-9) for term in e.terms):
            slips.append(Slip(_wrong_items(f), True, divisor="given"))
        else:
            counted = e.items
        lost = f"num_items_in_batch ({counted:,.0f}) does not reach the loss: each micro-batch takes the mean over its own labels"
        slips.append(Slip(lost, by="micro-batch"))
    return slips


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
        slips.append(Slip("; ".join(told), True, factor=times * ranks))
    if steps > 1:
        slips += [
            Slip(f"the loss is summed over the {steps:g} micro-batches of the step and divided by nothing", factor=steps),
            Slip(f"the loss is divided by the {steps:g} micro-batches of the step once too often", factor=1 / steps),
        ]
    if s.ranks > 1:
        slips += [
            Slip(f"the loss is multiplied by the number of ranks, {s.ranks}, once too often", factor=float(s.ranks)),
            Slip(f"the loss is divided by the number of ranks, {s.ranks}, once too often", factor=1 / s.ranks),
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


def _accumulated_auxiliary(f: Figures) -> list[str]:
    """A declared auxiliary loss that every micro-batch (of every rank) adds, while num_items_in_batch divides only the cross-entropy."""
    assert f.loss is not None
    assert f.expected is not None
    e = f.expectation
    times = e.steps * (e.ranks if e.averaged else 1)
    if e.by != "items" or times <= 1 or not e.auxiliary or not _near(f.loss, f.expected + e.auxiliary * (times - 1), MATCH):
        return []
    return [f"the auxiliary loss of each of the {times:g} micro-batches is added and not divided: it weighs {times:g} times as much"]


def _unexplained(f: Figures) -> str:
    """Say what can be said where no slip gives this loss: where it changes, and by how much."""
    assert f.loss is not None
    assert f.expected is not None
    more = f.loss - f.expected
    amount = f"adds {more:.4g} to the cross-entropy" if more > 0 else f"takes {-more:.4g} from the cross-entropy"
    if f.settings.loss_function:
        return f"compute_loss_func={f.settings.loss_function} takes another loss than the token mean of the cross-entropy: it {amount}"
    if f.own is not None and _near(f.own, f.loss, f.tolerance):
        return f"something in the model's forward {amount} (an auxiliary loss?): the model's own loss is already {f.own:.4g}"
    changed = [f"{method} is overridden by {by}" for method, by in f.settings.overridden]
    if changed:
        return f"{', '.join(changed)}: it {amount}, a factor of {f.loss / f.expected:.4g}" if f.expected else f"{', '.join(changed)}"
    own = f" (the model's own loss is {f.own:.4g})" if f.own is not None else ""
    return f"something {amount}{own}"


def _log_of_a_share(f: Figures) -> Iterator[str]:
    """The log differs from what was backpropagated."""
    if f.loss is None or f.logged is None or f.settings.backward_share == 1.0 or f.expectation.items is not None:
        return
    if not _near(f.logged, f.loss, f.tolerance, rounding=1e-4):
        yield f"the log does not show it: it says {f.logged:.4g}"


def _near(one: float, other: float, relative: float, *, rounding: float = 0.0) -> bool:
    return abs(one - other) <= max(relative * abs(other), rounding)
