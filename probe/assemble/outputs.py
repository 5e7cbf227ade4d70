"""What came out of the model: statistics of every site, accuracy of every head, and the ``probe/text|audio/…`` metrics."""

from __future__ import annotations

from collections.abc import Sequence

from probe.assemble.draft import Draft, ratio
from probe.assemble.samples import samples, word_errors
from probe.capture.cells import CellValues
from probe.capture.observers.head_cells import HEAD_COLUMNS as SCORES
from probe.capture.observers.head_cells import codebooks_of, head_cell
from probe.capture.observers.head_unseen import WITHOUT_HEAD
from probe.capture.observers.statistics import spread_cell, statistics_cell
from probe.measure.calibration import expected_calibration_error
from probe.measure.spread import standard_deviation
from probe.measure.statistics import finish
from probe.records import Accuracy, Head, Modality, Site, SiteStatistics

_MODALITIES: tuple[Modality, ...] = ("text", "audio")


def statistics(draft: Draft) -> tuple[SiteStatistics, ...]:
    """Return the statistics of every site that was called; name those that were not, and every NaN or Inf."""
    found = []
    for site in draft.run.sites.sites:
        if site.role == "model":
            continue
        row = _site(draft, site)
        if row.calls == 0:
            uncalled = f"{site.role} was not called in any training forward of this step"
            known = draft.host.reasons.get(f"site:{site.name}") or draft.blind.get("statistics", uncalled)
            draft.reasons.setdefault(f"site:{site.name}", known)
        elif row.nonfinite:
            draft.reasons.setdefault(f"site:{site.name}", f"{row.nonfinite} NaN or Inf values in its output")
        found.append(row)
    return tuple(found)


def _site(draft: Draft, site: Site) -> SiteStatistics:
    values = draft.host.cells[statistics_cell(site.name)]
    shape, dtype, _ = draft.host.facts.get(f"output:{site.name}", ((), "", ""))
    moments = finish(values.counts["elements"], values.sums, values.maxima)
    time_std, batch_std = _spread(draft.host.cells.get(spread_cell(site.name)))
    return SiteStatistics(
        site.name,
        site.role,
        int(values.counts["calls"]),
        shape,
        dtype,
        int(values.counts["elements"]),
        moments.mean,
        moments.rms,
        moments.std,
        moments.minimum,
        moments.maximum,
        moments.nonfinite,
        time_std,
        batch_std,
    )


def _spread(values: CellValues | None) -> tuple[float | None, float | None]:
    if values is None:
        return None, None
    time = standard_deviation(values.sums["time_variance"], values.counts["time_rows"])
    batch = standard_deviation(values.sums["batch_variance"], values.counts["batch_rows"])
    return time, batch


def heads(draft: Draft, found: Sequence[SiteStatistics]) -> tuple[Head, ...]:
    """Return every head's row, and enter the metrics of each modality."""
    rows = {row.site: row for row in found}
    sites = draft.run.sites.of("lm_head")
    made = tuple(_head(draft, site, rows[site.name]) for site in sites)
    for modality in _MODALITIES:
        mine = [site for site in sites if site.modality == modality]
        why = _modality(draft, modality, mine)
        if modality == "text":
            word_errors(draft, made, why)
    return made


def _modality(draft: Draft, modality: Modality, sites: Sequence[Site]) -> str:
    """Enter one modality's metrics, the sums of all its heads divided once; return why those that are missing are."""
    sums = dict.fromkeys(SCORES, 0.0)
    for site in sites:
        for column, value in draft.host.cells[head_cell(site.name)].sums.items():
            sums[column] += value
    accuracy, why = _accuracy(sums), _why_not(draft, modality, sites, sums)
    draft.measure(f"probe/{modality}/loss", accuracy.loss, why)
    draft.measure(f"probe/{modality}/token_accuracy", accuracy.token_accuracy, why)
    draft.measure(f"probe/{modality}/top5_accuracy", accuracy.top5_accuracy, why)
    draft.measure(f"probe/{modality}/entropy", accuracy.entropy, why)
    draft.measure(f"probe/{modality}/calibration_error", accuracy.calibration_error, why)
    draft.measure(f"probe/{modality}/top_token_share", accuracy.top_token_share, _why_not_counted(draft, sites) or why)
    if len(sites) == 1:
        for k in codebooks_of(sites[0]):
            _codebook(draft, sites[0], k, why)
    if sums["nonfinite_rows"]:
        draft.reasons[f"{modality}/nonfinite"] = f"{round(sums['nonfinite_rows'])} labelled positions with NaN or Inf logits were left out"
    if sums["labels_outside"]:
        draft.reasons[f"{modality}/labels"] = f"{round(sums['labels_outside'])} labels lie outside the head's vocabulary and were left out"
    return why


