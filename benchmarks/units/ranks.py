"""Ranks: the time of the two all-reduces between gloo processes, and of rank 0's part of the agreement at train begin by world size."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from unittest import mock

import torch.distributed as dist

from benchmarks.units.targets import Target
from benchmarks.units.timing import Estimate, estimate
from probe.merge import ranks

ROOT = Path(__file__).parents[2]
WORLDS = (2, 4)
COLUMNS = (1_000, 6_000, 40_000)
STORE_WORLDS = (8, 64, 512, 4096, 16_384)
PATIENCE_S = 120
REQUESTS = 500
TIMES = "times.json"


@dataclass(frozen=True)
class ReduceRow:
    """The two all-reduces of a step between processes on one machine: float64 columns together, and what they took."""

    world: int
    columns: int
    ms: Estimate


@dataclass(frozen=True)
class StoreRow:
    """Rank 0's part of one agreement when all others have said theirs: it reads a key of each.

    ``request_us`` is what a client needs to ask once whether a key is there, as every other rank does while it waits.
    """

    world: int
    ms: Estimate
    request_us: float


def reduce_costs(*, worlds: Sequence[int] = WORLDS, columns: Sequence[int] = COLUMNS, rounds: int = 40) -> list[ReduceRow]:
    """Start so many gloo processes and let rank 0 say what the collectives took.

    Raises:
        RuntimeError: if the processes fail; with what they wrote.
    """
    return [row for world in worlds for row in _reduce(world, columns, rounds)]


def _reduce(world: int, columns: Sequence[int], rounds: int) -> list[ReduceRow]:
    with tempfile.TemporaryDirectory(prefix="probe-ranks-") as folder:
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "WORLD_SIZE": str(world)}
        worker = str(Path(__file__).with_name("ranks_worker.py"))
        command = [sys.executable, worker, folder, str(rounds), *map(str, columns)]
        started = [
            subprocess.Popen(command, env={**environment, "RANK": str(rank)}, stderr=subprocess.PIPE, text=True) for rank in range(world)
        ]
        try:
            errors = [process.communicate(timeout=PATIENCE_S)[1] for process in started]
        finally:
            for process in started:
                process.kill()
        if any(process.returncode for process in started):
            raise RuntimeError(f"a process failed: {''.join(errors)[-2000:]}")
        times = json.loads((Path(folder) / TIMES).read_text(encoding="utf-8"))
    return [ReduceRow(world, int(count), estimate([1e3 * seconds for seconds in each])) for count, each in times.items()]


def store_costs(*, worlds: Sequence[int] = STORE_WORLDS, rounds: int = 3) -> list[StoreRow]:
    """Time the very code of the agreement on a TCPStore of this machine, with the other ranks' keys set beforehand."""
    server = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    return [_store(server.port, world, rounds) for world in worlds]


def _store(port: int, world: int, rounds: int) -> StoreRow:
    times = []
    client = dist.TCPStore("127.0.0.1", port, is_master=False)
    said = json.dumps(["0" * 64, [100], None])
    for _ in range(rounds):
        opened = client.add("probe/agreement/settled", 0)
        for other in range(1, world):
            client.set(f"probe/agreement/{opened}/{other}", said)
        # The agreement asks torch for its process group; here it is handed the store and the place of rank 0.
        place = mock.patch.object(ranks, "here", return_value=ranks.Ranks(0, world, False, ""))
        with place, mock.patch.object(ranks, "default_store", return_value=client):
            begin = time.perf_counter()
            agreed = ranks.agree("0" * 64, every=(100,), patience=timedelta(seconds=PATIENCE_S))
            times.append(1e3 * (time.perf_counter() - begin))
        if not agreed.merged:
            raise RuntimeError(f"the ranks did not agree: {agreed.reason}")
    begin = time.perf_counter()
    for _ in range(REQUESTS):
        client.check(["probe/agreement/settled"])
    return StoreRow(world, estimate(times), 1e6 * (time.perf_counter() - begin) / REQUESTS)


def target(rows: Sequence[ReduceRow]) -> Target:
    """Say what the collectives take; how that goes on to many ranks is extrapolated on the page of scaling, not judged here."""
    said = ", ".join(
        f"{row.ms.text(unit='ms')} for {row.columns:,} columns on {row.world} ranks" for row in rows if row.columns == COLUMNS[1]
    )
    return Target(
        "growth: flat in ranks (two all-reduces of fixed size a sampled step)",
        "their number and size do not depend on the ranks",
        said + " (gloo, one machine)",
        None,
        "more ranks than this machine has cores share them; docs/scaling.md extrapolates",
    )
