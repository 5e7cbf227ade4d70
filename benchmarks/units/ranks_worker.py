"""One of the gloo processes: times the probe's own reduction of packed columns. Usage: ranks_worker.py FOLDER ROUNDS COLUMNS..."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist

from probe.merge.ranks import Ranks


def main() -> None:
    """Reduce each size so many times, a barrier before each; rank 0 writes its times."""
    folder, rounds, *columns = sys.argv[1:]
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
    place = Ranks(dist.get_rank(), dist.get_world_size())
    times: dict[str, list[float]] = {}
    for count in columns:
        # As in a model's layout, about a quarter of the columns are maxima.
        sums = torch.ones(int(count) * 3 // 4, dtype=torch.float64)
        maxima = torch.ones(int(count) // 4, dtype=torch.float64)
        times[count] = []
        for i in range(int(rounds) + 3):
            dist.barrier()
            begin = time.perf_counter()
            place.reduce(sums.fill_(1.0), maxima)
            if i >= 3:
                times[count].append(time.perf_counter() - begin)
    if place.rank == 0:
        (Path(folder) / "times.json").write_text(json.dumps(times), encoding="utf-8")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
