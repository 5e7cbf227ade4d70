"""Looking metrics up by name: what one means, which of a record enter the Trainer's log, and the page that documents all."""

from __future__ import annotations

import difflib
import sys
from collections.abc import Iterable, Mapping

from probe.catalogue import CATALOGUE, HEADLINE_LIMIT, KINDS, Metric
from probe.errors import ProbeValueError

__all__ = ["CATALOGUE", "HEADLINE_LIMIT", "KINDS", "Metric", "describe", "headline", "markdown_table", "nearest"]


def describe(name: str) -> Metric:
    """Return the catalogue's entry for a metric, also for a concrete name of a pattern (``probe/audio/codebook_3/loss``).

    Raises:
        ProbeValueError: if there is no such metric; the message holds the nearest names.
    """
    for metric in CATALOGUE:
        if name == metric.name or metric.pattern.fullmatch(name):
            return metric
    known = [concrete for metric in CATALOGUE for concrete in _examples(metric)]
    raise ProbeValueError(f"no metric is called {name!r}{nearest(name, known)}")


def nearest(name: str, known: Iterable[str]) -> str:
    """Return "; the nearest are …" with up to three of ``known`` that resemble ``name``, or "" when none does."""
    found = difflib.get_close_matches(name, list(known), n=3, cutoff=0.5)
    return f"; the nearest are {', '.join(found)}" if found else ""


def headline(metrics: Mapping[str, float]) -> dict[str, float]:
    """Return those of ``metrics`` that enter the Trainer's log: at most ``HEADLINE_LIMIT``, the most important first."""
    chosen: dict[str, float] = {}
    for metric in CATALOGUE:
        if metric.headline:
            chosen.update((name, metrics[name]) for name in _present(metric, metrics))
    return dict(list(chosen.items())[:HEADLINE_LIMIT])


def _present(metric: Metric, metrics: Mapping[str, float]) -> list[str]:
    """Return the concrete names of ``metric`` among ``metrics``; kinds of attention in the order of ``KINDS``."""
    if not metric.is_pattern:
        return [metric.name] if metric.name in metrics else []
    if "<kind>" in metric.name:
        return [name for name in _examples(metric) if name in metrics]
    return sorted(name for name in metrics if metric.pattern.fullmatch(name))


def _examples(metric: Metric) -> list[str]:
    """Return the concrete names of a metric, or its name where they are without end."""
    return [metric.name.replace("<kind>", kind) for kind in KINDS] if "<kind>" in metric.name else [metric.name]


def markdown_table() -> str:
    """Return the whole of ``docs/metrics.md``."""
    about = (
        "The record of a sampled step holds every metric that could be measured, and a reason for each that could not. Those marked ● also "
        f"enter the Trainer's own log, at most {HEADLINE_LIMIT} of them, in this order, with `probe/step`. `<kind>`, `<part>` and `K` are "
        "placeholders."
    )
    lines = [
        "# Metrics",
        "",
        "Generated from `probe/catalogue/` (`python -m probe.metrics > docs/metrics.md`); do not edit.",
        "",
        about,
        "",
        "| metric | log | unit | range | definition | source |",
        "|---|---|---|---|---|---|",
    ]
    for metric in CATALOGUE:
        mark = "●" if metric.headline else ""
        cells = (f"`{metric.name}`", mark, metric.unit, metric.range, metric.definition, metric.source)
        lines.append("| " + " | ".join(cell.replace("|", r"\|") for cell in cells) + " |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.stdout.write(markdown_table())
