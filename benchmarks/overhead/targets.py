"""What the probe is meant to cost, each target with the figure that was measured beside it. Pure: results in, verdicts out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from benchmarks.overhead.ratios import Ratio
from benchmarks.overhead.results import ModelResult, Results, Row
from benchmarks.units.targets import Target

PAIRS = 200
EVERY, PASSES_EVERY = 100, 500
BUDGET_MIB = 64
_NO_DEVICE = "no CUDA device"
_PLAIN = Ratio(1.0, 1.0, 1.0, 0)


def verdict(target: Target) -> str:
    """Return whether a target is met, in words, and why not or what to know of the figure."""
    if target.met is None:
        if target.measured:
            return target.why or "undecided"
        return f"not measured{': ' if target.why else ''}{target.why}"
    if target.met:
        return f"met{'; ' if target.why else ''}{target.why}"
    return f"**missed**{', because ' if target.why else ''}{target.why}"


def targets(results: Results) -> list[Target]:
    """Return the targets that this benchmark measures."""
    return [*_unsampled(results), *_sampled(results), *_rare(results), _memory(results), _waiting(results)]


def _kept(ratio: Ratio, bound: float) -> bool | None:
    """Tell whether a ratio is at most the bound: not to be told where its interval holds the bound."""
    return True if ratio.high <= bound else False if ratio.low > bound else None


def _own(model: ModelResult) -> str:
    """Say that the interval holds the bound, and what the probe's own meter says, which is less noisy."""
    told = "" if model.own_pct is None else f"; by the probe's own meter {1 / (1 - model.own_pct / 100):.3f}"
    return f"undecided, the interval holds the bound{told}"


def spread(ratio: Ratio, every: int, *, less: float = 1.0) -> float:
    """Return the mean step of a cadence of which one step in ``every`` costs ``ratio`` where it would else cost ``less``."""
    return 1 + (ratio.value - less) / every


def _unsampled(results: Results) -> list[Target]:
    idle = [(model, row) for model in results.models if (row := model.row("idle"))]
    what = "an unsampled step"
    found = [
        _most(f"{what}: tensor operations, views included", "0", idle, lambda row: row.kernels + row.views, lambda most: most <= 0),
        _most(f"{what}: extra memory at its peak", "0 MiB", idle, lambda row: row.peak_mib, lambda most: most < 0.005, unit=" MiB"),
    ]
    often = max(idle, key=lambda pair: _ratio(pair[1]).pairs, default=None)
    for low, high, when in ((0.99, 1.01, ""), (0.998, 1.002, ", on a quiet machine")):
        name, bound = f"{what}: time ÷ plain, at least {PAIRS} pairs{when}", f"95 % within [{low}, {high}]"
        if often is None or _ratio(often[1]).pairs < PAIRS:
            found.append(Target(name, bound, "", None, f"fewer than {PAIRS} pairs"))
            continue
        model, ratio = often[0], _ratio(often[1])
        again = model.row("again")
        noise = f"a second plain Trainer: {_ratio(again).text()}" if again else ""
        load = f"load when it began: {results.load:.1f}" if when else ""
        kept = low <= ratio.low and ratio.high <= high
        why = "; ".join(each for each in (noise, load) if each)
        found.append(Target(name, bound, f"{ratio.text()}, {ratio.pairs} pairs, {model.title}", kept, why))
    return found


def _sampled(results: Results) -> list[Target]:
    statistics = [(model, row) for model in results.models if (row := model.row("only statistics"))]
    cuda = results.device == "cuda"
    what, bound = "a sampled step with everything on, Whisper-small-sized", "≤ 1.05 × plain"
    small = next((model for model in results.models if model.small and model.row("sampled")), None)
    here = Target(f"{what}, {results.device.upper()}", bound, "", None, "no such model in this run")
    if small is not None:
        ratio = _ratio(small.row("sampled"))
        kept = _kept(ratio, 1.05)
        why = _largest(results) if kept is False else _own(small) if kept is None else ""
        here = Target(here.target, bound, f"{ratio.text()}, {ratio.pairs} pairs", kept, why)
    there = [] if cuda else [Target(f"{what}, CUDA", bound, "", None, _NO_DEVICE)]
    per_site = [
        Target(
            "a sampled step, statistics only: tensor operations a site, those of the step itself included",
            "≤ 6",
            f"{row.kernels / model.sites:.1f}, {model.title}, {model.sites} sites",
            row.kernels <= 6 * model.sites,
        )
        for model, row in statistics
        if model.sites
    ]
    return [*per_site, here, *there]


