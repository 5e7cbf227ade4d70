"""What is measured, part by part: the sizes of the full measurement, and of a quick one that only shows that it works."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from benchmarks.units import attention, compiled, gradients, growth, heads, host, memory, ranks, statistics
from benchmarks.units.targets import Target
from benchmarks.units.workloads import Workload, llama, qwen2_audio, whisper


@dataclass(frozen=True)
class Measured:
    """The rows of one part, as plain data, and its targets."""

    rows: Any
    targets: Sequence[Target]


Part = Callable[[torch.device], Measured]


def _rows(rows: Sequence[Any]) -> list[dict[str, Any]]:
    return [asdict(row) for row in rows]


def _statistics(device: torch.device, **sizes: Any) -> Measured:
    rows = statistics.bandwidths(device, **sizes)
    return Measured(_rows(rows), [statistics.target(rows, device)])


def _attention(device: torch.device, *, cases: Sequence[tuple[str, int]], rounds: int) -> Measured:
    rows, held = attention.attention_costs(device, cases=cases, rounds=rounds)
    return Measured({"time": _rows(rows), "memory": _rows(held)}, attention.target(rows, held))


def _heads(device: torch.device, **sizes: Any) -> Measured:
    rows = heads.head_costs(device, **sizes)
    return Measured(_rows(rows), [heads.target(rows)])


def _gradients(device: torch.device, **sizes: Any) -> Measured:
    rows = gradients.gradient_costs(device, **sizes)
    return Measured(_rows(rows), [gradients.target(rows)])


def _host(device: torch.device, *, loads: Sequence[Workload], rounds: int, sites: tuple[int, ...] = host.SITES) -> Measured:
    idle = host.idle_costs(device, sites=sites, rounds=rounds)
    wrapper = host.wrapper_cost(device, rounds=rounds)
    sizes = [host.sizes(load, device) for load in loads]
    rows = {"idle": _rows(idle), "training_step_wrapper_s": asdict(wrapper), "bytes": _rows(sizes)}
    return Measured(rows, [host.target(idle, wrapper)])


def _growth(device: torch.device, *, few: bool) -> Measured:
    if few:
        found = [
            growth.over_sites(device, layers=(1, 2, 4), rounds=3),
            growth.over_bytes(device, tokens=(64, 128, 256), rounds=3),
            growth.over_micro_batches(device, counts=(1, 2, 4), rounds=3),
        ]
        ageing = growth.along_a_run(device, late=40, span=10)
    else:
        found = [growth.over_sites(device), growth.over_bytes(device), growth.over_micro_batches(device)]
        ageing = growth.along_a_run(device)
    return Measured({"linear": _rows(found), "ageing": asdict(ageing)}, growth.targets(found, ageing))


def _compiled(device: torch.device, **sizes: Any) -> Measured:
    row = compiled.compiled_costs(device, **sizes)
    return Measured(asdict(row), [compiled.target(row)])


def _ranks(device: torch.device, **sizes: Any) -> Measured:
    worlds = sizes.pop("store_worlds", ranks.STORE_WORLDS)
    rows, store = ranks.reduce_costs(**sizes), ranks.store_costs(worlds=worlds)
    return Measured({"all_reduce": _rows(rows), "store": _rows(store)}, [ranks.target(rows)])


def _memory(device: torch.device, *, loads: Sequence[Workload]) -> Measured:
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    rows = [memory.extra_peak(load, device=device, dtype=dtype) for load in loads]
    return Measured(_rows(rows), [memory.target(rows)])


_GRID = (
    whisper("tiny", clips=1),
    whisper("tiny", clips=8, layers=2),
    whisper("base", clips=1),
    whisper("small", clips=2, layers=2),
    llama(vocabulary=262_144, rows=1, tokens=256),
    llama(vocabulary=1000, rows=1, tokens=2048),
    qwen2_audio(clips=1),
)
_SMALL = llama(vocabulary=300, rows=1, tokens=32, width=64)

PARTS: Mapping[str, Part] = {
    "memory": lambda device: _memory(device, loads=_GRID),
    "statistics": _statistics,
    "attention": lambda device: _attention(device, cases=(("tiny", 1), ("tiny", 4), ("base", 1), ("small", 1)), rounds=5),
    "heads": _heads,
    "gradients": _gradients,
    "host": lambda device: _host(device, loads=(whisper("tiny", clips=1), _SMALL), rounds=60),
    "ranks": _ranks,
    "compiled": _compiled,
    "growth": lambda device: _growth(device, few=False),
}
QUICK_PARTS: Mapping[str, Part] = {
    "memory": lambda device: _memory(device, loads=(_SMALL,)),
    "statistics": lambda device: _statistics(device, sizes_mib=(1, 16), rounds=3),
    "attention": lambda device: _attention(device, cases=(("tiny", 1),), rounds=2),
    "heads": lambda device: _heads(device, vocabularies=(1000, 4000), rows=64, rounds=3),
    "gradients": lambda device: _gradients(device, tensors=(5, 20), rounds=3),
    "host": lambda device: _host(device, loads=(_SMALL,), rounds=5, sites=(1, 20)),
    "growth": lambda device: _growth(device, few=True),
    "compiled": lambda device: _compiled(device, load=_SMALL, rounds=3, backend="aot_eager"),
    "ranks": lambda device: _ranks(device, worlds=(2,), columns=(6000,), rounds=5, store_worlds=(8, 64)),
}
