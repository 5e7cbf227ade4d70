"""Watches the LM heads: the scores of each head and codebook against the labels, wherever these hide."""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from probe.capture.buffer import StepBuffer
from probe.capture.cells import Cell
from probe.capture.microbatch import MicroBatch
from probe.capture.observer import Call, StepEnd, Watcher, main_tensor
from probe.capture.observers.head_cells import audit_cell, audit_sums, cells_of, codebooks_of, head_cell, head_sums, rank_means
from probe.capture.observers.head_tokens import TopTokens, rows_to_show, shown_tokens
from probe.measure.heads import UNCHANGED, HeadScore, Logits, score
from probe.measure.variants import Variant
from probe.records import Site
from probe.sites.facts import ModelFacts
from probe.sites.labels import NotAligned, align
from probe.sites.laying import Aligned


@dataclass(frozen=True, slots=True)
class Scored:
    """One head in one micro-batch, by codebook (``None``: the whole head).

    Attributes:
        sums: ``HEAD_COLUMNS``.
        audit: ``SUMS`` of each way to lay the labels.
        how: How they were laid.
        counts: int32 (V,): how often each token was predicted at a labelled position; absent where the budget did not admit it.
        shown: Predicted and target ids (B, T) of a few samples, or ``None``.
    """

    sums: Mapping[int | None, Tensor]
    audit: Mapping[int | None, Mapping[Variant, Tensor]]
    how: str
    counts: Mapping[int | None, Tensor] = field(default_factory=dict)
    shown: tuple[Tensor, Tensor] | None = None


@dataclass(frozen=True, slots=True)
class _Waiting:
    """Logits whose labels the root's output may still bring; they are not kept alive."""

    logits: weakref.ref[Tensor]
    shape: torch.Size