def _codebook(draft: Draft, site: Site, k: int, why: str) -> None:
    one = _accuracy(draft.host.cells[head_cell(site.name, k)].sums)
    area = f"probe/audio/codebook_{k}"
    draft.measure(f"{area}/token_accuracy", one.token_accuracy, why)
    draft.measure(f"{area}/loss", one.loss, why)
    draft.measure(f"{area}/calibration_error", one.calibration_error, why)
    draft.measure(f"{area}/top_token_share", one.top_token_share, _why_not_counted(draft, [site]) or why)


def _why_not_counted(draft: Draft, sites: Sequence[Site]) -> str:
    """Return why predictions were not counted although they were there: the budget; else ""."""
    return next((why for site in sites if (why := draft.host.reasons.get(f"head:{site.name}/top_token"))), "")


def _why_not(draft: Draft, modality: Modality, sites: Sequence[Site], sums: dict[str, float]) -> str:
    """Say why a modality has no accuracy (used only where it has none)."""
    if not sites:
        return f"the model has no {modality} head"
    if "heads" in draft.blind:
        return draft.blind["heads"]
    known = [draft.host.reasons[f"head:{s.name}"] for s in sites if f"head:{s.name}" in draft.host.reasons]
    if known:
        return known[0]
    if sums["labelled"]:
        offered = next((draft.host.facts[f"evaluated:{s.name}"] for s in sites if f"evaluated:{s.name}" in draft.host.facts), "")
        return f"{offered}; these do not tell it" if offered else "no position was looked at for it"
    calls = sum(draft.host.cells[statistics_cell(site.name)].counts["calls"] for site in sites)
    if not calls:
        return f"{sites[0].name} was not called in any training forward of this step: the model computed its loss without it"
    if sums["nonfinite_rows"]:
        return "every labelled position has NaN or Inf logits"
    return "no position is labelled: every label is masked with -100"


def _accuracy(sums: dict[str, float], *, top_token: int | None = None) -> Accuracy:
    labelled = sums["labelled"]
    return Accuracy(
        round(labelled),
        ratio(sums["cross_entropy"], labelled),
        ratio(sums["correct"], sums["correct_rows"]),
        ratio(sums["top5"], sums["top5_rows"]),
        ratio(sums["entropy"], sums["entropy_rows"]),
        expected_calibration_error(sums),
        ratio(sums["top_token"], sums["top_token_rows"]),
        top_token,
    )


def _of_cell(draft: Draft, cell: str) -> Accuracy:
    """Return the accuracy of a head or codebook, with the token that it predicted most on this rank if it has one vocabulary."""
    top = draft.host.local.get(f"top_token:{cell}")
    sums = draft.host.cells[cell].sums
    return _accuracy(sums, top_token=int(top[0]) if top is not None and sums["top_token_rows"] else None)


def _evaluated(draft: Draft, site: Site) -> str:
    """Say what a head's numbers rest on where the model did without it; "" if it was called."""
    sums = draft.host.cells[head_cell(site.name)].sums
    rows, labelled = round(sums["evaluated_rows"]), round(sums["labelled"])
    why: str = draft.host.facts.get(f"evaluated:{site.name}", WITHOUT_HEAD if rows else "")
    if not rows:
        return why
    return f"{rows:,} sampled of {labelled:,} labelled positions: {why}" if rows < labelled else f"all {rows:,} labelled positions: {why}"


def _head(draft: Draft, site: Site, row: SiteStatistics) -> Head:
    facts = draft.host.facts
    whole = _of_cell(draft, head_cell(site.name))
    text = draft.run.decoder.text([whole.top_token]) if whole.top_token is not None and site.modality == "text" else None
    return Head(
        site=site.name,
        modality=site.modality or "text",
        calls=row.calls,
        shape=row.shape,
        dtype=row.dtype,
        device=facts.get(f"output:{site.name}", ((), "", ""))[2],
        mean=row.mean,
        minimum=row.minimum,
        maximum=row.maximum,
        nonfinite=row.nonfinite,
        accuracy=whole,
        codebooks=tuple(_of_cell(draft, head_cell(site.name, k)) for k in codebooks_of(site)),
        alignment=facts.get(f"alignment:{site.name}", ""),
        evaluated=_evaluated(draft, site),
        top_token_text=text,
        shown=samples(draft, site),
    )
