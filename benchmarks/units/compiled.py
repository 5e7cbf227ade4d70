"""What a compiled model's step takes with ``compile="in_graph"``, sampled and not, and with ``compile="window"``, sampled."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass

import torch

import probe
from benchmarks.units.targets import Target
from benchmarks.units.timing import Estimate, difference, interleaved, ratio
from benchmarks.units.training import quiet
from benchmarks.units.workloads import Workload, llama

NEVER = 10**9
LOAD = llama(vocabulary=8_000, rows=2, tokens=256, width=512, layers=4)
_SETTINGS = {"idle": (NEVER, "in_graph"), "sampled": (1, "in_graph"), "window": (1, "window")}


@dataclass(frozen=True)
class CompiledRow:
    """Steps of copies of one model whose layers are compiled one by one, ÷ those of a copy without a probe.

    Attributes:
        workload: The model and its batch.
        plain_ms: A step without a probe.
        sites: Sites inside compiled layers.
        idle: An unsampled step with ``in_graph``.
        idle_us_a_site: What it takes more, by site.
        sampled: A sampled step with ``in_graph``.
        window: A sampled step with ``window``, which runs eagerly.
    """

    workload: str
    plain_ms: float
    sites: int
    idle: Estimate
    idle_us_a_site: Estimate
    sampled: Estimate
    window: Estimate


def compiled_costs(device: torch.device, *, load: Workload = LOAD, rounds: int = 60, backend: str = "inductor") -> CompiledRow:
    """Train one copy a setting in changing order; each step is forward, backward and an SGD update."""
    steps: dict[str, Callable[[], None]] = {}
    with ExitStack() as stack:
        # Or the code that was compiled for the copy without a probe would serve the others, too, whose hooks it does not have.
        stack.enter_context(torch._dynamo.config.patch(skip_nnmodule_hook_guards=False))
        for kind in ("plain", *_SETTINGS):
            steps[kind], count = _step(kind, load, device, backend, stack)
            sites = count or 0
        times = interleaved(steps, rounds=rounds, device=device, warm_up=3)
    plain = times["plain"]
    more = difference(times["idle"], plain)
    scale = 1e6 / max(1, sites)
    return CompiledRow(
        load.name,
        statistics.median(plain) * 1e3,
        sites,
        ratio(times["idle"], plain),
        Estimate(more.median * scale, more.low * scale, more.high * scale),
        ratio(times["sampled"], plain),
        ratio(times["window"], plain),
    )


def _step(kind: str, load: Workload, device: torch.device, backend: str, stack: ExitStack) -> tuple[Callable[[], None], int]:
    """Return a step of one copy, and how many sites lie in its compiled layers."""
    model, batch = load.make()
    model.to(device).train()
    layers = model.model.layers
    for layer in layers:
        layer.compile(backend=backend)
    batch = {name: value.to(device) for name, value in batch.items()}
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    p = None
    if kind in _SETTINGS:
        every, mode = _SETTINGS[kind]
        p = stack.enter_context(probe.attach(model, every=every, compile=mode, settings=quiet()))

    def step() -> None:
        with ExitStack() as inside:
            if p is not None:
                inside.enter_context(p.step())
            model(**batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()

    step()  # compiles; the first step is sampled
    step()
    return step, 0 if p is None else sum(".layers." in f".{site.name}" for site in p.sites.sites)


def target(row: CompiledRow) -> Target:
    """Return the row; no bound is set for it."""
    said = (
        f"unsampled {row.idle.text()} × the compiled step, {row.idle_us_a_site.text(unit='us')} a site ({row.sites} sites, "
        f"{row.workload}, {row.plain_ms:.0f} ms); sampled {row.sampled.text()}; for comparison window, sampled: {row.window.text()}"
    )
    return Target('compile="in_graph" on a compiled model', "a row of its own", said, True, "no bound is set")
