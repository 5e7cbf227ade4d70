"""Watches attention layers: probabilities before dropout for sampled query rows, reduced at once to entropy and mass."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from probe.capture.breaker import Breaker
from probe.capture.buffer import StepBuffer
from probe.capture.cells import Cell
from probe.capture.microbatch import MicroBatch
from probe.capture.observer import Call, Watcher
from probe.capture.tap import AttentionTap
from probe.measure.attention import COLUMNS, AttentionSums, HeadMeanRows, describe, describe_later, finish_later
from probe.measure.blocks import NotObservable, RowSource
from probe.measure.probabilities import all_rows
from probe.measure.rows import RowChoice, choose_all_valid, choose_rows
from probe.records import Site
from probe.sites.facts import ModelFacts
from probe.sites.modality import fold_frames, output_modality, sounding_frames, token_modality

_TOKENS, _FRAMES, _HELD = "modality of the tokens", "sounding frames", "attention rows held"


def attention_cell(site: str) -> str:
    """Return the name of the cell of an attention layer."""
    return f"attention:{site}"


@dataclass(frozen=True, slots=True)
class _Held:
    """Rows of one layer that wait for the modality of the tokens."""

    site: str
    rows: HeadMeanRows


class AttentionWatcher(Watcher):
    """Enters a tap in each attention module, and reduces what the tap sees. Keeps no q, k or weights.

    Which token is text, audio or padding is known before the layers run, except where the model itself expands the sequence: then the
    rows' mean over heads waits, within the budget, until the root's output tells; masses per head are not measured there.
    """

    name = "attention"

    def __init__(self, sites: Sequence[Site], facts: ModelFacts, breaker: Breaker, *, rows: int) -> None:
        """Watch the attention layers among the sites, about ``rows`` query rows a call; the breaker takes errors inside a tap."""
        self._layers = {site.name: site for site in sites if site.role == "attention"}
        self._facts = facts
        self._breaker = breaker
        self._rows = rows

    def cells(self) -> Sequence[Cell]:
        """Return a cell a layer."""
        return [Cell(attention_cell(name), counts=("calls",), sums=COLUMNS) for name in self._layers]

    def sites(self) -> Sequence[str]:
        """Return the root (where modalities are known first, or last) and the layers."""
        return ("", *self._layers) if self._layers else ()

    def enter(self, call: Call, buffer: StepBuffer) -> None:
        """At the root, read modalities; at a layer, enter the tap."""
        if call.site.name == "":
            call.micro.scratch[_TOKENS] = token_modality(call.micro, self._facts)
            # Now, not when the encoder has run: SpecAugment overwrites the features in place.
            call.micro.scratch[_FRAMES] = sounding_frames(call.micro)
            return
        name = call.site.name

        def see(attention: RowSource) -> None:
            self._see(call.site, attention, call.micro, buffer)

        def fail(error: Exception) -> None:
            if isinstance(error, NotObservable):
                buffer.totals.omit(attention_cell(name), str(error))
            else:
                self._breaker.trip(self.name, error, name)

        tap = AttentionTap(see, fail, num_heads=_heads_of(call))
        tap.__enter__()  # type: ignore[no-untyped-call]
        call.notes[self.name] = tap

    def leave(self, call: Call, buffer: StepBuffer) -> None:
        """At a layer, leave the tap and name a layer it saw nothing in; at the root, finish what waited."""
        if call.site.name == "":
            for held in call.micro.scratch.pop(_HELD, ()):
                self._finish(held, call.micro, buffer)
            return
        tap = call.notes.pop(self.name, None)
        if tap is None:
            return
        tap.__exit__(None, None, None)
        buffer.totals.add(attention_cell(call.site.name), counts=(1,))
        if not tap.reported:
            kernel = getattr(getattr(call.module, "config", None), "_attn_implementation", None) or type(call.module).__name__
            reason = f"its kernel ({kernel}) returned no weights and called neither scaled_dot_product_attention nor softmax"
            buffer.totals.omit(attention_cell(call.site.name), reason)

    def _see(self, site: Site, attention: RowSource, micro: MicroBatch, buffer: StepBuffer) -> None:
        """Reduce one attention call."""
        if self._breaker.is_off(self.name):
            return
        samples, heads, queries, keys = attention.shape
        if not (samples and queries and keys):
            buffer.totals.omit(attention_cell(site.name), f"an empty call: {samples} samples, {queries} queries, {keys} keys")
            return
        query_BS, key_BK = self._modalities(site, micro, attention.shape)
        choice = self._choice(query_BS, attention, micro, salt=buffer.step or 0)
        rows = all_rows(attention, choice.index_BR)
        buffer.totals.tell(attention_cell(site.name), (heads, keys, rows.how))
        if query_BS is None and key_BK is None and self._facts_come_later(site):
            held = describe_later(rows, choice)
            if buffer.reserve(attention_cell(site.name), held.nbytes):
                micro.scratch.setdefault(_HELD, []).append(_Held(site.name, held))
            return
        self._add(site.name, describe(rows, choice, query_modality_BS=query_BS, key_modality_BK=key_BK), buffer)

    def _modalities(self, site: Site, micro: MicroBatch, shape: tuple[int, int, int, int]) -> tuple[Tensor | None, Tensor | None]:
        """Return the modality of queries (B, S) and keys (B, K), ``None`` where it is not known."""
        samples, _, queries, keys = shape
        tokens, frames = micro.scratch.get(_TOKENS), micro.scratch.get(_FRAMES)

        def of_tokens(length: int) -> Tensor | None:
            return tokens if tokens is not None and tuple(tokens.shape) == (samples, length) else None

        def of_frames(length: int) -> Tensor | None:
            return None if frames is None else fold_frames(frames, frames=length, clips=samples)

        if site.kind == "encoder":
            return of_frames(queries), of_frames(keys)
        if site.kind == "cross":
            return of_tokens(queries), of_frames(keys)
        return of_tokens(queries), of_tokens(keys)

    def _facts_come_later(self, site: Site) -> bool:
        """Tell whether the root's output may tell the modality of this layer's tokens."""
        return site.kind == "joint"

    def _choice(self, query_BS: Tensor | None, attention: RowSource, micro: MicroBatch, *, salt: int) -> RowChoice:
        """Choose rows once for all layers whose queries are the same; other steps (``salt``) look at other rows."""
        samples, _, queries, _ = attention.shape
        key = ("rows", id(query_BS), samples, queries)
        if key not in micro.scratch:
            known = None if query_BS is None else choose_rows(query_BS, rows=self._rows, salt=salt)
            chosen = known or choose_all_valid(samples, queries, self._rows, attention.device, salt=salt)
            micro.scratch[key] = (chosen, query_BS)  # the tensor is kept so that its id stays its own
        choice: RowChoice = micro.scratch[key][0]
        return choice

    def _finish(self, held: _Held, micro: MicroBatch, buffer: StepBuffer) -> None:
        buffer.release(held.rows.nbytes)
        modality = output_modality(micro)
        fits = modality is not None and modality.shape[1] == held.rows.choice.queries == held.rows.p_BRK.shape[-1]
        if not fits:
            modality = None
            buffer.totals.omit(
                f"{attention_cell(held.site)}/modality",
                "which of its tokens are audio is known neither from input_ids nor from the model's output; padding rows are counted in",
            )
        self._add(held.site, finish_later(held.rows, modality, modality), buffer)

    def _add(self, site: str, found: AttentionSums, buffer: StepBuffer) -> None:
        totals, name = buffer.totals, attention_cell(site)
        totals.add(name, sums=found.sums)
        buffer.put(f"own:{name}", found.sums + totals.local.get(f"own:{name}", 0.0))
        buffer.put(f"heads:{name}", found.per_head + totals.local.get(f"heads:{name}", 0.0))
        totals.tell(f"masses_per_head:{name}", found.masses_per_head)


def _heads_of(call: Call) -> int | None:
    """Return the number of query heads that the module tells, or ``None``."""
    for holder in (call.module, getattr(call.module, "config", None)):
        for attribute in ("num_heads", "num_attention_heads", "n_heads"):
            value = getattr(holder, attribute, None)
            if isinstance(value, int):
                return value
    return None
