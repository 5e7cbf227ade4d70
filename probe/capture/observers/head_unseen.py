"""Scores of a head that the model does without, by evaluating the head itself on sampled rows of what would have gone into it.

Fused losses (Liger, for one) read the head's weight themselves: the head is never called and no logits are built. What is done here
happens inside the root's forward, where gathered weights are still whole.

Shapes: B samples, S positions, D width, V vocabulary, N rows, R picked rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from probe.capture.microbatch import MicroBatch
from probe.capture.observer import Call, main_tensor
from probe.capture.observers.head_cells import named_sums
from probe.capture.observers.head_scoring import Scored, by_codebook, change_of
from probe.foreign.sharding import is_whole
from probe.measure.chunks import MIB
from probe.measure.heads import COLUMNS, HeadScore, score
from probe.measure.picks import estimated, pick_rows, variance_of_estimate
from probe.measure.variants import Variant
from probe.records import Site
from probe.sites.facts import ModelFacts
from probe.sites.feeders import input_width
from probe.sites.heads import output_width
from probe.sites.labels import NotAligned, align
from probe.sites.laying import IGNORED, Aligned, Kept, asked_to_keep, is_index

ROWS = 256
"""Labelled positions of a micro-batch that a head is evaluated on at most."""

WITHOUT_HEAD = "the model computed its loss without the head"
_CHUNK_MIB = 10.0


@dataclass(frozen=True, slots=True)
class _Hidden:
    """The last output of what feeds a head, (B, S, D), and the dtype of the autocast it ran under (``None`` without)."""

    states: Tensor
    autocast: torch.dtype | None


class HeadEvaluator:
    """Evaluates heads that were not called, on the hidden states that would have gone into them.

    The head's own ``forward`` runs (LoRA and bias count) without its hooks, without dropout and without a graph, on at most ``ROWS``
    labelled positions of a micro-batch; sums are scaled to all of them. Extra memory stays below the bound of
    :mod:`probe.measure.heads`, except that autocast casts a float32 weight for each chunk, as it does in any forward of that head.
    """

    def __init__(self, modules: Mapping[str, nn.Module], feeders: Mapping[str, str], facts: ModelFacts) -> None:
        """Know the heads' modules by name, and by head the name of the module that feeds it."""
        self._modules, self._feeders, self._facts = modules, feeders, facts

    @property
    def watched(self) -> tuple[str, ...]:
        """Names of the modules whose calls are to be shown to :meth:`remember`."""
        return tuple(dict.fromkeys(self._feeders.values()))

    def remember(self, call: Call) -> None:
        """Hold what a feeding module returned until the root returns (autograd holds it for the backward anyway)."""
        states = main_tensor(call.output)
        if call.site.name in self._feeders.values() and states is not None:
            kind = states.device.type
            autocast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
            call.micro.scratch[_key(call.site.name)] = _Hidden(states.detach(), autocast)

    def forget(self, micro: MicroBatch) -> None:
        """Let go of what was remembered."""
        for name in self.watched:
            micro.scratch.pop(_key(name), None)

    def score(self, site: Site, micro: MicroBatch, salt: int, why: str = WITHOUT_HEAD) -> Scored | NotAligned | None:
        """Score a head whose logits are not there; ``None`` if there are no labels for it, or no hidden state is known. No sync.

        Args:
            site: The head.
            micro: The micro-batch, with the root's output.
            salt: Which rows are taken where there are more than ``ROWS``.
            why: Why the logits are not there.
        """
        hidden, module = micro.scratch.get(_key(self._feeders.get(site.name, ""))), self._modules[site.name]
        if hidden is None:
            return None
        states, width = _kept(hidden.states, micro), output_width(module)
        if states is None:
            return NotAligned(f"{why}, and of the positions that it was asked for, by a mask, only the device knows the number")
        if width is None or states.shape[-1] != (input_width(module) or states.shape[-1]):
            return NotAligned(f"{why}, and what feeds it, of shape {tuple(states.shape)}, does not go into it")
        aligned = align(states.new_zeros(()).expand(*states.shape[:-1], width), site=site, facts=self._facts, micro=micro)
        if isinstance(aligned, NotAligned):
            return None if aligned.absent else NotAligned(f"{why}, and {aligned.reason}")
        if not all(is_whole(parameter) for parameter in module.parameters()):
            return NotAligned(f"{why}, and this rank holds only a share of its weight")
        if not states.numel():
            return None
        try:
            sums, audit = _evaluate(site, module, _Hidden(states, hidden.autocast), aligned, facts=self._facts, salt=salt)
        except Exception as error:  # the head of any model: that it cannot be evaluated must not cost the other heads their numbers
            return NotAligned(f"{why}, and it cannot be evaluated by itself ({type(error).__name__}: {error})")
        return Scored(sums, audit, aligned.how, evaluated=why)


@dataclass(frozen=True, slots=True)
class _Picked:
    """The labels of the picked rows, by the way they are laid, (R,); how many each way has in all, and among the picked."""

    laid: Mapping[Variant, Tensor]
    rows: Mapping[Variant, Tensor]
    picked: Mapping[Variant, Tensor]