def _rare(results: Results) -> list[Target]:
    """Return the targets of what happens in one step of many, computed from what that one costs."""
    small = next((model for model in results.models if model.small), None)
    sampled, passes = (small.row(name) if small else None for name in ("sampled", "passes"))
    found = []
    name = f"the same at the default cadence (every {EVERY}), computed"
    if sampled is None:
        found.append(Target(name, "≤ 1.001 × plain", "", None, "no such model in this run"))
    else:
        once = _rarely(_ratio(sampled), EVERY)
        kept = _kept(once, 1.001)
        measured = [f"{model.title}, measured: {_ratio(row).text()}" for model in results.models if (row := model.row(f"every-{EVERY}"))]
        why = "; ".join([*([_own_spread(small)] if kept is None and small else []), *measured])
        found.append(Target(name, "≤ 1.001 × plain", once.text(), kept, why))
    name = f"counterfactual passes at their default cadence (every {PASSES_EVERY}), computed"
    if sampled is None or passes is None:
        found.append(Target(name, "≤ 1.002 × plain", "", None, "no such model in this run"))
    else:
        once = _rarely(_ratio(passes), PASSES_EVERY, less=_ratio(sampled))
        kept = _kept(once, 1.002)
        why = "they are four forwards of the micro-batch"
        told = {True: "", False: why, None: f"undecided, the interval holds the bound; {why}"}
        found.append(Target(name, "≤ 1.002 × plain", once.text(), kept, told[kept]))
    return found


def _rarely(ratio: Ratio, every: int, *, less: Ratio = _PLAIN) -> Ratio:
    """Return the mean step of a cadence, with the widest interval that those of the rare step and of what it is beyond allow."""
    low = spread(replace(ratio, value=ratio.low), every, less=less.high)
    high = spread(replace(ratio, value=ratio.high), every, less=less.low)
    return Ratio(spread(ratio, every, less=less.value), low, high, ratio.pairs)


def _own_spread(model: ModelResult) -> str:
    """Say what the rare sampled step comes to by the probe's own meter."""
    told = "" if model.own_pct is None else f"; by the probe's own meter {1 + model.own_pct / (100 - model.own_pct) / EVERY:.4f}"
    return f"undecided, the interval holds the bound{told}"


def _memory(results: Results) -> Target:
    rows = [(model, row) for model in results.models if (row := model.row("sampled"))]
    name = "a sampled step with everything on: extra memory at its peak"
    return _most(name, f"≤ {BUDGET_MIB} MiB", rows, lambda row: row.peak_mib, lambda most: most <= BUDGET_MIB, unit=" MiB")


def _waiting(results: Results) -> Target:
    name, bound = "a sampled step: synchronisations beyond the plain step's", "0"
    if results.device != "cuda":
        return Target(name, bound, "", None, f"{_NO_DEVICE}; counted without one in `tests/integration/test_budgets.py`")
    rows = [(model, row) for model in results.models if (row := model.row("sampled"))]
    return _most(name, bound, rows, lambda row: row.syncs, lambda most: most <= 0)


def _most(
    name: str,
    bound: str,
    rows: Sequence[tuple[ModelResult, Row]],
    figure: Callable[[Row], float],
    kept: Callable[[float], bool],
    *,
    unit: str = "",
) -> Target:
    if not rows:
        return Target(name, bound, "", None, "not in this run")
    model, row = max(rows, key=lambda pair: figure(pair[1]))
    most = figure(row)
    shown = f"{most:.2f}" if isinstance(most, float) else str(most)
    return Target(name, bound, f"{shown}{unit} at most of {len(rows)} models ({model.title})", kept(most))


def _largest(results: Results) -> str:
    """Say which features cost most, where they were measured one by one."""
    for model in results.models:
        parts = [row for row in model.rows if row.name.startswith("only ") and row.ratio is not None]
        if parts:
            parts.sort(key=lambda row: -_ratio(row).value)
            told = ", ".join(f"{row.gives} {100 * (_ratio(row).value - 1):.1f} %" for row in parts[:2])
            return f"alone and on {model.title} these cost most: {told}"
    return ""


def _ratio(row: Row | None) -> Ratio:
    assert row is not None and row.ratio is not None
    return row.ratio
