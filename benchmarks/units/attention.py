"""Attention rows at 1,500 keys against the layer's own forward: the first call of a kind in a micro-batch, later ones, and their memory."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import nn

import probe
from benchmarks.shapes import WHISPER
from benchmarks.units.memory import PartPeaks, curve, marked
from benchmarks.units.parts import Stopwatch, watched
from benchmarks.units.targets import Target
from benchmarks.units.timing import Estimate, now, ratio
from benchmarks.units.training import quiet
from benchmarks.units.workloads import whisper

ROWS, KEYS, LAYERS = 64, 1500, 4
SHARE, MEMORY_SHARE = 0.05, 1 / 20
KINDS = ("encoder", "decoder", "cross")
MIB = 1 << 20
_FIXED = "recomputing 64 of the rows and reducing them is a fixed cost a call; it weighs most where the layer itself is small"


@dataclass(frozen=True)
class AttentionRow:
    """What looking at one kind of attention layer takes.

    Attributes:
        size: Whisper's size.
        clips: Batch.
        kind: encoder (self-attention over 1,500 frames), decoder or cross (64 tokens over 1,500 frames).
        layer_ms: The layer's own forward: projections, kernel, output projection.
        first_ms: What the probe adds in the first call of a kind in a micro-batch, its share of what is done when the root returns in it.
        later_ms: In a later one.
        first: That over the layer's own forward.
        later: The same of later calls.
    """

    size: str
    clips: int
    kind: str
    layer_ms: float
    first_ms: float
    later_ms: float
    first: Estimate
    later: Estimate


@dataclass(frozen=True)
class AttentionMemory:
    """Extra memory of one encoder layer's rows at the peak, and what the full matrix of probabilities in fp32 would take."""

    size: str
    clips: int
    extra_mib: float
    matrix_mib: float


Costs: TypeAlias = "tuple[list[AttentionRow], list[AttentionMemory]]"


def attention_costs(
    device: torch.device, *, cases: Sequence[tuple[str, int]], rounds: int
) -> tuple[list[AttentionRow], list[AttentionMemory]]:
    """Measure Whisper shapes with SDPA; each has four layers, its own width and heads, and clips of 30 s."""
    rows: list[AttentionRow] = []
    memory: list[AttentionMemory] = []
    for size, clips in cases:
        found, most = _case(device, size, clips, rounds)
        rows += found
        memory.append(AttentionMemory(size, clips, most, clips * WHISPER[size].heads * KEYS * KEYS * 4 / MIB))
    return rows, memory


def _case(device: torch.device, size: str, clips: int, rounds: int) -> tuple[list[AttentionRow], float]:
    model, batch = whisper(size, clips=clips, layers=LAYERS).make()
    model.to(device)
    inputs = {key: tensor.to(device) for key, tensor in batch.items()}

    def step(p: probe.Probe | None) -> None:
        with nullcontext() if p is None else p.step():
            model(**inputs)  # its graph is dropped: only forwards are compared

    watch, layers = Stopwatch(device), _Layers(model, device)
    own: dict[str, list[float]] = {name: [] for name in layers.modules}
    added: dict[str, list[float]] = {name: [] for name in ("", *layers.modules)}
    with watched(watch.around), probe.attach(model, every=1, settings=quiet(attention_rows=ROWS)) as p:
        step(p)
        for _ in range(rounds):
            with layers.timed():
                step(None)
            watch.clear()
            step(p)
            for name, seconds in added.items():
                seconds.append(watch.by_site["attention", name])
            for name, seconds in own.items():
                seconds.append(layers.seconds[name])
    return _rows(size, clips, own, added), _peak_mib(device, model, step)


def _peak_mib(device: torch.device, model: nn.Module, step: Callable[[probe.Probe], None]) -> float:
    """Return the most that looking at one attention call took."""
    peaks = PartPeaks(device)
    around = peaks.around if device.type == "cuda" else marked
    with watched(around), probe.attach(model, every=1, settings=quiet(attention_rows=ROWS)) as p:
        step(p)
        if device.type == "cuda":
            step(p)
            return peaks.most["attention"] / MIB
        found = curve(lambda: step(p)).parts()
    return next(part.most_mib for part in found if part.name == "attention")


