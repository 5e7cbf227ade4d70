"""One model measured: its contenders in groups that fit into memory, counted, paired, and put into rows."""

from __future__ import annotations

import gc
import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch

from benchmarks.overhead.contenders import Contender, Watched, plain
from benchmarks.overhead.counting import Counts, count, peak_mib
from benchmarks.overhead.entry import Entry, Mixin, Setting, copy_bytes, parameters_of
from benchmarks.overhead.pairing import Plan, least_pairs, pair_up
from benchmarks.overhead.ratios import Pair, cycle_ratio
from benchmarks.overhead.results import ModelResult, Row
from benchmarks.overhead.subjects import Subject
from probe.sites.discovery import discover

_OWN_STEPS = 6
Say = Callable[[str], None]


@dataclass(frozen=True)
class Budget:
    """What one model may use: see :class:`Plan`; ``memory`` in bytes is for the contenders' weights and optimizer states."""

    pairs: tuple[int, int]
    seconds: float
    memory: float


@dataclass
class Found:
    """What has been measured of one model so far, by contender."""

    pairs: dict[str, list[Pair]] = field(default_factory=dict)
    counts: dict[str, Counts] = field(default_factory=dict)
    peaks: dict[str, float] = field(default_factory=dict)
    errors: dict[str, str] = field(default_factory=dict)
    plain_seconds: list[float] = field(default_factory=list)
    own: list[float] = field(default_factory=list)
    sites: int = 0
    batch: str = ""


def measure(
    subject: Subject, chosen: Sequence[Contender], budget: Budget, *, device: str, say: Say = print, mixin: Mixin = None
) -> Iterator[ModelResult]:
    """Measure contenders on one model, and yield after each group of them what has been measured so far.

    Args:
        subject: The model.
        chosen: The contenders; the plain one is always there.
        budget: How long, and how many at a time.
        device: ``"cpu"`` or ``"cuda"``.
        say: Receives a line of progress.
        mixin: See :class:`Setting`.
    """
    setting, found = Setting(subject, device, mixin), Found()
    grouped = groups(chosen, at_most=max(1, int(budget.memory / copy_bytes(parameters_of(subject))) - 1))
    work = [sum(least_pairs(contender, budget.pairs) for contender in group) for group in grouped]
    done: list[Contender] = []
    for group, part in zip(grouped, work, strict=True):
        say(f"{subject.title}: {', '.join(contender.name for contender in group)}")
        _measure_group(group, setting, Plan(budget.pairs, budget.seconds * part / sum(work)), found, say)
        done += group
        yield _result(setting, found, [contender for contender in chosen if contender in done])


def _result(setting: Setting, found: Found, done: Sequence[Contender]) -> ModelResult:
    subject, reference, steps = setting.subject, found.counts["plain"], found.plain_seconds
    return ModelResult(
        name=subject.name,
        title=subject.title,
        batch=found.batch,
        parameters=parameters_of(subject),
        precision="float32" if setting.device == "cpu" else "bfloat16 autocast",
        sites=found.sites,
        plain_ms=1e3 * statistics.median(steps) if steps else math.nan,
        kernels=reference.kernels,
        views=reference.views,
        syncs=reference.syncs,
        peak_mib=found.peaks["plain"],
        rows=[_row(contender, found) for contender in done],
        own_pct=statistics.mean(found.own) if found.own else None,
        own_records=len(found.own),
        small=subject.small,
    )


def groups(chosen: Sequence[Contender], *, at_most: int) -> list[list[Contender]]:
    """Divide contenders into groups of at most so many, each apart from the others that wants to be; those come last."""
    together = [contender for contender in chosen if not contender.apart]
    number = math.ceil(len(together) / at_most)
    size = math.ceil(len(together) / number) if number else 1
    return [
        *(list(together[begin : begin + size]) for begin in range(0, len(together), size)),
        *([contender] for contender in chosen if contender.apart),
    ]


def _measure_group(group: Sequence[Contender], setting: Setting, plan: Plan, found: Found, say: Say) -> None:
    with ExitStack() as stack:
        base = Entry(plain(), setting)
        stack.callback(base.close)
        base.start()
        _look(base, setting, found)
        _count(base, found)
        entries: dict[str, Entry] = {}
        for contender in group:
            try:
                entry = Entry(contender, setting)
                stack.callback(_closed, entry, found)
                entry.start()
                _count(entry, found)
                entries[contender.name] = entry
            except Exception as error:
                _failed(found, contender.name, error)
        gc.collect()
        gc.freeze()  # the copies of the model are not looked through by the collector in anybody's step
        stack.callback(gc.unfreeze)
        pairs, plain_seconds = pair_up(base, entries, plan, failed=lambda name, error: _failed(found, name, error), say=say)
        found.pairs.update(pairs)
        found.plain_seconds += plain_seconds
        for name, entry in entries.items():
            troubles = entry.companion.troubles()
            if troubles:
                found.errors[name] = "; ".join(troubles)
        if "sampled" in entries and "sampled" not in found.errors:
            found.own = _own_share(entries["sampled"])


def _count(entry: Entry, found: Found) -> None:
    """Warm up, and where it has not been done yet, count one step and weigh another."""
    name = entry.contender.name
    for _ in range(entry.companion.warm_up):
        entry.turn()
    if name not in found.counts:
        found.counts[name], found.peaks[name] = entry.turn(count), entry.turn(peak_mib)


def _look(base: Entry, setting: Setting, found: Found) -> None:
    found.sites = len(discover(base.trainer.model).modules)
    size = setting.subject.batch_size(setting.device)
    sample = setting.subject.sample(torch.Generator().manual_seed(0))
    shown = (key for key in sample if key in ("input_features", "labels"))
    found.batch = " and ".join(str((size, *sample[key].shape)) for key in shown)


def _own_share(entry: Entry) -> list[float]:
    """Return ``probe/overhead/pct`` of steps that ran one after the other, the first left out: its wall time is others', too."""
    companion = entry.companion
    assert isinstance(companion, Watched)
    for _ in range(_OWN_STEPS):
        entry.turn()
    last = entry.runner.steps
    records = [record for record in companion.records() if last - _OWN_STEPS + 1 < record.step <= last]
    return [record.metrics["probe/overhead/pct"] for record in records if "probe/overhead/pct" in record.metrics]


def _closed(entry: Entry, found: Found) -> None:
    """End an entry; what goes wrong at its end is noted, and leaves the others' figures alone."""
    try:
        entry.close()
    except Exception as error:
        _failed(found, entry.contender.name, error)


def _failed(found: Found, name: str, error: Exception) -> None:
    first = str(error).strip().splitlines()
    found.errors.setdefault(name, f"{type(error).__name__}: {first[0] if first else ''}"[:300])


def _row(contender: Contender, found: Found) -> Row:
    name, pairs = contender.name, found.pairs.get(contender.name, [])
    common: dict[str, Any] = {"name": name, "title": contender.title, "gives": contender.gives}
    if name in found.errors or not pairs:
        return Row(**common, error=found.errors.get(name, "no step was measured"))
    reference, counts = found.counts["plain"], found.counts[name]
    return Row(
        **common,
        ratio=cycle_ratio(pairs, every=max(1, contender.every)),
        step_ms=1e3 * statistics.median(pair.contender for pair in pairs),
        kernels=counts.kernels - reference.kernels,
        views=counts.views - reference.views,
        syncs=counts.syncs - reference.syncs,
        peak_mib=found.peaks[name] - found.peaks["plain"],
    )
