"""What the host pays: an idle site, the wrapped ``training_step`` of an unsampled step, and the bytes of a step's numbers."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback

import probe
from benchmarks.scaling.layouts import Columns, columns
from benchmarks.units.targets import Target
from benchmarks.units.timing import Estimate, difference, interleaved
from benchmarks.units.training import quiet, trainer
from benchmarks.units.workloads import Workload

SITES = (1, 10, 100, 1000)
NEVER = 10**9
BOUND_NS = 1000.0


class Chain(nn.Module):
    """A model of ``sites`` identities, so that nothing but calling modules takes time."""

    def __init__(self, sites: int) -> None:
        """Make the chain, with one parameter in front."""
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4))
        self.layers = nn.ModuleList(nn.Identity() for _ in range(sites))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Pass ``x`` through all of it."""
        x = x * self.weight
        for layer in self.layers:
            x = layer(x)
        return {"loss": x.sum()}


@dataclass(frozen=True)
class IdleRow:
    """Sites that are attached but idle: what an unsampled step takes beyond the same step of a model without a probe."""

    sites: int
    plain_us: float
    ns_a_site: Estimate
    hooks: int


def idle_costs(device: torch.device, *, sites: tuple[int, ...] = SITES, rounds: int = 40) -> list[IdleRow]:
    """Measure each number of sites in a hand-written loop, forward and backward, plain and idle in changing order."""
    return [_idle(device, count, rounds) for count in sites]


def _idle(device: torch.device, count: int, rounds: int) -> IdleRow:
    models = {kind: Chain(count).to(device) for kind in ("plain", "idle")}
    x = torch.ones(4, device=device)
    with probe.attach(models["idle"], every=NEVER, sites={"custom": [f"layers.{i}" for i in range(count)]}, settings=quiet()) as p:

        def step(kind: str) -> None:
            with p.step() if kind == "idle" else nullcontext():
                models[kind](x=x)["loss"].backward()

        step("idle")  # the first step is sampled
        step("idle")
        calls = {kind: lambda kind=kind: step(kind) for kind in models}
        times = interleaved(calls, rounds=rounds, device=device, warm_up=3, repeat=max(1, 200 // count))
        hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in models["idle"].modules())
    more = difference(times["idle"], times["plain"])
    scale = 1e9 / count
    return IdleRow(
        count, statistics.median(times["plain"]) * 1e6, Estimate(more.median * scale, more.low * scale, more.high * scale), hooks
    )


class _Nothing(Trainer):
    """A Trainer whose ``training_step``, after the first step, returns at once: what is left is what stands round it."""

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        return super().training_step(*args, **kwargs) if self.state.global_step == 0 else torch.zeros(())


class _Wrapper(TrainerCallback):
    """Times the wrapped and the bare method in an unsampled step."""

    def __init__(self, device: torch.device, rounds: int) -> None:
        self.trainer: Trainer | None = None
        self.more: Estimate | None = None
        self._device, self._rounds = device, rounds

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step != 2 or self.trainer is None:
            return
        model: nn.Module = kwargs["model"]
        batch: dict[str, Tensor] = {}
        wrapped: Callable[..., Any] = self.trainer.training_step
        calls = {
            "wrapped": lambda: wrapped(model, batch, None),
            "bare": lambda: _Nothing.training_step(self.trainer, model, batch, None),
        }
        times = interleaved(calls, rounds=self._rounds, device=self._device, warm_up=3, repeat=200)
        self.more = difference(times["wrapped"], times["bare"])


def wrapper_cost(device: torch.device, *, rounds: int = 40) -> Estimate:
    """Return the seconds that the wrapped ``training_step`` of an unsampled step takes beyond the bare one.

    Raises:
        RuntimeError: if the method was not wrapped, so that there was nothing to measure.
    """
    model = Chain(2)
    callback = _Wrapper(device, rounds)
    with probe.attach(model, every=NEVER, settings=quiet()):
        made = trainer(model, {"x": torch.ones(4)}, steps=4, device=device, callbacks=[callback], kind=_Nothing)
        callback.trainer = made
        made.train()
    if callback.more is None:
        raise RuntimeError("training_step was never timed")
    return callback.more


@dataclass(frozen=True)
class Sizes:
    """Bytes of one model's sampled step.

    Attributes:
        workload: The model and its batch.
        columns: What the two all-reduces carry.
        packed_bytes: Of both all-reduces together.
        record_bytes: One record as a line of JSON: the median.
        folder_bytes: What the run folder grows by from one record to the next, findings included: the median.
    """

    workload: str
    columns: Columns
    packed_bytes: int
    record_bytes: float
    folder_bytes: float


class _Folder(TrainerCallback):
    """Notes the size of the run folder at the end of each step."""

    def __init__(self, folder: Path) -> None:
        self.sizes: list[int] = []
        self._folder = folder

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.sizes.append(sum(path.stat().st_size for path in self._folder.glob("*")))


def sizes(workload: Workload, device: torch.device, *, steps: int = 6) -> Sizes:
    """Train for a few sampled steps and look at what they left."""
    model, batch = workload.make()
    model.to(device)
    counted = columns(workload.name, model)
    folder = _Folder(Path(str((settings := quiet()).run_folder)))
    with probe.attach(model, every=1, settings=settings):
        trainer(model, batch, steps=steps, device=device, callbacks=[folder]).train()
    path = next(Path(str(settings.run_folder)).glob("records-*.jsonl"))
    lines = [len(line) + 1 for line in path.read_bytes().splitlines()]
    grown = [after - before for before, after in zip(folder.sizes[1:], folder.sizes[2:], strict=False)]
    packed = counted.sum_bytes + counted.maximum_bytes
    return Sizes(workload.name, counted, packed, statistics.median(lines), statistics.median(grown))


def target(rows: list[IdleRow], wrapper: Estimate) -> Target:
    """Judge the upper end of the interval where there are most sites."""
    most = rows[-1]
    per_site = (most.ns_a_site.high * most.sites + wrapper.high * 1e9) / most.sites
    met = per_site <= BOUND_NS and not any(row.hooks for row in rows)
    said = (
        f"{most.ns_a_site.text(unit='ns')} a site with {most.sites} sites; {sum(row.hooks for row in rows)} hooks stand; "
        f"the wrapped training_step takes {wrapper.text(scale=1e6, unit='us')} more, whatever the number of sites"
    )
    return Target("an unsampled step: host time", "< 1 us a site", said, met, "" if met else "the interval reaches beyond the bound")