class HeadWatcher(Watcher):
    """Scores each head when it returns; when labels come only with the root's output, then.

    A head that is called more than once in a micro-batch counts once, with its last call (models that evaluate a head twice use the
    second). Until the root returns, logits that wait for labels are held by a weak reference only.
    """

    name = "heads"

    def __init__(self, sites: Sequence[Site], facts: ModelFacts, *, keep_text: bool) -> None:
        """Watch the LM heads among these sites."""
        self._heads = {site.name: site for site in sites if site.role == "lm_head"}
        self._facts = facts
        self._keep_text = keep_text
        self._tops = TopTokens()

    def cells(self) -> Sequence[Cell]:
        """Return the cells of every head."""
        return [cell for site in self._heads.values() for cell in cells_of(site)]

    def sites(self) -> Sequence[str]:
        """Return the root (where late labels appear) and the heads."""
        return ("", *self._heads)

    def enter(self, call: Call, buffer: StepBuffer) -> None:
        """Begin a step afresh."""
        if call.site.name == "" and call.micro.index == 0:
            self._tops.clear()

    def leave(self, call: Call, buffer: StepBuffer) -> None:
        """Score a head, or at the root all that is left, and add up."""
        if call.site.name == "":
            self._commit(call.micro, buffer)
            return
        logits = main_tensor(call.output)
        if logits is not None:
            scored = self._score(call.site, logits.detach(), call.micro, buffer, _change(call.site, self._facts))
            call.micro.scratch[head_cell(call.site.name)] = scored or _Waiting(weakref.ref(logits), logits.shape)

    def step_end(self, end: StepEnd, buffer: StepBuffer) -> None:
        """Add what only the whole step tells: the most frequent prediction, and the means over all micro-batches of this rank."""
        self._tops.finish(buffer)
        for site in self._heads.values():
            for k in (None, *codebooks_of(site)):
                sums = buffer.totals.sums.get(audit_cell(site.name, k))
                if sums is not None:
                    buffer.totals.add(audit_cell(site.name, k), sums=rank_means(sums))

    def _commit(self, micro: MicroBatch, buffer: StepBuffer) -> None:
        for name, site in self._heads.items():
            found = micro.scratch.pop(head_cell(name), None)
            if isinstance(found, _Waiting):
                found = self._score_late(site, found, micro, buffer)
            if isinstance(found, Scored):
                self._add(site, found, micro, buffer)
            elif isinstance(found, NotAligned):
                buffer.totals.omit(f"head:{name}", found.reason)

    def _score_late(self, site: Site, waiting: _Waiting, micro: MicroBatch, buffer: StepBuffer) -> Scored | NotAligned | None:
        logits, change = waiting.logits(), _change(site, self._facts)
        if logits is None:
            logits, change = _returned(micro.output, waiting.shape), UNCHANGED  # what the root returns has been changed by the model
        if logits is None:
            return NotAligned("the model freed the logits before its output told the labels")
        return self._score(site, logits.detach(), micro, buffer, change)

    def _score(self, site: Site, logits: Tensor, micro: MicroBatch, buffer: StepBuffer, change: Logits) -> Scored | NotAligned | None:
        """Score logits, say why they cannot be, or return ``None`` if the root's output may still bring the labels."""
        aligned = align(logits, site=site, facts=self._facts, micro=micro)
        if isinstance(aligned, NotAligned):
            return None if aligned.later else aligned
        show = self._keep_text and micro.index == 0
        parts: dict[int | None, HeadScore] = {}
        counts: dict[int | None, Tensor] = {}
        for k in codebooks_of(site) or (None,):
            one = aligned if k is None else _codebook(aligned, k)
            blank = self._tops.blank(site.name, k, vocabulary=one.logits.shape[-1], device=logits.device, buffer=buffer)
            rows = rows_to_show(one.labels) if show and not parts else 0
            parts[k] = score(one.logits, one.labels, others=one.others, change=change, keep=rows, histogram=blank)
            if blank is not None:
                counts[k] = blank
        first = next(iter(parts))
        labels = aligned.labels if first is None else aligned.labels[..., 0]
        shown = shown_tokens(parts[first].predictions, labels) if show else None
        sums = {k: head_sums(part.sums, counted=k in counts) for k, part in parts.items()}
        return Scored(sums, {k: part.audit for k, part in parts.items()}, aligned.how, counts, shown)

    def _add(self, site: Site, scored: Scored, micro: MicroBatch, buffer: StepBuffer) -> None:
        totals = buffer.totals
        whole = torch.stack(list(scored.sums.values())).sum(0)
        audits = list(scored.audit.values())
        audit = {way: torch.stack([each[way] for each in audits]).sum(0) for way in audits[0]}
        for k, sums in {**scored.sums, None: whole}.items():
            totals.add(head_cell(site.name, k), sums=sums)
        for k, sums_by_way in {**scored.audit, None: audit}.items():
            totals.add(audit_cell(site.name, k), sums=audit_sums(sums_by_way))
        for k, counts in scored.counts.items():
            self._tops.add(site.name, k, counts)
        totals.tell(f"alignment:{site.name}", scored.how)
        if scored.shown is not None and buffer.put(f"predicted:{site.name}", scored.shown[0]):
            buffer.put(f"target:{site.name}", scored.shown[1])


def _change(site: Site, facts: ModelFacts) -> Logits:
    """Return what the model does to the logits of this head before its loss."""
    return Logits(facts.logit_factor, facts.logit_softcap) if site.modality == "text" else UNCHANGED


def _codebook(aligned: Aligned, k: int) -> Aligned:
    return Aligned(
        aligned.labels[..., k], aligned.logits[..., k, :], aligned.how, {way: laid[..., k] for way, laid in aligned.others.items()}
    )


def _returned(output: Any, shape: torch.Size) -> Tensor | None:
    """Return the only logits of this shape in the root's output: under autocast it holds copies in float32, and the head's own are gone."""
    fields = output.items() if isinstance(output, Mapping) else vars(output).items() if hasattr(output, "__dict__") else ()
    found = [value for name, value in fields if "logits" in str(name) and isinstance(value, Tensor) and value.shape == shape]
    return found[0] if len(found) == 1 else None
