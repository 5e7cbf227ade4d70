"""The loss audit: the loss that was backpropagated against the one that the captured predictions and labels make."""

from __future__ import annotations

import math

from probe.assemble.draft import Draft, ratio
from probe.assemble.loss_causes import explain
from probe.assemble.loss_figures import Figures
from probe.assemble.loss_terms import Expectation, TermSums
from probe.capture.observers.head_cells import audit_cell, head_cell
from probe.capture.observers.loss import ABSENT, CELL, OUTPUT_CELL
from probe.capture.observers.statistics import statistics_cell
from probe.foreign.trainer_loss import LossSettings
from probe.records import LossAudit
from probe.sites.reduction import By, Reduction, Term

RATIO, LOGGED = "probe/loss_audit/ratio", "probe/loss_audit/logged_ratio"


def loss_audit(draft: Draft, *, logged: float | None) -> LossAudit | None:
    """Return the audit of a step and enter its metrics; ``None`` without a loss that was backpropagated.

    Args:
        draft: The step.
        logged: The training loss that the Trainer logs of this very step, if it does.
    """
    settings, reduction = draft.run.loss_settings, draft.run.reduction
    values = draft.host.cells[CELL.name]
    if settings is None or reduction is None or not values.counts["micro_batches"]:
        why = draft.host.reasons.get("probe/loss", draft.blind.get("loss", "no training_step returned a loss in this step"))
        draft.reasons.setdefault(RATIO, why)
        draft.reasons.setdefault(LOGGED, why)
        return None
    loss = _backpropagated(draft, settings)
    logged = logged if logged is not None and math.isfinite(logged) else None
    shown = loss if math.isfinite(loss) else None
    draft.measure(LOGGED, None if logged is None else ratio(logged, loss), _why_not_logged(settings))
    why = _why_not(draft, settings, reduction)
    if why:
        draft.reasons.setdefault(RATIO, why)
        return LossAudit(backpropagated=shown, logged=logged)
    figures = _figures(draft, settings, reduction, loss=shown, logged=logged)
    expected = figures.expected
    if expected is not None and not math.isfinite(expected):
        draft.reasons.setdefault(
            RATIO, "not audited: the mean over the vocabulary, which label smoothing needs, is not known of every label"
        )
        return LossAudit(backpropagated=shown, logged=logged)
    nothing = "every label of this step is -100" if expected is None else f"the loss is not a finite number: {loss}"
    causes = explain(figures)
    value = draft.measure(RATIO, ratio(shown, expected) if shown is not None and expected is not None else None, nothing)
    return LossAudit(
        backpropagated=shown,
        expected=expected,
        ratio=value,
        logged=logged,
        reduction=in_words(figures),
        standard_error=figures.expectation.standard_error(),
        causes=tuple(cause.sentence for cause in causes),
        kinds=tuple(cause.kind for cause in causes),
    )


def _backpropagated(draft: Draft, settings: LossSettings) -> float:
    """Return the loss that gradients were taken of, summed over micro-batches, averaged over ranks."""
    values = draft.host.cells[CELL.name]
    returned = values.sums["loss"] / max(draft.count("step", "ranks"), 1.0)
    share = 1.0 if values.counts["with_items"] else settings.backward_share
    return returned * share / settings.accelerate_divides


def _why_not_logged(settings: LossSettings) -> str:
    if not settings.logs_every_step:
        return "a log is of one step only with logging_steps=1"
    return "the record was made before the Trainer logged this step"


def _why_not(draft: Draft, settings: LossSettings, reduction: Reduction) -> str:
    """Say why the step cannot be audited; "" if it can."""
    forwards, calls = draft.count("step", "micro_batches"), draft.count(CELL.name, "micro_batches")
    if "heads" in draft.blind:
        return draft.blind["heads"]
    if reduction.reason:
        return f"not audited: {reduction.reason}"
    if settings.split_by:
        return f"not audited: {settings.split_by} splits one batch, and only a part of it is observed"
    if settings.ranks > 1 and settings.averages_tokens and draft.count("step", "ranks") != settings.ranks:
        return "not audited: the loss is divided by the labels of all ranks, and this record is of one"
    if forwards != calls:
        return f"not audited: {int(forwards)} forwards in {int(calls)} calls of training_step; how their losses make one is not known"
    terms = _terms_with_labels(draft, reduction)
    if not terms:
        return "not audited: no labels among the inputs"
    mine = next((reason for term in terms if (reason := _unscored(draft, term))), "")
    others = int(draft.count(CELL.name, "unscored"))
    if others and not mine:
        return f"not audited: on {others} other ranks the predictions could not be laid over their labels"
    return mine


def _unscored(draft: Draft, term: Term) -> str:
    """Say why a head's predictions do not tell its whole cross-entropy; "" if they do."""
    known = draft.host.reasons.get(f"head:{term.site}", "")
    if known and not known.startswith(ABSENT):  # labels that some micro-batches have and others do not are no gap
        return f"not audited: {known}"
    sums = draft.host.cells[head_cell(term.site, term.codebook)].sums
    calls = draft.count(statistics_cell(term.site), "calls")
    if sums["labelled"] or sums["nonfinite_rows"] or calls:
        return ""
    return f"not audited: {term.site} was not called in any training forward of this step"