class _Layers:
    """The attention layers of a Whisper, by name, and a clock round their forwards."""

    def __init__(self, model: nn.Module, device: torch.device) -> None:
        self.modules = {name: module for name, module in model.named_modules() if name.endswith(("self_attn", "encoder_attn"))}
        self.seconds: dict[str, float] = {}
        self._device = device
        self._begin = 0.0

    @contextmanager
    def timed(self) -> Iterator[None]:
        """Note how long each layer's forward takes."""
        handles = []
        for name, module in self.modules.items():
            handles.append(module.register_forward_pre_hook(self._start))
            handles.append(module.register_forward_hook(partial(self._stop, name)))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _start(self, module: nn.Module, args: Any) -> None:
        self._begin = now(self._device)

    def _stop(self, name: str, module: nn.Module, args: Any, output: Any) -> None:
        self.seconds[name] = now(self._device) - self._begin


def _kind(name: str) -> str:
    return "cross" if name.endswith("encoder_attn") else "encoder" if ".encoder." in name else "decoder"


def _rows(size: str, clips: int, own: Mapping[str, Sequence[float]], added: Mapping[str, Sequence[float]]) -> list[AttentionRow]:
    """Return a row a kind, and one of all layers together.

    What is summed up for all layers when the root returns is shared out to them alike.
    """
    rows = []
    together = [seconds / len(own) for seconds in added[""]]
    each = {name: [mine + share for mine, share in zip(added[name], together, strict=True)] for name in own}
    for kind in KINDS:
        first, *later = [name for name in own if _kind(name) == kind]
        layer = statistics.median(seconds for name in (first, *later) for seconds in own[name])
        again = [a for name in later for a in each[name]]
        over = [b for name in later for b in own[name]]
        rows.append(
            AttentionRow(
                size,
                clips,
                kind,
                layer * 1e3,
                statistics.median(each[first]) * 1e3,
                statistics.median(again) * 1e3,
                ratio(each[first], own[first]),
                ratio(again, over),
            )
        )
    plain = [sum(each) for each in zip(*own.values(), strict=True)]
    whole = [sum(each) for each in zip(*added.values(), strict=True)]
    share = ratio(whole, plain)
    middle = statistics.median(whole) * 1e3
    return [*rows, AttentionRow(size, clips, "all layers", statistics.median(plain) * 1e3, middle, middle, share, share)]


def target(rows: Sequence[AttentionRow], memory: Sequence[AttentionMemory]) -> list[Target]:
    """Judge time by the encoder's layers, whose forward has 1,500 queries as well as 1,500 keys, and memory by the worst case."""
    encoder = [row for row in rows if row.kind == "encoder"]
    later, first = max(encoder, key=lambda row: row.later.median), max(encoder, key=lambda row: row.first.median)
    whole = max((row for row in rows if row.kind == "all layers"), key=lambda row: row.first.median)
    share = max(memory, key=lambda one: one.extra_mib / one.matrix_mib)
    met = max(first.first.median, later.later.median) <= SHARE
    said = (
        f"first call of a kind {first.first.text(scale=100, unit='%')} ({first.size}, {first.clips} clips), later calls "
        f"{later.later.text(scale=100, unit='%')} ({later.size}, {later.clips} clips); all layers of a model together, the decoder's short "
        f"ones included, {whole.first.text(scale=100, unit='%')} ({whole.size}, {whole.clips} clips)"
    )
    time_target = Target(
        "attention rows at 1,500 keys, 64 rows: time",
        f"<= {SHARE:.0%} of the layer's own forward",
        said,
        met,
        "" if met else f"{_FIXED}{_kept_by(encoder)}",
    )
    within = share.extra_mib <= MEMORY_SHARE * share.matrix_mib
    held = Target(
        "attention rows at 1,500 keys, 64 rows: memory",
        "<= 1/20 of the full matrix",
        f"1/{share.matrix_mib / max(share.extra_mib, 1e-9):.0f} at worst ({share.extra_mib:.2g} of {share.matrix_mib:.3g} MiB; "
        f"{share.size}, {share.clips} clips)",
        within,
        "" if within else "the matrix of few clips and heads is small itself, and blocks of rows are bounded by a fixed size",
    )
    return [time_target, held]


def _kept_by(rows: Sequence[AttentionRow]) -> str:
    """Name the models and batches whose layers keep the bound in first and later calls, with these shares."""
    kept = [row for row in rows if max(row.first.median, row.later.median) <= SHARE]
    told = ", ".join(f"{row.size} with {row.clips} clips ({row.first.median:.1%}, later {row.later.median:.1%})" for row in kept)
    return f"; the bound is kept by {told}" if kept else ""
