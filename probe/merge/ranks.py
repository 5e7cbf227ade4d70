"""Ranks: do all of them watch the same cells in the same steps, and how their sums become one.

Collectives hang when one rank does not take part, and scripts do attach on one rank only. So the ranks agree first, at train begin,
through the store of the process group (a few keys, no collective): only when every rank has said the same do the all-reduces of
sampled steps run; else each rank keeps to its own numbers, and says so.

An agreement is settled once, by the first rank that claims it (an atomic addition), so that a rank that gave up waiting and one that
came late never act on different answers. How many agreements are settled stands in the store, not in the processes: ranks that saw a
different number of trainings still meet in the same one.
"""

from __future__ import annotations

import json
import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

from probe.foreign.torch_store import default_store

if TYPE_CHECKING:
    from probe.foreign.torch_store import Store

# Preparing the model for DDP has just made the ranks meet; what may lie between is the reading of a checkpoint.
_PATIENCE = timedelta(seconds=30)
_SHORTEST_PAUSE_S, _LONGEST_PAUSE_S = 0.001, 0.25
_KEYS = "probe/agreement"
_AGREED = "agreed"
_SHOWN = 8  # ranks named in a reason
FAILED = "failed: "


@dataclass(frozen=True, slots=True)
class Ranks:
    """This process among the processes of the training.

    Attributes:
        rank: 0 … world - 1.
        world: Number of processes.
        merged: Whether sums are combined over all ranks (always true when there is one).
        reason: Why they are not; "" if they are.
    """

    rank: int = 0
    world: int = 1
    merged: bool = True
    reason: str = ""

    def device(self, device: torch.device) -> torch.device:
        """Return where the packed buffer must be for the collectives: the CPU under gloo, else the given device."""
        if self.world > 1 and self.merged and dist.get_backend() == "gloo":
            return torch.device("cpu")
        return device

    def reduce(self, sums: Tensor, maxima: Tensor) -> None:
        """Combine sums and maxima over all ranks in place: two all-reduces, of the same size on every rank."""
        dist.all_reduce(sums, op=dist.ReduceOp.SUM)
        dist.all_reduce(maxima, op=dist.ReduceOp.MAX)

    def any(self, wish: bool, device: torch.device) -> bool:
        """Tell whether any rank wishes something: one all-reduce of one number if ranks are merged. Waits for it."""
        if self.world == 1 or not self.merged:
            return wish
        wishes = torch.full((1,), float(wish), device=self.device(device))
        dist.all_reduce(wishes, op=dist.ReduceOp.MAX)
        return bool(wishes.cpu()[0] > 0)


def here() -> Ranks:
    """Return this process among the others, before they have agreed on anything."""
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return Ranks()
    return Ranks(dist.get_rank(), dist.get_world_size(), False, "the ranks have not agreed yet")


def agree(fingerprint: str, *, every: Collection[int] = (), stop_on: str | None = None, patience: timedelta | None = None) -> Ranks:
    """Find out whether every rank watches the same cells in the same steps, and may stop. Waits for the slowest rank. Never raises.

    Rank 0 collects what the others say and settles one decision for all of them.

    Args:
        fingerprint: Digest of this rank's layout, or :data:`FAILED` and the reason why this rank observes nothing.
        every: The cadences whose union says which steps are sampled.
        stop_on: The severity of findings at which training is to end: if some rank has one, all meet to decide.
        patience: How long rank 0 waits for the others; the others wait twice as long for its decision. Default: 30 s.

    Returns:
        This rank's place, and whether sums are merged: the same answer on every rank that took part.
    """
    alone = here()
    if alone.merged:
        return alone
    rank, world = alone.rank, alone.world
    said = json.dumps([fingerprint, sorted(every), stop_on])
    try:
        reason = _settle(default_store(), rank, world, said, _PATIENCE if patience is None else patience)
    except Exception as error:  # no store (MPI), or one whose server is gone: neither may stop the training
        reason = f"the process group's store failed ({type(error).__name__}: {error}): each rank has its own numbers only"
    return Ranks(rank, world, not reason, reason)


def _settle(store: Store, rank: int, world: int, said: str, patience: timedelta) -> str:
    """Take part in the agreement that is open; return why the ranks are not merged, or ""."""
    prefix = f"{_KEYS}/{store.add(f'{_KEYS}/settled', 0)}"
    decision = f"{prefix}/decision"
    store.set(f"{prefix}/{rank}", said)
    if rank == 0:
        others = [f"{prefix}/{other}" for other in range(1, world)]
        if _appear(store, others, patience):
            _claim(store, prefix, _compare(said, [store.get(key).decode() for key in others]))
        else:
            _claim(store, prefix, f"{_absent(store, others)} did not begin training with a probe within {_seconds(patience)}")
    elif not _appear(store, [decision], 2 * patience):
        _claim(store, prefix, f"rank 0 did not begin training with a probe within {_seconds(2 * patience)}")
    if not _appear(store, [decision], patience):
        return "the rank that settles for all of them has gone: each rank has its own numbers only"
    settled = store.get(decision).decode()
    return "" if settled == _AGREED else f"{settled}: each rank has its own numbers only"


def _claim(store: Store, prefix: str, decision: str) -> None:
    """Settle the agreement, unless another rank has claimed it."""
    if store.add(f"{prefix}/claims", 1) == 1:
        # Counted first: a rank that has read the decision must find the next agreement open.
        store.add(f"{_KEYS}/settled", 1)
        store.set(f"{prefix}/decision", decision)


def _appear(store: Store, keys: Sequence[str], patience: timedelta) -> bool:
    """Wait until all keys are in the store; ``False`` if they are not within ``patience``.

    Asks again and again, because ``Store.wait`` keeps every other thread from a TCPStore (NCCL's watchdog uses the same one), cannot
    be interrupted, and raises another exception with every kind of store.
    """
    end = time.monotonic() + patience.total_seconds()
    pause = _SHORTEST_PAUSE_S
    while not store.check(list(keys)):
        if time.monotonic() > end:
            return False
        time.sleep(pause)
        pause = min(2 * pause, _LONGEST_PAUSE_S)
    return True


def _compare(mine: str, others: Sequence[str]) -> str:
    """Return :data:`_AGREED`, or how some rank differs from rank 0."""
    watched, every, stop_on = json.loads(mine)
    said = [json.loads(other) for other in others]
    for rank, (what, *_) in enumerate([(watched, every), *said]):
        if what.startswith(FAILED):
            return f"the probe of rank {rank} {what}"
    sites = [rank for rank, (what, *_) in enumerate(said, start=1) if what != watched]
    if sites:
        return f"ranks {sites[:_SHOWN]} watch other sites than rank 0"
    steps = [rank for rank, (_, cadences, _) in enumerate(said, start=1) if cadences != every]
    if steps:
        return f"ranks {steps[:_SHOWN]} sample other steps than rank 0 (every {every})"
    stops = [rank for rank, (*_, severity) in enumerate(said, start=1) if severity != stop_on]
    if stops:
        return f"ranks {stops[:_SHOWN]} have another stop_on than rank 0 ({stop_on!r})"
    return _AGREED


def _absent(store: Store, keys: Sequence[str]) -> str:
    """Name the ranks that have said nothing."""
    absent = [key.rsplit("/", 1)[1] for key in keys if not store.check([key])]
    return f"rank {', '.join(absent[:_SHOWN])}{' and others' if len(absent) > _SHOWN else ''}"


def _seconds(patience: timedelta) -> str:
    return f"{patience.total_seconds():g} s"
