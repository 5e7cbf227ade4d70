"""Why the loss that was backpropagated is not the one that was expected: one sentence for each cause, from numbers alone.

First comes what makes a number meaningless: labels that are all masked (which explains a NaN), then NaN and Inf. Then the slips: those
that would give just this loss are searched, what the Trainer's settings already foretell before what merely might be, one slip before
two; without a match, what can be said of the difference. Last what is wrong although the numbers agree: labels at padding positions.

Each cause is of one kind, which does not change with its words (:data:`probe.assemble.loss_figures.Kind`): findings go by it.
"""

from __future__ import annotations

from collections.abc import Iterator

from probe.assemble.loss_figures import Cause, Figures, near
from probe.assemble.loss_slips import MATCH, slips_that_explain


def explain(figures: Figures) -> tuple[Cause, ...]:
    """Return the causes, most telling first; empty if nothing is off."""
    found = [*_masked(figures), *_nonfinite(figures)]
    if figures.off:
        found += _accumulated_auxiliary(figures) or slips_that_explain(figures) or [_unexplained(figures)]
        found += _log_of_a_share(figures)
    return (*found, *_padding(figures))


def _masked(f: Figures) -> Iterator[Cause]:
    batches = f.expectation.micro_batches
    if not f.expectation.labelled:
        yield Cause("masked", "every label of this step is -100: there is nothing to learn from")
    elif f.masked:
        yield Cause("masked", f"{f.masked} of {batches} micro-batches have no label to learn from: all of theirs are -100")


def _nonfinite(f: Figures) -> Iterator[Cause]:
    if not f.nonfinite:
        return
    which = (
        f"the loss of {f.nonfinite} of {f.expectation.micro_batches} micro-batches is NaN or Inf (first: micro-batch {f.first_nonfinite})"
    )
    if f.logged is not None and f.settings.hides_nonfinite:
        yield Cause("nonfinite", f"{which}, and logging_nan_inf_filter hides it: the log says {f.logged:.4g}")
    elif f.settings.hides_nonfinite:
        yield Cause("nonfinite", f"{which}, and logging_nan_inf_filter keeps it out of the log")
    else:
        yield Cause("nonfinite", which)


def _padding(f: Figures) -> Iterator[Cause]:
    at_padding, labelled = 0.0, f.expectation.labelled
    for term in f.expectation.terms:
        if term.labelled("padding_out"):  # else padding could not be told
            at_padding += term.labelled() - term.labelled("padding_out")
    if at_padding > 0:
        some = f"{int(at_padding):,} of {int(labelled):,} labels"
        yield Cause("padding", f"{some} lie at padding positions: the model learns to predict padding (mask them with -100)")


def _accumulated_auxiliary(f: Figures) -> list[Cause]:
    """A declared auxiliary loss that every micro-batch (of every rank) adds, while num_items_in_batch divides only the cross-entropy."""
    assert f.loss is not None
    assert f.expected is not None
    e = f.expectation
    times = e.steps * (e.ranks if e.averaged else 1)
    if e.by != "items" or times <= 1 or not e.auxiliary or not near(f.loss, f.expected + e.auxiliary * (times - 1), MATCH):
        return []
    why = f"the auxiliary loss of each of the {times:g} micro-batches is added and not divided: it weighs {times:g} times as much"
    return [Cause("auxiliary", why)]


def _unexplained(f: Figures) -> Cause:
    """Say what can be said where no slip gives this loss: where it changes, and by how much."""
    assert f.loss is not None
    assert f.expected is not None
    more = f.loss - f.expected
    amount = f"adds {more:.4g} to the cross-entropy" if more > 0 else f"takes {-more:.4g} from the cross-entropy"
    if f.settings.loss_function:
        taken = f"compute_loss_func={f.settings.loss_function} takes another loss than the token mean of the cross-entropy"
        return Cause("loss_function", f"{taken}: it {amount}")
    if f.own is not None and near(f.own, f.loss, f.tolerance):
        return Cause(
            "forward", f"something in the model's forward {amount} (an auxiliary loss?): the model's own loss is already {f.own:.4g}"
        )
    changed = [f"{method} is overridden by {by}" for method, by in f.settings.overridden]
    if changed:
        factor = f": it {amount}, a factor of {f.loss / f.expected:.4g}" if f.expected else ""
        return Cause("override", f"{', '.join(changed)}{factor}")
    own = f" (the model's own loss is {f.own:.4g})" if f.own is not None else ""
    return Cause("unexplained", f"something {amount}{own}")


def _log_of_a_share(f: Figures) -> Iterator[Cause]:
    """The log differs from what was backpropagated."""
    if f.loss is None or f.logged is None or f.settings.backward_share == 1.0 or f.expectation.items is not None:
        return
    if not near(f.logged, f.loss, f.tolerance, rounding=1e-4):
        yield Cause("log", f"the log does not show it: it says {f.logged:.4g}")
