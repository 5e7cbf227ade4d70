"""Ranks: do all of them watch the same cells, and how their sums become one.

Collectives hang when one rank does not take part, and scripts do attach on one rank only. So the ranks agree first, at train begin,
through the store of the process group (keys with a timeout, no collective): only when every rank has said the same layout do the
all-reduces of sampled steps run; else each rank keeps to its own numbers, and says so.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from probe.foreign.torch_store import default_store

_PATIENCE = timedelta(seconds=120)


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


def agree(fingerprint: str, *, train_call: int, patience: timedelta = _PATIENCE) -> Ranks:
    """Find out whether every rank watches the same cells. Waits for the slowest rank, at most ``patience``.

    Rank 0 collects what the others say and publishes one decision, so that all ranks act alike.

    Args:
        fingerprint: Digest of this rank's layout.
        train_call: Number of this ``train()`` call in the process: the keys of an earlier one are not read again.
        patience: How long rank 0 waits for the others; the others wait twice as long for its decision.
    """
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return Ranks()
    rank, world = dist.get_rank(), dist.get_world_size()
    store, prefix = default_store(), f"probe/layout/{train_call}"
    if rank != 0:
        store.set(f"{prefix}/{rank}", fingerprint)
        try:
            store.wait([f"{prefix}/decision"], 2 * patience)
        except dist.DistError:
            return Ranks(rank, world, False, f"rank 0 has no probe, or has not begun training within {2 * patience}")
    else:
        store.set(f"{prefix}/decision", _decide(store, prefix, world, fingerprint, patience))
    decision = store.get(f"{prefix}/decision").decode()
    return Ranks(rank, world, not decision, decision)


def _decide(store: dist.Store, prefix: str, world: int, fingerprint: str, patience: timedelta) -> str:
    try:
        store.wait([f"{prefix}/{rank}" for rank in range(1, world)], patience)
    except dist.DistError:
        return f"not every one of the {world} ranks attached a probe within {patience}: each rank has its own numbers only"
    others = {rank for rank in range(1, world) if store.get(f"{prefix}/{rank}").decode() != fingerprint}
    return f"ranks {sorted(others)} watch other sites than rank 0: each rank has its own numbers only" if others else ""
