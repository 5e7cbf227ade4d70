"""What came out of the model: statistics of every site, accuracy of every head, and the ``probe/text|audio/…`` metrics."""

from __future__ import annotations

from collections.abc import Sequence

from probe.assemble.draft import Draft, ratio
from probe.capture.cells import CellValues
from probe.capture.observers.head_cells import HEAD_COLUMNS as SCORES
from probe.capture.observers.head_cells import head_cell
from probe.capture.observers.statistics import spread_cell, statistics_cell
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
            draft.reasons.setdefault(f"site:{site.name}", draft.blind.get("statistics", uncalled))
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
    for modality in _MODALITIES:
        mine = [site for site in sites if site.modality == modality]
        _modality(draft, modality, mine)
    return tuple(_head(draft, site, rows[site.name]) for site in sites)


def _modality(draft: Draft, modality: Modality, sites: Sequence[Site]) -> None:
    """Enter one modality's metrics: the sums of all its heads divided once."""
    sums = dict.fromkeys(SCORES, 0.0)
    for site in sites:
        for column, value in draft.host.cells[head_cell(site.name)].sums.items():
            sums[column] += value
    accuracy, why = _accuracy(sums), _why_not(draft, modality, sites, sums)
    draft.measure(f"probe/{modality}/loss", accuracy.loss, why)
    draft.measure(f"probe/{modality}/token_accuracy", accuracy.token_accuracy, why)
    draft.measure(f"probe/{modality}/top5_accuracy", accuracy.top5_accuracy, why)
    draft.measure(f"probe/{modality}/entropy", accuracy.entropy, why)
    if len(sites) == 1 and sites[0].codebooks > 1:
        for k in range(sites[0].codebooks):
            one = _accuracy(draft.host.cells[head_cell(sites[0].name, k)].sums)
            draft.measure(f"probe/audio/codebook_{k}/token_accuracy", one.token_accuracy, why)
            draft.measure(f"probe/audio/codebook_{k}/loss", one.loss, why)
    if sums["nonfinite_rows"]:
        draft.reasons[f"{modality}/nonfinite"] = f"{int(sums['nonfinite_rows'])} labelled positions with NaN or Inf logits were left out"
    if sums["labels_outside"]:
        draft.reasons[f"{modality}/labels"] = f"{int(sums['labels_outside'])} labels lie outside the head's vocabulary and were left out"


def _why_not(draft: Draft, modality: Modality, sites: Sequence[Site], sums: dict[str, float]) -> str:
    """Say why a modality has no accuracy (used only where it has none)."""
    if not sites:
        return f"the model has no {modality} head"
    if "heads" in draft.blind:
        return draft.blind["heads"]
    known = [draft.host.reasons[f"head:{s.name}"] for s in sites if f"head:{s.name}" in draft.host.reasons]
    if known:
        return known[0]
    calls = sum(draft.host.cells[statistics_cell(site.name)].counts["calls"] for site in sites)
    if not calls:
        return f"{sites[0].name} was not called in any training forward of this step: the model computed its loss without it"
    if sums["nonfinite_rows"]:
        return "every labelled position has NaN or Inf logits"
    return "no position is labelled: every label is masked with -100"


def _accuracy(sums: dict[str, float]) -> Accuracy:
    labelled = sums["labelled"]
    return Accuracy(
        int(labelled),
        ratio(sums["cross_entropy"], labelled),
        ratio(sums["correct"], labelled),
        ratio(sums["top5"], labelled),
        ratio(sums["entropy"], labelled),
    )


def _head(draft: Draft, site: Site, row: SiteStatistics) -> Head:
    local, facts = draft.host.local, draft.host.facts
    each = tuple(_accuracy(draft.host.cells[head_cell(site.name, k)].sums) for k in range(site.codebooks if site.codebooks > 1 else 0))
    targets = local.get(f"target:{site.name}", ((),))
    pairs = [(int(p), int(t)) for p, t in zip(local.get(f"predicted:{site.name}", ((),))[0], targets[0]) if t != -100]
    predicted, wanted = tuple(p for p, _ in pairs), tuple(t for _, t in pairs)
    as_text = site.modality == "text" and bool(pairs)
    decoder = draft.run.decoder
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
        accuracy=_accuracy(draft.host.cells[head_cell(site.name)].sums),
        codebooks=each,
        alignment=facts.get(f"alignment:{site.name}", ""),
        predicted=predicted,
        target=wanted,
        predicted_text=decoder.text(predicted) if as_text else None,
        target_text=decoder.text(wanted) if as_text else None,
    )