def _evaluate(
    site: Site, module: nn.Module, hidden: _Hidden, aligned: Aligned, *, facts: ModelFacts, salt: int
) -> tuple[dict[int | None, Tensor], dict[int | None, dict[Variant, Tensor]]]:
    """Return ``HEAD_COLUMNS`` and the audit's sums by codebook, estimated from the picked rows."""
    parts = by_codebook(site, aligned)
    mask_N = torch.zeros(hidden.states.shape[:-1].numel(), dtype=torch.bool, device=hidden.states.device)
    for part in parts.values():
        for laid in (part.labels, *part.others.values()):
            mask_N |= laid.reshape(-1) != IGNORED
    index_R, used_R = pick_rows(mask_N, most=ROWS, salt=salt)
    labels = {k: _pick(part, index_R, used_R) for k, part in parts.items()}
    states_RD = hidden.states.reshape(-1, hidden.states.shape[-1]).index_select(0, index_R)
    vocabulary = aligned.logits.shape[-1]
    step = max(1, int(_CHUNK_MIB * MIB // (16 * vocabulary * len(parts))))
    totals: dict[int | None, HeadScore] = {}
    for start in range(0, len(index_R), step):
        rows = slice(start, start + step)
        logits_RKV = _forward(module, states_RD[rows], hidden.autocast).reshape(-1, len(parts), vocabulary)
        for number, (k, picked) in enumerate(labels.items()):
            others: dict[Variant, Tensor] = {way: labels_R[rows] for way, labels_R in picked.laid.items() if way != "meant"}
            one = score(logits_RKV[:, number], picked.laid["meant"][rows], others=others, change=change_of(site, facts))
            totals[k] = _added(totals.get(k), one)
    sums = {k: _estimate(totals[k].sums, picked) for k, picked in labels.items()}
    audit = {
        k: {way: estimated(part, rows=picked.rows[way], picked=picked.picked[way]) for way, part in totals[k].audit.items()}
        for k, picked in labels.items()
    }
    return sums, audit


def _pick(part: Aligned, index_R: Tensor, used_R: Tensor) -> _Picked:
    ways: dict[Variant, Tensor] = {"meant": part.labels, **part.others}
    laid = {way: torch.where(used_R, labels.reshape(-1).index_select(0, index_R), IGNORED) for way, labels in ways.items()}
    rows = {way: (labels != IGNORED).sum() for way, labels in ways.items()}
    return _Picked(laid, rows, {way: (labels_R != IGNORED).sum() for way, labels_R in laid.items()})


def _added(known: HeadScore | None, more: HeadScore) -> HeadScore:
    if known is None:
        return more
    return HeadScore(known.sums + more.sums, {way: part + more.audit[way] for way, part in known.audit.items()}, more.predictions)


def _estimate(sums: Tensor, labels: _Picked) -> Tensor:
    """Return ``HEAD_COLUMNS`` from the sums over the picked rows."""
    whole = estimated(sums, rows=labels.rows["meant"], picked=labels.picked["meant"])
    seen, columns = dict(zip(COLUMNS, sums.unbind())), dict(zip(COLUMNS, whole.unbind()))
    labelled = columns["labelled"]
    variance = variance_of_estimate(seen["cross_entropy"], seen["squared_cross_entropy"], rows=labelled, picked=seen["labelled"])
    rows = dict.fromkeys(("correct_rows", "top5_rows", "entropy_rows"), labelled)
    return named_sums(sums.device, **columns, **rows, evaluated_rows=labels.picked["meant"], sampling_variance=variance)


def _forward(module: nn.Module, states_RD: Tensor, autocast: torch.dtype | None) -> Tensor:
    """Return the logits (1, R, V) of some rows: the module's own forward, without hooks and dropout, under its autocast."""
    kind = states_RD.device.type
    weight = next(module.parameters(), None)
    if autocast is None and weight is not None and weight.is_floating_point():
        states_RD = states_RD.to(weight.dtype)
    with ExitStack() as stack:
        stack.enter_context(_without_dropout(module))
        if autocast is not None:
            # Older torch would hand the graph-less cast of the weight, from its cache, to the model's own next call.
            stack.enter_context(torch.autocast(kind, dtype=autocast, cache_enabled=False))
        elif torch.is_autocast_enabled(kind):
            stack.enter_context(torch.autocast(kind, enabled=False))
        logits = main_tensor(module.forward(states_RD.unsqueeze(0)))
    if logits is None:
        raise TypeError(f"{type(module).__name__} returned no tensor")
    return logits


@contextmanager
def _without_dropout(module: nn.Module) -> Iterator[None]:
    """Set a head to evaluation while it is evaluated: dropout (LoRA has some) would draw random numbers."""
    training = [each for each in module.modules() if each.training]
    try:
        for each in training:
            each.training = False
        yield
    finally:
        for each in training:
            each.training = True


def _kept(states: Tensor, micro: MicroBatch) -> Tensor | None:
    """Return the hidden states of those positions that the model was asked the logits of; ``None`` if a mask names them."""
    asked = asked_to_keep(micro.inputs)
    if asked is None or states.dim() < 3:
        return states
    if isinstance(asked[1], Tensor):
        return Kept(asked[1]).of(states, 1) if is_index(asked[1]) else None
    return Kept(asked[1]).of(states, 1) if isinstance(asked[1], int) and 0 < asked[1] < states.shape[1] else states


def _key(feeder: str) -> str:
    return f"feeder:{feeder}"
