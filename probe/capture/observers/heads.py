"""Watches the LM heads: accuracy, cross-entropy and entropy of each head and codebook against the labels, wherever these hide."""

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
from probe.capture.observer import Call, Watcher, main_tensor
from probe.measure.heads import COLUMNS, HeadScore, score
from probe.records import Site
from probe.sites.facts import ModelFacts
from probe.sites.labels import Aligned, NotAligned, align

SHOWN_TOKENS = 1024


def head_cell(site: str, codebook: int | None = None) -> str:
    """Return the name of the cell of a head, or of one codebook of it."""
    return f"head:{site}" if codebook is None else f"head:{site}:{codebook}"


@dataclass(frozen=True, slots=True)
class _Scored:
    """One head in one micro-batch: sums of the whole head, of each codebook, and what to show."""

    whole: Tensor
    codebooks: tuple[Tensor, ...]
    predicted: Tensor
    target: Tensor
    how: str


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

    def cells(self) -> Sequence[Cell]:
        """Return a cell a head and one a codebook."""
        return [
            Cell(head_cell(name, k), sums=COLUMNS)
            for name, site in self._heads.items()
            for k in (None, *range(site.codebooks if site.codebooks > 1 else 0))
        ]

    def sites(self) -> Sequence[str]:
        """Return the root (where late labels appear) and the heads."""
        return ("", *self._heads)

    def leave(self, call: Call, buffer: StepBuffer) -> None:
        """Score a head, or at the root all that is left, and add up."""
        if call.site.name == "":
            self._commit(call.micro, buffer)
            return
        logits = main_tensor(call.output)
        if logits is not None:
            scored = self._score(call.site, logits.detach(), call.micro)
            call.micro.scratch[head_cell(call.site.name)] = scored or _Waiting(weakref.ref(logits), logits.shape)

    def _commit(self, micro: MicroBatch, buffer: StepBuffer) -> None:
        for name, site in self._heads.items():
            found = micro.scratch.pop(head_cell(name), None)
            if isinstance(found, _Waiting):
                logits = found.logits()
                logits = _returned(micro.output, found.shape) if logits is None else logits
                if logits is None:
                    found = NotAligned("the model freed the logits before its output told the labels", later=False)
                else:
                    found = self._score(site, logits.detach(), micro)
            if isinstance(found, _Scored):
                self._add(site, found, micro, buffer)
            elif isinstance(found, NotAligned):
                buffer.totals.omit(f"head:{name}", found.reason)

    def _score(self, site: Site, logits: Tensor, micro: MicroBatch) -> _Scored | NotAligned | None:
        """Score logits, say why they cannot be, or return ``None`` if the root's output may still bring the labels."""
        aligned = align(logits, site=site, facts=self._facts, micro=micro)
        if isinstance(aligned, NotAligned):
            return None if aligned.later else aligned
        if site.codebooks <= 1:
            scored = score(aligned.logits, aligned.labels)
            return self._scored(aligned, [], scored)
        each = [score(aligned.logits[..., k, :], aligned.labels[..., k]) for k in range(site.codebooks)]
        return self._scored(aligned, [one.sums for one in each], each[0])

    def _scored(self, aligned: Aligned, codebooks: list[Tensor], shown: HeadScore) -> _Scored:
        labels = aligned.labels[..., 0] if codebooks else aligned.labels
        predicted, target = (shown.predictions, labels) if labels.dim() == 1 else (shown.predictions[0], labels[0])
        whole = torch.stack(codebooks).sum(0) if codebooks else shown.sums
        return _Scored(whole, tuple(codebooks), predicted[:SHOWN_TOKENS], target[:SHOWN_TOKENS], aligned.how)

    def _add(self, site: Site, scored: _Scored, micro: MicroBatch, buffer: StepBuffer) -> None:
        totals = buffer.totals
        totals.add(head_cell(site.name), sums=scored.whole)
        for k, sums in enumerate(scored.codebooks):
            totals.add(head_cell(site.name, k), sums=sums)
        totals.tell(f"alignment:{site.name}", scored.how)
        if micro.index == 0 and self._keep_text and buffer.put(f"predicted:{site.name}", scored.predicted):
            buffer.put(f"target:{site.name}", scored.target)


def _returned(output: Any, shape: torch.Size) -> Tensor | None:
    """Return the only logits of this shape in the root's output: under autocast it holds copies in float32, and the head's own are gone."""
    fields = output.items() if isinstance(output, Mapping) else vars(output).items() if hasattr(output, "__dict__") else ()
    found = [value for name, value in fields if "logits" in str(name) and isinstance(value, Tensor) and value.shape == shape]
    return found[0] if len(found) == 1 else None
