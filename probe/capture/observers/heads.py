"""Watches the LM heads: the scores of each head and codebook against the labels, wherever these hide, called or not."""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from probe.capture.buffer import StepBuffer
from probe.capture.cells import Cell
from probe.capture.microbatch import MicroBatch
from probe.capture.observer import Call, StepEnd, Watcher, main_tensor
from probe.capture.observers.head_cells import audit_cell, audit_sums, cells_of, codebooks_of, head_cell, rank_means
from probe.capture.observers.head_offered import score_offered
from probe.capture.observers.head_scoring import Scored, by_codebook, change_of, score_logits, whole
from probe.capture.observers.head_tokens import TopTokens
from probe.capture.observers.head_unseen import HeadEvaluator
from probe.measure.heads import UNCHANGED, Logits
from probe.records import Site
from probe.sites.facts import ModelFacts
from probe.sites.labels import NotAligned, align

_FREED = "the model freed the logits before its output told the labels"
_SALT = 4096  # more than a step has micro-batches


@dataclass(frozen=True, slots=True)
class _Waiting:
    """Logits whose labels the root's output may still bring; they are not kept alive."""

    logits: weakref.ref[Tensor]
    shape: torch.Size


class HeadWatcher(Watcher):
    """Scores each head when it returns; when labels come only with the root's output, then.

    A head that is called more than once in a micro-batch counts once, with its last call (models that evaluate a head twice use the
    second). Until the root returns, logits that wait for labels are held by a weak reference only. A head that was not called although
    the root returned is scored from what the output offers, else evaluated on sampled rows.
    """

    name = "heads"

    def __init__(self, sites: Sequence[Site], facts: ModelFacts, *, evaluator: HeadEvaluator, keep_text: bool) -> None:
        """Watch the LM heads among these sites."""
        self._heads = {site.name: site for site in sites if site.role == "lm_head"}
        self._text_heads = sum(site.modality == "text" for site in self._heads.values())
        self._facts = facts
        self._evaluator = evaluator
        self._keep_text = keep_text
        self._tops = TopTokens()

    def cells(self) -> Sequence[Cell]:
        """Return the cells of every head."""
        return [cell for site in self._heads.values() for cell in cells_of(site)]

    def sites(self) -> Sequence[str]:
        """Return the root (where late labels appear), the heads, and what feeds them."""
        return tuple(dict.fromkeys(("", *self._heads, *self._evaluator.watched)))

    def enter(self, call: Call, buffer: StepBuffer) -> None:
        """Begin a step afresh."""
        if call.site.name == "" and call.micro.index == 0:
            self._tops.clear()

    def leave(self, call: Call, buffer: StepBuffer) -> None:
        """Score a head, or at the root all that is left, and add up."""
        self._evaluator.remember(call)
        if call.site.name == "":
            self._commit(call.micro, buffer)
        elif call.site.name in self._heads:
            logits = main_tensor(call.output)
            if logits is not None:
                scored = self._score(call.site, logits.detach(), call.micro, buffer, change_of(call.site, self._facts))
                call.micro.scratch[head_cell(call.site.name)] = scored or _Waiting(weakref.ref(logits), logits.shape)

    def step_end(self, end: StepEnd, buffer: StepBuffer) -> None:
        """Add what only the whole step tells: the most frequent prediction, and the means over all micro-batches of this rank."""
        self._tops.finish(buffer, keep=self._keep_text)
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
            elif found is None and micro.output is not None:
                found = self._score_unseen(site, micro, buffer)
            if isinstance(found, Scored):
                self._add(site, found, micro, buffer)
            elif isinstance(found, NotAligned):
                buffer.totals.omit(f"head:{name}", found.reason)
        self._evaluator.forget(micro)

    def _score(self, site: Site, logits: Tensor, micro: MicroBatch, buffer: StepBuffer, change: Logits) -> Scored | NotAligned | None:
        """Score logits, say why they cannot be, or return ``None`` if the root's output may still bring the labels."""
        aligned = align(logits, site=site, facts=self._facts, micro=micro)
        if isinstance(aligned, NotAligned):
            return None if aligned.later else aligned
        counts: dict[int | None, Tensor] = {}
        for k, one in by_codebook(site, aligned).items():
            blank = self._tops.blank(site.name, k, vocabulary=one.logits.shape[-1], device=logits.device, buffer=buffer)
            if blank is not None:
                counts[k] = blank
        return score_logits(site, aligned, change=change, counts=counts, show=self._keep_text and micro.index == 0)

    def _score_late(self, site: Site, waiting: _Waiting, micro: MicroBatch, buffer: StepBuffer) -> Scored | NotAligned | None:
        logits, change = waiting.logits(), change_of(site, self._facts)
        if logits is None:
            logits, change = _returned(micro.output, waiting.shape), UNCHANGED  # what the root returns has been changed by the model
        if logits is not None:
            return self._score(site, logits.detach(), micro, buffer, change)
        return self._evaluate(site, micro, buffer, _FREED) or NotAligned(_FREED)

    def _score_unseen(self, site: Site, micro: MicroBatch, buffer: StepBuffer) -> Scored | NotAligned | None:
        offered = score_offered(site, micro, self._facts) if self._text_heads == 1 else None
        if isinstance(offered, Scored):
            return offered
        found = self._evaluate(site, micro, buffer)
        missing = offered if offered is not None and not offered.absent else None
        return found if isinstance(found, Scored) or missing is None else missing

    def _evaluate(self, site: Site, micro: MicroBatch, buffer: StepBuffer, *why: str) -> Scored | NotAligned | None:
        return self._evaluator.score(site, micro, (buffer.step or 0) * _SALT + micro.index, *why)

    def _add(self, site: Site, scored: Scored, micro: MicroBatch, buffer: StepBuffer) -> None:
        totals, (sums, audit) = buffer.totals, whole(scored)
        for k, columns in {**scored.sums, None: sums}.items():
            totals.add(head_cell(site.name, k), sums=columns)
        for k, sums_by_way in {**scored.audit, None: audit}.items():
            totals.add(audit_cell(site.name, k), sums=audit_sums(sums_by_way))
        for k, counts in scored.counts.items():
            self._tops.add(site.name, k, counts)
        totals.tell(f"alignment:{site.name}", scored.how)
        if scored.evaluated:
            totals.tell(f"evaluated:{site.name}", scored.evaluated)
        if scored.shown is not None and buffer.put(f"predicted:{site.name}", scored.shown[0]):
            buffer.put(f"target:{site.name}", scored.shown[1])


def _returned(output: Any, shape: torch.Size) -> Tensor | None:
    """Return the only logits of this shape in the root's output: under autocast it holds copies in float32, and the head's own are gone."""
    fields = output.items() if isinstance(output, Mapping) else vars(output).items() if hasattr(output, "__dict__") else ()
    found = [value for name, value in fields if "logits" in str(name) and isinstance(value, Tensor) and value.shape == shape]
    return found[0] if len(found) == 1 else None
