"""Watches attention layers: probabilities before dropout for sampled query rows, reduced at once to entropy, distance and mass."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from probe.capture.breaker import Breaker
from probe.capture.buffer import StepBuffer
from probe.capture.cells import Cell
from probe.capture.microbatch import MicroBatch
from probe.capture.observer import Call, Watcher
from probe.capture.observers.modality import late_modality, modalities
from probe.capture.tap import AttentionTap
from probe.measure.attention import HeadMeanRows, ReducedRows, describe_later, finish_later, held_bytes, reduce_rows, sum_up
from probe.measure.blocks import NotObservable, RowSource
from probe.measure.fused_rows import FUSED, FusedRows
from probe.measure.masks import View
from probe.measure.prepared import Prepared, prepare
from probe.measure.quantities import COLUMNS, AttentionSums
from probe.measure.rows import RowChoice, choose_all_valid, choose_rows
from probe.records import Site

#: What of a layer's masses could not be had, and why, stands under the layer's cell with one of these behind it.
MODALITY, PER_HEAD = "modality", "per_head"
_HELD = "attention rows held"
_SHARED = "what attention layers share"
_WAITING_BYTES = 2**20  # of calls that wait to be summed up together
_UNKNOWN = "which of its tokens are audio is known neither from the inputs nor from the model's output; padding rows are counted in"
_LATE = "which of its tokens are audio was known only after it had run: no masses of each head, no monotonicity, no coverage"


def attention_cell(site: str) -> str:
    """Return the name of the cell of an attention layer."""
    return f"attention:{site}"


class Checked(Protocol):
    """A check that a source may carry as ``check``: does softmax(q·kᵀ) v of its arguments give what its kernel gave?"""

    def mismatch(self, source: RowSource, index_BR: Tensor) -> Tensor:
        """Return the largest difference of the rows' outputs ÷ the largest output, 0-dim, on the device."""


@dataclass(frozen=True, slots=True)
class _Held:
    """Rows of one layer that wait for the modality of the tokens, and what they take of the budget."""

    site: Site
    rows: HeadMeanRows
    nbytes: int


@dataclass(slots=True)
class _Shared:
    """What a layer's rows were prepared with, and what for: layers of its kind that see the same keys are measured with it, too.

    Holds the masks of that layer by reference until another layer of the kind has others, or the root returns; and, up to
    ``_WAITING_BYTES``, the calls that are summed up together then.
    """

    view: View | None
    query_BS: Tensor | None
    key_BK: Tensor | None
    prepared: Prepared
    waiting: list[tuple[Site, ReducedRows]] = field(default_factory=list)
    nbytes: int = 0

    def add(self, site: Site, rows: ReducedRows) -> None:
        """Let a call wait."""
        self.waiting.append((site, rows))
        self.nbytes += rows.nbytes

    def take(self) -> tuple[list[Site], AttentionSums] | None:
        """Sum up the calls that wait, and let them go; ``None`` if none does."""
        waiting, self.waiting, self.nbytes = self.waiting, [], 0
        return ([site for site, _ in waiting], sum_up([rows for _, rows in waiting], self.prepared)) if waiting else None

    def fits(self, source: RowSource, query_BS: Tensor | None, key_BK: Tensor | None) -> bool:
        """Tell whether it holds for a call."""
        view = source.view
        known = self.query_BS is query_BS and self.key_BK is key_BK
        return known and self.view is not None and view is not None and self.view.same(view)


