"""The page of the benchmark: results in, Markdown out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.overhead.ratios import Ratio
from benchmarks.overhead.results import ModelResult, Results, Row
from benchmarks.overhead.targets import spread, targets, verdict
from benchmarks.units.targets import Target

_INTRODUCTION = """\
# What it costs

Made by `make bench`; do not edit. Real `Trainer.train()` loops of copies of one model in one process, in turns of one step: a plain
Trainer, the probe in its settings, and what one would use instead. Each figure is a step's time divided by that of the plain step next to
it; in brackets the interval that holds 95 % of bootstrapped medians."""

_METHOD = """\
## How it is measured

* Every contender has its own copy of the model with the same weights, its own `Trainer` (AdamW, no logs, no checkpoints), the same batches
  in the same order, and random generators of its own. Each `train()` runs in a greenlet that a callback halts at `on_step_begin`; what is
  timed is everything between two such halts: callbacks, forward, backward, clipping, optimizer, publication, the next batch. A test shows
  that each contender's losses and weights are bit for bit those of the same training run alone. On a GPU a step is timed to the end of
  its work.
* Turns are in random order, at most three contenders to one plain step; the figure is the median of the paired ratios, and the interval the
  percentile bootstrap's over pairs. A row "every nth step" is the mean of its cycle: the sampled step, the step after it, which publishes
  the record, and the others, each kind by its median. Its interval is as good as its few sampled steps.
* "Plain, a second copy" is what the method itself makes of no difference at all.
* Operations are counted with a dispatch mode in one step and given beyond the plain step's: those that launch work, and views. Reads are
  `.item()`, `.cpu()`, `.tolist()` and operators whose result's size only the device knows; on a GPU they are torch's own warnings. On the
  CPU the probe reads values where they lie, at no wait; on a device it does not. Memory is the peak of torch's allocator above its level
  at the step's beginning, beyond the plain step's.
* The rows "only ..." leave out all other parts of the probe; what every sampled step has, such as its hooks and its record, is in each.
* wandb, nnsight and TorchLens each run after all others, beside a plain Trainer of their own: they change the process round them. wandb's
  background process is not part of the step's time. TorchLens wraps the functions of torch outside the time of its steps, and is given its
  lightest recorder. What is kept of a step is let go at its end.
* A row of few pairs says little where its interval is wide, above all on a machine whose cores are shared with others; the probe's own
  meter, in the table before this, is then the better figure of a sampled step.
* Hundreds of pairs are for the model of short steps, which alone has a second plain copy and the cadences. Tiny with eight clips is
  there to show what a batch changes, and has a few contenders. A contender without a row in a model's table was not measured with it.
* The probe's rows publish every record to a run folder; nothing is printed."""


@dataclass(frozen=True)
class Beside:
    """Targets that another benchmark measured, and what it says of itself: command, date, machine, versions."""

    source: str
    targets: Sequence[Target]


def page(results: Sequence[Results], *, others: Sequence[Beside] = (), plots: Sequence[str] = ()) -> str:
    """Return the page.

    Args:
        results: One run a device.
        others: Targets that another benchmark measured on each run's device, in the same order.
        plots: The file of each run's plot, in the same order; none if there are no plots.
    """
    parts = [_INTRODUCTION]
    for index, run in enumerate(results):
        beside = others[index] if index < len(others) else Beside("", ())
        parts += [_head(run), f"## Targets, {run.device.upper()}", target_table([*targets(run), *beside.targets])]
        if beside.targets:
            parts.append(f'The rows from "{_cell(beside.targets[0].target)}" on are of {beside.source}.')
        if index < len(plots):
            parts.append(f"![Step time of every contender, divided by the plain step's]({plots[index]})")
        parts += [model_section(model, run.device, probe=run.versions.get("probe", "")) for model in run.models]
        parts += [f"{title} was not measured: {_cell(why)}" for title, why in run.failed.items()]
        parts.append(_itself(run))
    return "\n\n".join(part for part in [*parts, _METHOD] if part) + "\n"


def target_table(rows: Sequence[Target]) -> str:
    """Return the targets, each with its figure and verdict."""
    lines = ["| what | target | measured | verdict |", "|---|---|---|---|"]
    lines += [f"| {_cell(row.target)} | {_cell(row.bound)} | {_cell(row.measured)} | {_cell(verdict(row))} |" for row in rows]
    return "\n".join(lines)


def model_section(model: ModelResult, device: str, *, probe: str) -> str:
    """Return one model's table; a revision other than ``probe``, that of the whole run, is named."""
    other = f" Measured with probe {model.probe}." if model.probe not in ("", probe) else ""
    lines = [
        f"## {model.title}, {device.upper()}",
        "",
        f"{model.parameters / 1e6:.0f} M parameters, {model.precision}, a batch of {model.batch}; {model.sites} modules observed.",
        f"The plain step: {model.plain_ms:.0f} ms, {model.kernels} operations and {model.views} views, {model.syncs} reads,",
        f"{model.peak_mib:.0f} MiB at its peak.{other}",
        "",
        "| | step ÷ plain | pairs | operations | views | reads | peak, MiB | what it gives |",
        "|---|---|---|---|---|---|---|---|",
        *(_line(row) for row in model.rows),
    ]
    return "\n".join(lines)


def _line(row: Row) -> str:
    if row.ratio is None:
        return f"| {_cell(row.title)} | does not run: {_cell(row.error)} | | | | | | {_cell(row.gives)} |"
    counts = f"{row.kernels:+d} | {row.views:+d} | {row.syncs:+d} | {row.peak_mib:+.1f}"
    return f"| {_cell(row.title)} | {row.ratio.text()} | {row.ratio.pairs} | {counts} | {_cell(row.gives)} |"


def _itself(run: Results) -> str:
    """Return what the probe says of its own cost beside what was measured from outside, and cadences that were not measured."""
    lines = [
        f"## Sampled steps from outside and by themselves, {run.device.upper()}",
        "",
        "The share of a sampled step that is the probe's: from the paired ratio, and `probe/overhead/pct` as it stands in the records of",
        "the same run (steps sampled one after the other). Beside it what the sampled step comes to at cadences, computed from it.",
        "",
        "| | paired, % | `probe/overhead/pct` | every 10 | every 100 | passes, every 500 |",
        "|---|---|---|---|---|---|",
    ]
    for model in run.models:
        sampled, passes = model.row("sampled"), model.row("passes")
        if sampled is None or sampled.ratio is None:
            continue
        own = "not in the records" if model.own_pct is None else f"{model.own_pct:.1f} ({model.own_records} steps)"
        every = [f"{spread(sampled.ratio, each):.4f}" for each in (10, 100)]
        rare = f"{spread(passes.ratio, 500, less=sampled.ratio.value):.4f}" if passes is not None and passes.ratio is not None else ""
        lines.append(f"| {model.title} | {_share(sampled.ratio)} | {own} | {every[0]} | {every[1]} | {rare} |")
    return "\n".join(lines)


def _share(ratio: Ratio) -> str:
    low, value, high = (100 * (1 - 1 / each) for each in (ratio.low, ratio.value, ratio.high))
    return f"{value:.1f} [{low:.1f}, {high:.1f}]"


def _head(run: Results) -> str:
    versions = " · ".join(f"{name} {version}" for name, version in run.versions.items())
    device = "" if run.device == "cuda" else " No CUDA device: the CPU's rows stand alone."
    return f"{run.date} · {run.machine} · {versions} · {run.minutes:.0f} minutes · load when it began {run.load:.1f}.{device}"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")
