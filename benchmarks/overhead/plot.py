"""The plot of the benchmark: every contender's step time beside the plain step's, one mark a model."""

from __future__ import annotations

from pathlib import Path

from benchmarks.overhead.contenders import contenders
from benchmarks.overhead.results import Results

# Colours of medium lightness, told apart by those who see no red or green, on white and on black. Source: Okabe and Ito.
_COLOURS = ("#E69F00", "#56B4E9", "#009E73", "#CC79A7", "#D55E00", "#0072B2", "#999999")
_MARKS = ("o", "s", "^", "D", "v", "P", "X")
_INK = "#808080"


def draw(results: Results, path: Path) -> None:
    """Write the plot as SVG, the same bytes for the same results. Needs matplotlib."""
    import matplotlib as mpl  # an optional dependency
    from matplotlib.figure import Figure

    shown = [row for model in results.models for row in model.rows if row.ratio is not None]
    names = {row.name: row.title.replace("`", "").partition(": ")[0] for row in shown}
    order = [contender.name for contender in contenders()]
    keys = sorted(names, key=lambda name: order.index(name) if name in order else len(order))
    with mpl.rc_context({"svg.hashsalt": "probe", "svg.fonttype": "path", "font.size": 9}):
        figure = Figure(figsize=(9, 1.2 + 0.32 * len(keys)), layout="constrained")
        axes = figure.add_subplot()
        step = 0.7 / max(1, len(results.models))
        for index, model in enumerate(results.models):
            rows = [(row, row.ratio) for row in model.rows if row.ratio is not None]
            x = [ratio.value for _, ratio in rows]
            y = [keys.index(row.name) + step * (index - (len(results.models) - 1) / 2) for row, _ in rows]
            errors = [[ratio.value - ratio.low for _, ratio in rows], [ratio.high - ratio.value for _, ratio in rows]]
            style = {"color": _COLOURS[index % len(_COLOURS)], "fmt": _MARKS[index % len(_MARKS)]}
            axes.errorbar(x, y, xerr=errors, markersize=4, elinewidth=1, label=model.title, **style)
        ratios = [row.ratio.value for row in shown if row.ratio is not None]
        axes.set_xlim(0.9 * min(ratios, default=1), 1.2 * max(ratios, default=1))  # wide intervals leave the plot: the table has them
        _dress(axes, [names[key] for key in keys])
        figure.savefig(path, format="svg", transparent=True, metadata={"Date": None})


def _dress(axes: object, titles: list[str]) -> None:
    from matplotlib.axes import Axes
    from matplotlib.ticker import FuncFormatter, NullFormatter

    assert isinstance(axes, Axes)
    axes.set_xscale("log")
    axes.axvline(1, color=_INK, linewidth=1)
    axes.axvline(1.05, color=_INK, linewidth=1, linestyle=":")
    axes.set_yticks(range(len(titles)), titles)
    axes.invert_yaxis()
    axes.set_xticks([tick for tick in (0.5, 1, 1.2, 1.5, 2, 3, 5, 10, 20, 50) if axes.get_xlim()[0] <= tick <= axes.get_xlim()[1]])
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel("step time ÷ plain step's (logarithmic; dotted: 1.05)", color=_INK)
    axes.grid(axis="x", color=_INK, alpha=0.25, linewidth=0.5)
    axes.tick_params(colors=_INK, which="both")
    for spine in axes.spines.values():
        spine.set_visible(False)
    axes.legend(loc="upper center", bbox_to_anchor=(0.3, -0.08 - 0.5 / len(titles)), ncols=2, frameon=False, labelcolor=_INK)