class AttentionWatcher(Watcher):
    """Enters a tap in each attention module, and reduces what the tap sees. Keeps no q, k or weights.

    Which token is text, audio or padding is known before the layers run, except where the model itself expands the sequence: then the
    rows' mean over heads waits, within the budget, until the root's output tells; masses per head are not measured there.
    """

    name = "attention"
    on_host = frozenset({"enter"})

    def __init__(self, sites: Sequence[Site], breaker: Breaker, *, rows: int) -> None:
        """Watch the attention layers among the sites, about ``rows`` query rows a call; the breaker takes errors inside a tap."""
        self._layers = {site.name: site for site in sites if site.role == "attention"}
        self._breaker = breaker
        self._rows = rows
        self._fused = FusedRows()

    def cells(self) -> Sequence[Cell]:
        """Return a cell a layer. ``mismatch`` is of layers whose kernel had to be checked."""
        return [Cell(attention_cell(name), counts=("calls",), sums=COLUMNS, maxima=("mismatch",)) for name in self._layers]

    def sites(self) -> Sequence[str]:
        """Return the root (whose return may tell modalities) and the layers."""
        return ("", *self._layers) if self._layers else ()

    def enter(self, call: Call, buffer: StepBuffer) -> None:
        """At a layer, enter the tap."""
        if call.site.name == "":
            return
        name = call.site.name

        def see(source: RowSource) -> None:
            with buffer.meter.section(self.name, launches=True):
                self._see(call, source, buffer)

        def fail(error: Exception) -> None:
            if isinstance(error, NotObservable):
                buffer.totals.omit(attention_cell(name), str(error))
            else:
                self._breaker.trip(self.name, error, name)

        tap = AttentionTap(see, fail, num_heads=_heads_of(call), sinks=isinstance(getattr(call.module, "sinks", None), Tensor))
        call.entered.enter_context(tap)
        call.notes[self.name] = tap

    def leave(self, call: Call, buffer: StepBuffer) -> None:
        """At a layer, name it if the tap, which is left by now, saw nothing in it; at the root, finish what waited."""
        if call.site.name == "":
            for shared in call.micro.scratch.pop(_SHARED, {}).values():
                _settle(shared, buffer)
            for held in call.micro.scratch.pop(_HELD, ()):
                self._finish(held, call.micro, buffer)
            return
        tap = call.notes.pop(self.name, None)
        if tap is None:
            return
        buffer.totals.add(attention_cell(call.site.name), counts=(1,))
        if not tap.reported:
            kernel = getattr(getattr(call.module, "config", None), "_attn_implementation", None) or type(call.module).__name__
            reason = f"its kernel ({kernel}) returned no weights and called neither scaled_dot_product_attention nor softmax"
            buffer.totals.omit(attention_cell(call.site.name), reason)

    def _see(self, call: Call, source: RowSource, buffer: StepBuffer) -> None:
        """Reduce one attention call."""
        if self._breaker.is_off(self.name):
            return
        name, totals = attention_cell(call.site.name), buffer.totals
        _, heads, _, keys = source.shape
        query_BS, key_BK = modalities(call, source.shape)
        choice = self._choice(call, source, query_BS, salt=buffer.step or 0)
        shared = self._shared(call, source, choice, query_BS, key_BK, buffer)
        if not self._held(call, source, shared.prepared, buffer, known=query_BS is not None or key_BK is not None):
            shared.add(call.site, reduce_rows(source, shared.prepared, fused=self._fused))
            if shared.nbytes > _WAITING_BYTES:
                _settle(shared, buffer)
            if self._fused.failure is not None:
                totals.omit(FUSED, self._fused.failure)
        totals.tell(name, (heads, keys, source.how))
        check: Checked | None = getattr(source, "check", None)
        if check is not None:
            worst = check.mismatch(source, choice.index_BR).double().nan_to_num(nan=torch.inf)  # a maximum over ranks may lose a NaN
            totals.add(name, maxima=worst.reshape(1))

    def _shared(
        self, call: Call, source: RowSource, choice: RowChoice, query_BS: Tensor | None, key_BK: Tensor | None, buffer: StepBuffer
    ) -> _Shared:
        """Return what does not depend on q and k: that of the layer of the kind before this one, where it sees the same."""
        kind = call.site.kind
        known: dict[tuple[object, ...], _Shared] = call.micro.scratch.setdefault(_SHARED, {})
        key = (kind, source.shape)
        if key in known and known[key].fits(source, query_BS, key_BK):
            return known[key]
        prepared = prepare(
            source,
            choice,
            query_modality_BS=query_BS,
            key_modality_BK=key_BK,
            self_attention=kind != "cross",
            walks=kind in ("cross", "joint"),
        )
        if key in known:
            _settle(known[key], buffer)
        known[key] = _Shared(source.view, query_BS, key_BK, prepared)
        return known[key]

    def _held(self, call: Call, source: RowSource, prepared: Prepared, buffer: StepBuffer, *, known: bool) -> bool:
        """Hold the rows until the root returns, where that may tell more of them; return whether they are held."""
        if known or call.site.kind != "joint":
            return False
        nbytes = held_bytes(source.shape, prepared.choice)
        if not buffer.reserve(f"{attention_cell(call.site.name)}/{MODALITY}", nbytes):
            return False
        try:
            rows = describe_later(source, prepared)
        except Exception:
            buffer.release(nbytes)
            raise
        call.micro.scratch.setdefault(_HELD, []).append(_Held(call.site, rows, nbytes))
        return True

    def _choice(self, call: Call, source: RowSource, query_BS: Tensor | None, *, salt: int) -> RowChoice:
        """Choose rows once for all layers of a kind whose queries are the same; other steps (``salt``) look at other rows."""
        samples, _, queries, _ = source.shape
        key = ("rows", call.site.kind, samples, queries, query_BS is None, source.device)
        if key not in call.micro.scratch:
            known = None if query_BS is None else choose_rows(query_BS, rows=self._rows, salt=salt)
            call.micro.scratch[key] = known or choose_all_valid(samples, queries, self._rows, source.device, salt=salt)
        choice: RowChoice = call.micro.scratch[key]
        return choice

    def _finish(self, held: _Held, micro: MicroBatch, buffer: StepBuffer) -> None:
        buffer.release(held.nbytes)
        name = attention_cell(held.site.name)
        modality = late_modality(micro, held.site)
        samples, _, queries, keys = held.rows.shape
        fits = modality is not None and tuple(modality.shape) == (samples, queries) == (samples, keys)
        buffer.totals.omit(f"{name}/{PER_HEAD if fits else MODALITY}", _LATE if fits else _UNKNOWN)
        modality = modality if fits else None
        _add([held.site], finish_later(held.rows, modality, modality), buffer)


def _settle(shared: _Shared, buffer: StepBuffer) -> None:
    """Sum up the calls that wait."""
    found = shared.take()
    if found is not None:
        _add(*found, buffer)


def _add(sites: Sequence[Site], found: AttentionSums, buffer: StepBuffer) -> None:
    totals, names = buffer.totals, [attention_cell(site.name) for site in sites]
    totals.add_rows(names, sums=found.sums_LC)
    for name, sums_C, per_head_QH in zip(names, found.sums_LC.unbind(), found.per_head_LQH.unbind(), strict=True):
        for key, sums in ((f"own:{name}", sums_C), (f"heads:{name}", per_head_QH)):
            before = totals.local.get(key)
            buffer.put(key, sums if before is None else sums + before)
        known = totals.facts.get(f"headwise:{name}", found.headwise)
        totals.tell(f"headwise:{name}", tuple(what for what in known if what in found.headwise))


def _heads_of(call: Call) -> int | None:
    """Return the number of query heads that the module tells, or ``None``."""
    for holder in (call.module, getattr(call.module, "config", None)):
        for attribute in ("num_heads", "num_attention_heads", "n_heads"):
            value = getattr(holder, attribute, None)
            if isinstance(value, int):
                return value
    return None
