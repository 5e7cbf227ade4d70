"""What attention looked at: one row a layer, and the ``probe/attention/…`` metrics over layers and by kind."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from statistics import fmean
from typing import get_args

import numpy as np
from numpy.typing import NDArray

from probe.assemble.draft import Draft, ratio
from probe.capture.observers.attention import attention_cell
from probe.measure.attention import COLUMNS, HEAD_ROWS
from probe.records import Attention, AttentionKind, HeadwiseAttention, Site

DENOMINATORS: Mapping[str, str] = {
    "entropy_nats": "rows",
    "entropy": "relative_rows",
    "first_token": "rows",
    "padding": "padding_rows",
    "text_to_text": "text_rows_text_visible",
    "text_to_audio": "text_rows_audio_visible",
    "audio_to_text": "audio_rows_text_visible",
    "audio_to_audio": "audio_rows_audio_visible",
}
"""Which column each numerator is divided by."""
_OVERALL = ("entropy", "entropy_nats", "first_token", "padding")
_MODALITY = ("text_to_audio", "audio_to_text", "text_to_text", "audio_to_audio")


def attention(draft: Draft) -> tuple[Attention, ...]:
    """Return a row for every attention layer that was called, and enter means over layers: of all, and of each kind."""
    sites = draft.run.sites.of("attention")
    rows = tuple(_layer(draft, site) for site in sites if draft.count(attention_cell(site.name), "calls"))
    _name_unobserved(draft, sites, rows)
    uncalled = "no attention layer was called in any training forward of this step"
    none = uncalled if sites else draft.run.sites.missing.get("attention", "the model has no attention layer that was recognised")
    none = draft.blind.get("attention", none)
    why = "; ".join(sorted({draft.host.reasons.get(attention_cell(row.site), "") for row in rows} - {""})) or none
    for what in _OVERALL:
        unknown = f"which keys are padding is known for no layer ({why})" if what == "padding" and rows else why
        draft.measure(f"probe/attention/{what}", _mean(rows, what), unknown)
    for kind in get_args(AttentionKind):
        mine = [row for row in rows if row.kind == kind]
        for what in (*_OVERALL, *_MODALITY):
            value = _mean(mine, what)
            if value is not None:
                draft.measure(f"probe/attention/{kind}/{what}", value, why)
    joint = [row for row in rows if row.kind == "joint"]
    for what in _MODALITY:
        draft.measure(f"probe/attention/{what}", _mean(joint, what), _why_no_modality(draft, joint, rows))
    return rows


def _layer(draft: Draft, site: Site) -> Attention:
    name = attention_cell(site.name)
    values = draft.host.cells[name]
    heads, keys, how = draft.host.facts.get(name, (0, 0, ""))
    means = {what: ratio(values.sums[what], values.sums[below]) for what, below in DENOMINATORS.items()}
    own, each = draft.host.local.get(f"own:{name}"), draft.host.local.get(f"heads:{name}")
    known = draft.host.facts.get(f"masses_per_head:{name}", False)
    return Attention(
        site=site.name,
        kind=site.kind or "decoder",
        how=how,
        calls=int(values.counts["calls"]),
        heads=heads,
        keys=keys,
        rows=int(values.sums["sampled"]),
        per_head=None if own is None or each is None else _per_head(own, each, known),
        **means,
    )


def _per_head(own: NDArray[np.float64], each: NDArray[np.float64], masses: bool) -> HeadwiseAttention:
    """Divide this rank's per-head numerators by its own denominators (those of the other ranks are not in them)."""
    columns = dict(zip(COLUMNS, own))
    means: dict[str, tuple[float, ...]] = {}
    for what, values in zip(HEAD_ROWS, each):
        below = columns[DENOMINATORS[what]]
        if below and (masses or what == "entropy_nats"):
            means[what] = tuple(float(v) for v in values / below)
    return HeadwiseAttention(**means)


def _mean(rows: Iterable[Attention], what: str) -> float | None:
    values = [value for row in rows if (value := getattr(row, what)) is not None]
    return fmean(values) if values else None


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
    later = [draft.host.reasons[key] for row in joint if (key := f"{attention_cell(row.site)}/modality") in draft.host.reasons]
    return later[0] if later else "no sampled row of this kind could see such a key in this step"
