"""What attention looked at: one row a layer, and the ``probe/attention/…`` metrics over layers and by kind."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from statistics import fmean
from typing import get_args

import numpy as np
from numpy.typing import NDArray

from probe.assemble.draft import Draft, ratio
from probe.capture.observers.attention import MODALITY, PER_HEAD, attention_cell
from probe.measure.quantities import COLUMNS, QUANTITIES, WALKS, weight_of
from probe.records import Attention, AttentionKind, HeadwiseAttention, Site

#: A kernel whose output differs by more than this share from softmax(q·kᵀ) v of its arguments computes something else.
MISMATCH_LIMIT = 0.05
_OVERALL = ("entropy", "entropy_nats", "effective_keys", "top", "first_token", "padding", "distance")
_MODALITY = ("text_to_audio", "audio_to_text", "text_to_reference", "text_to_text", "audio_to_audio", "audio_to_reference")


def attention(draft: Draft) -> tuple[Attention, ...]:
    """Return a row for every attention layer that was called, and enter means over layers: of all, and of each kind."""
    sites = draft.run.sites.of("attention")
    rows = tuple(_layer(draft, site) for site in sites if draft.count(attention_cell(site.name), "calls"))
    _name_unobserved(draft, sites, rows)
    why = _why_nothing(draft, sites, rows)
    for what in _OVERALL:
        unknown = f"which keys are padding is known for no layer ({why})" if what == "padding" and rows else why
        draft.measure(f"probe/attention/{what}", _mean(rows, what), unknown)
    if any(row.sink is not None for row in rows):
        draft.measure("probe/attention/sink", _mean(rows, "sink"), why)
    for kind in get_args(AttentionKind):
        mine = [row for row in rows if row.kind == kind]
        for what in QUANTITIES:
            value = _mean(mine, what)
            if value is not None:
                draft.measure(f"probe/attention/{kind}/{what}", value, why)
    joint = [row for row in rows if row.kind == "joint"]
    for what in _MODALITY:
        name = f"probe/attention/{what}"
        reason = draft.host.reasons.get(name) or _why_no_modality(draft, joint, rows)
        draft.measure(name, _mean(joint, what), reason)
    over_audio = [row for row in rows if row.kind in ("cross", "joint")]
    for what in WALKS:
        name = f"probe/attention/{what}"
        draft.measure(name, _mean(over_audio, what), draft.host.reasons.get(name) or _why_no_walk(draft, over_audio, why))
    return rows


def _layer(draft: Draft, site: Site) -> Attention:
    name = attention_cell(site.name)
    values = draft.host.cells[name]
    heads, keys, how = draft.host.facts.get(name, (0, 0, ""))
    row = Attention(site=site.name, kind=site.kind or "decoder", how=how, calls=int(values.counts["calls"]), heads=heads, keys=keys)
    mismatch = values.maxima["mismatch"]
    if mismatch > MISMATCH_LIMIT:
        differ = f"by {_percent(mismatch)}" if math.isfinite(mismatch) else "without bound (a number is not finite)"
        draft.reasons[name] = f"its kernel computes something else than softmax(q·kᵀ) v of its arguments: outputs differ {differ}"
        return row
    if mismatch >= 0:
        how = f"{how}, checked against the kernel's output ({_percent(mismatch)})"
    own, each = draft.host.local.get(f"own:{name}"), draft.host.local.get(f"heads:{name}")
    headwise = draft.host.facts.get(f"headwise:{name}", ())
    return Attention(
        site=row.site,
        kind=row.kind,
        how=how,
        calls=row.calls,
        heads=heads,
        keys=keys,
        rows=int(values.sums["sampled"]),
        per_head=None if own is None or each is None else _per_head(own, each, headwise),
        **{what: ratio(values.sums[what], values.sums[weight_of(what)]) for what in QUANTITIES},
    )


def _per_head(own: NDArray[np.float64], each: NDArray[np.float64], known: Sequence[str]) -> HeadwiseAttention:
    """Divide this rank's per-head numerators by its own weights (those of the other ranks are not in them)."""
    columns = dict(zip(COLUMNS, own))
    means: dict[str, tuple[float, ...]] = {}
    for what, values in zip(QUANTITIES, each):
        below = columns[weight_of(what)]
        if below and what in known:
            means[what] = tuple(float(v) for v in values / below)
    return HeadwiseAttention(**means)


def _percent(share: float) -> str:
    return f"{100 * share:.2g} %"


def _mean(rows: Iterable[Attention], what: str) -> float | None:
    values = [value for row in rows if (value := getattr(row, what)) is not None]
    return fmean(values) if values else None


def _why_nothing(draft: Draft, sites: Sequence[Site], rows: Sequence[Attention]) -> str:
    """Return why no layer has numbers, if none has."""
    uncalled = "no attention layer was called in any training forward of this step"
    none = uncalled if sites else draft.run.sites.missing.get("attention", "the model has no attention layer that was recognised")
    cells = [attention_cell(row.site) for row in rows]
    told = {draft.reasons.get(cell) or draft.host.reasons.get(cell, "") for cell in cells} - {""}
    return "; ".join(sorted(told)) or draft.blind.get("attention", none)


def _name_unobserved(draft: Draft, sites: Sequence[Site], rows: Sequence[Attention]) -> None:
    seen = {row.site for row in rows if row.rows}
    for site in sites:
        reason = draft.host.reasons.get(attention_cell(site.name))
        if site.name not in seen and reason:
            draft.reasons.setdefault(attention_cell(site.name), reason)


def _why_no_modality(draft: Draft, joint: Sequence[Attention], rows: Sequence[Attention]) -> str:
    if "attention" in draft.blind:
        return draft.blind["attention"]
    if not joint:
        if any(row.kind == "cross" for row in rows):
            return "text and audio are never in one sequence: the decoder reads the audio through cross-attention"
        return "no attention layer has text and audio in one sequence"
    told = _told(draft, joint, MODALITY)
    return told[0] if told else "no sampled row of this kind could see such a key in this step"


def _why_no_walk(draft: Draft, rows: Sequence[Attention], nothing: str) -> str:
    if not any(row.rows for row in rows):
        return nothing if "attention" in draft.blind or rows else "no attention layer has text rows over audio keys"
    told = [*_told(draft, rows, MODALITY), *_told(draft, rows, PER_HEAD)]
    return told[0] if told else "no sampled text row could see an audio key that is known as such (a pair of rows for monotonicity)"


def _told(draft: Draft, rows: Sequence[Attention], what: str) -> list[str]:
    reasons = draft.host.reasons
    return [reasons[key] for row in rows if (key := f"{attention_cell(row.site)}/{what}") in reasons]
