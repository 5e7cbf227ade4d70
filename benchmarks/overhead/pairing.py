"""Steps of several contenders, each next to a plain one, in random order, for as long as there is time."""

from __future__ import annotations

import gc
import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from benchmarks.overhead.contenders import Contender
from benchmarks.overhead.entry import Entry
from benchmarks.overhead.ratios import Pair

_TOGETHER = 3
"""Contenders that share one plain step at most: what drifts more slowly than four steps last has no part in their ratios."""

_SILENCE_S = 60


@dataclass(frozen=True)
class Plan:
    """How long to measure.

    Attributes:
        pairs: Pairs at least: of a contender that takes part in every round, and of any other.
        seconds: Time that the rounds have together; what ``pairs`` needs is done even if it takes longer.
        seed: Of the order.
    """

    pairs: tuple[int, int]
    seconds: float
    seed: int = 0


def least_pairs(contender: Contender, pairs: tuple[int, int]) -> int:
    """Return how many pairs a contender has at least; of ``pairs`` the first are for those of every round, the second for others."""
    often, rare = pairs
    return max(1, min(often if contender.often else rare, contender.most, often))


def pair_up(
    plain: Entry,
    entries: Mapping[str, Entry],
    plan: Plan,
    *,
    failed: Callable[[str, Exception], None],
    say: Callable[[str], None] = lambda line: None,
) -> tuple[dict[str, list[Pair]], list[float]]:
    """Run the contenders' steps beside plain ones.

    Returns:
        The pairs of each contender, and the seconds of all plain steps.

    Args:
        plain: The plain Trainer.
        entries: The contenders by name, warm.
        plan: How long.
        failed: Told of a contender whose step raised; it takes no further part.
        say: Receives a line of progress every now and then.
    """
    rng = random.Random(plan.seed)
    running = dict(entries)
    wanted = {name: least_pairs(entry.contender, plan.pairs) for name, entry in running.items()}
    rounds = max(wanted.values(), default=0)
    pairs: dict[str, list[Pair]] = {name: [] for name in entries}
    plain_seconds: list[float] = []
    end, i, said = time.monotonic() + plan.seconds, 0, time.monotonic()
    while running and (i < rounds or time.monotonic() < end):
        if time.monotonic() > said + _SILENCE_S:
            said = time.monotonic()
            say(f"round {i} of {rounds} at least")
        due = [name for name in running if (i + 1) * wanted[name] // rounds > i * wanted[name] // rounds]
        rng.shuffle(due)
        for begin in range(0, len(due), _TOGETHER):
            block = _block(plain, {name: running[name] for name in due[begin : begin + _TOGETHER]}, rng)
            plain_seconds.append(block.plain)
            for name, pair in block.pairs.items():
                pairs[name].append(pair)
            for name, error in block.errors.items():
                del running[name]
                failed(name, error)
            gc.collect()  # outside of any step: else what one left behind is collected in another's time
        i += 1
    return pairs, plain_seconds


@dataclass(frozen=True)
class _Block:
    plain: float
    pairs: dict[str, Pair]
    errors: dict[str, Exception]


def _block(plain: Entry, entries: Mapping[str, Entry], rng: random.Random) -> _Block:
    order: Sequence[Entry] = [plain, *entries.values()]
    rng.shuffle(order := list(order))
    seconds: dict[int, float] = {}
    errors: dict[str, Exception] = {}
    for entry in order:
        try:
            seconds[id(entry)] = entry.turn()
        except Exception as error:
            if entry is plain:
                raise
            errors[entry.contender.name] = error
    pairs = {
        name: Pair(entry.runner.steps, seconds[id(entry)], seconds[id(plain)]) for name, entry in entries.items() if id(entry) in seconds
    }
    return _Block(seconds[id(plain)], pairs, errors)