def _terms_with_labels(draft: Draft, reduction: Reduction) -> tuple[Term, ...]:
    """Leave out the terms of a modality for which there were no labels: the model leaves them out of its loss, too."""
    return tuple(term for term in reduction.terms if draft.count(OUTPUT_CELL.name, f"with_{term.modality}_labels"))


def _figures(draft: Draft, settings: LossSettings, reduction: Reduction, *, loss: float | None, logged: float | None) -> Figures:
    values, output = draft.host.cells[CELL.name], draft.host.cells[OUTPUT_CELL.name]
    expectation = _expectation(draft, settings, reduction)
    own = None
    if output.counts["with_loss"]:
        divided = expectation.steps if settings.divides(items=expectation.items is not None) else 1.0
        times = settings.ranks if settings.averages_tokens and settings.takes_kwargs and expectation.items is not None else 1
        own = output.sums["loss"] / expectation.ranks / divided * times
    return Figures(
        loss=loss,
        expectation=expectation,
        settings=settings,
        reduction=reduction,
        dtype=draft.host.facts.get("loss_dtype", "float32"),
        own=own if own is None or math.isfinite(own) else None,
        unnamed=bool(output.counts["with_text_labels"]) and not output.counts["with_labels_key"],
        nonfinite=int(values.sums["nonfinite"]),
        first_nonfinite=int(values.minimum("first_nonfinite")) if values.sums["nonfinite"] else 0,
        masked=int(output.sums["masked"]),
        logged=logged,
    )


def _expectation(draft: Draft, settings: LossSettings, reduction: Reduction) -> Expectation:
    """Put the rule together: from the class and the settings, and whether the Trainer gave a number of labels."""
    values, output = draft.host.cells[CELL.name], draft.host.cells[OUTPUT_CELL.name]
    ranks, micro_batches = int(draft.count("step", "ranks")) or 1, int(values.counts["micro_batches"])
    given = values.counts["with_items"]
    averaged = settings.averages_tokens and settings.ranks > 1
    items = values.sums["items"] / given * (1 if averaged else ranks) if given else None
    smoothing = 0.0 if settings.loss_function else settings.smoothing
    smoothed = smoothing > 0 and output.counts["with_labels_key"] > 0
    by: By = "items" if given and _uses_items(settings, reduction, smoothed=smoothed) else "micro-batch"
    all_labels = output.sums["labels"] if settings.counts_first and by == "items" else None
    auxiliary = 0.0
    if output.counts["with_auxiliary"] and not smoothing and not settings.loss_function:
        auxiliary = reduction.auxiliary * output.sums["auxiliary"] / output.counts["with_auxiliary"]
    terms = tuple(_term(draft, term, all_labels) for term in _terms_with_labels(draft, reduction))
    return Expectation(terms, by, smoothing, micro_batches, ranks, averaged, items, auxiliary)


def _uses_items(settings: LossSettings, reduction: Reduction, *, smoothed: bool) -> bool:
    """Tell whether what takes the loss (compute_loss_func, the smoother or the model) is meant to divide by ``num_items_in_batch``."""
    if settings.loss_function:
        return True
    return settings.smoother_takes_items if smoothed else reduction.by == "items"


def _term(draft: Draft, term: Term, all_labels: float | None) -> TermSums:
    columns = draft.host.cells[audit_cell(term.site, term.codebook)].sums
    variance = draft.host.cells[head_cell(term.site, term.codebook)].sums["sampling_variance"]
    labelled = columns["meant:labelled"]
    return TermSums(
        term.weight, columns, labelled if all_labels is None or term.modality != "text" else all_labels, variance, term.modality
    )


def in_words(figures: Figures) -> str:
    """Say how the expected loss was put together."""
    e, s = figures.expectation, figures.settings
    labels = f"{e.labelled:,.0f} labels" if len(e.terms) == 1 else "the labels of each"
    if e.by == "items":
        words = f"token mean over {labels}"
        if len(e.terms) == 1 and e.terms[0].counted != e.labelled:
            words = f"sum over {labels} ÷ {e.terms[0].counted:,.0f}, as transformers {s.version} counts the first label of each row, too"
        if e.ranks > 1:
            words += " of all ranks" if e.averaged else f", mean over {e.ranks} ranks"
    else:
        words = f"mean over {labels}" if e.micro_batches == 1 else f"mean of {e.micro_batches} micro-batch means"
    together = figures.reduction.together
    words = f"{together}: {words}" if together and len(e.terms) > 1 else words
    words += f", label smoothing {e.smoothing:g}" if e.smoothing else ""
    words += f", and {figures.reduction.auxiliary:g} × aux_loss" if e.auxiliary else ""
    return f"{words}, if that is what compute_loss_func={s.loss_function} takes" if s.loss_function else words
