"""docs/faults.md: the tables of the fault benchmark as Markdown."""

from __future__ import annotations

import platform
from collections.abc import Iterable, Sequence
from datetime import date

import torch
import transformers

import probe
from benchmarks.faults.fault import Fault
from benchmarks.faults.healthy import Healthy
from benchmarks.faults.scoring import Score, Summary, summary

_PARTS = ("development", "test")
_ABOUT = """\
# How far the findings can be trusted

Made by `make faults`; do not edit. Each fault is a few lines (`benchmarks/faults/areas/`) that break an otherwise healthy training of a
tiny model of a real architecture: of the model, the data, the collator, the arguments, or the Trainer. The trainings begin with weights
that were trained on the same kind of data before (eight synthetic voices, each with words, or audio codes, of its own), so that a
healthy one has audio that helps and a model that uses it; healthy ones from random weights are there, too.

**What counts was written down beforehand.** For each fault the finding that is expected, and those that are right as well because they
follow from it, stand in `benchmarks/faults/areas/`. They, and the split into a part to set thresholds on (two thirds) and a part to test on
(one third), were committed before any threshold was. The split is made by a rule that looks at names only (`benchmarks/faults/split.py`); a
kind of fault lies in one part with all its models, so that the test part holds kinds that no threshold was tried on."""
_WORDS = """\
*Found*: a right finding appeared, as a warning or worse (where the expected one is an information, as that). *Named*: it is the very one
that was expected. *Precision*: share of warnings and critical findings, one a code and run, over faulty and healthy runs, that are right.
*Steps*: median from the fault to the first right finding; every step was sampled, unless the table of faults says otherwise."""


def page(scores: Iterable[Score], *, remarks: str = "", seconds: float | None = None) -> str:
    """Return the whole page; ``remarks`` says what else a reader has to know to judge the figures."""
    scores = sorted(scores, key=lambda one: (_area(one), _kind(one), one.subject.model))
    versions = (
        f"Python {platform.python_version()} · torch {torch.__version__} · transformers {transformers.__version__} · "
        f"probe {probe.__version__}"
    )
    took = "" if seconds is None else f" · {len(scores)} runs in {seconds / 60:.0f} minutes"
    faults = [one for one in scores if isinstance(one.subject, Fault)]
    healthy = [one for one in scores if isinstance(one.subject, Healthy)]
    parts = [
        _ABOUT,
        *([remarks.strip()] if remarks.strip() else []),
        f"{date.today().isoformat()} · CPU ({platform.machine()}) · {versions}{took}",
        "## Both parts",
        _WORDS,
        _totals(scores),
        "## By area",
        _areas(faults),
        "## Missed",
        _missed(faults),
        "## Not right",
        _wrong(scores),
        *_problems(scores),
        "## Every fault",
        _every_fault(faults),
        "## Every healthy run",
        _every_healthy(healthy),
    ]
    return "\n\n".join(parts) + "\n"


def totals_line(part: str, whole: Summary) -> str:
    """Return one line for the terminal."""
    return (
        f"{part}: found {whole.found}/{whole.faults} ({_share(whole.recall)}), named {whole.named}, precision {_share(whole.precision)} "
        f"({whole.right} right, {whole.wrong} not), healthy runs with a critical finding {whole.healthy_critical}/{whole.healthy}, "
        f"with a warning {whole.healthy_warned}, median steps {_number(whole.steps)}"
    )


def _totals(scores: Sequence[Score]) -> str:
    rows = []
    for part in (*_PARTS, "both"):
        whole = summary(one for one in scores if part in ("both", one.part))
        rows.append(
            (
                part,
                str(whole.faults),
                f"{whole.found} ({_share(whole.recall)})",
                str(whole.named),
                f"{_share(whole.precision)} ({whole.right} of {whole.right + whole.wrong})",
                _number(whole.steps),
                str(whole.healthy),
                str(whole.healthy_critical),
                str(whole.healthy_warned),
            )
        )
    columns = ("part", "faulty runs", "found", "named", "precision", "steps", "healthy runs", "of these with a critical finding")
    return table((*columns, "with a warning"), rows)


def _areas(faults: Sequence[Score]) -> str:
    rows = []
    for area in dict.fromkeys(_area(one) for one in faults):
        cells = [area]
        for part in _PARTS:
            whole = summary(one for one in faults if _area(one) == area and one.part == part)
            cells += [f"{whole.found} of {whole.faults}", str(whole.named), _number(whole.steps)]
        rows.append(cells)
    return table(("area", *(f"{part}: {what}" for part in _PARTS for what in ("found", "named", "steps"))), rows)


def _missed(faults: Sequence[Score]) -> str:
    rows = [
        (f"`{one.outcome.name}`", one.part, f"`{_expected(one)}`", _note(one), _codes(one.wrong)) for one in faults if one.found_at is None
    ]
    return table(("run", "part", "expected", "what is broken", "found instead"), rows) if rows else "None."


def _wrong(scores: Sequence[Score]) -> str:
    rows = [
        (
            f"`{one.outcome.name}`",
            one.part,
            "healthy" if isinstance(one.subject, Healthy) else "faulty",
            _codes(one.critical),
            _codes(one.wrong - one.critical),
        )
        for one in scores
        if one.wrong
    ]
    return table(("run", "part", "", "critical", "warning"), rows) if rows else "None."


def _problems(scores: Sequence[Score]) -> Sequence[str]:
    """Return a table of the runs that ended early, or in which a part of the probe switched itself off; nothing if there is none."""
    rows = [
        (f"`{one.outcome.name}`", str(one.outcome.steps), "; ".join(filter(None, (one.outcome.error, *one.outcome.switched_off))))
        for one in scores
        if one.outcome.error or one.outcome.switched_off
    ]
    return ("## Ended early", table(("run", "steps", "why"), rows)) if rows else ()


def _every_fault(faults: Sequence[Score]) -> str:
    rows = [
        (
            f"`{one.outcome.name}`",
            one.part,
            _note(one),
            f"`{_expected(one)}`",
            "" if one.named_at is None else str(one.named_at),
            _codes(one.right - {_expected(one)}),
            _codes(one.wrong),
        )
        for one in faults
    ]
    return table(("run", "part", "what is broken", "expected", "named after", "right as well", "not right"), rows)


def _every_healthy(healthy: Sequence[Score]) -> str:
    rows = [(f"`{one.outcome.name}`", one.part, _note(one), _codes(one.wrong)) for one in healthy]
    return table(("run", "part", "what it is", "critical or warning"), rows)


def table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a Markdown table."""
    lines = [f"| {' | '.join(columns)} |", "|" + "---|" * len(columns)]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)])


def _area(one: Score) -> str:
    return one.subject.kind.area if isinstance(one.subject, Fault) else one.subject.area


def _kind(one: Score) -> str:
    return one.subject.kind.name if isinstance(one.subject, Fault) else one.subject.kind


def _note(one: Score) -> str:
    note = one.subject.kind.note if isinstance(one.subject, Fault) else one.subject.note
    return note.replace("``", "`").replace("|", "\\|")


def _expected(one: Score) -> str:
    return one.subject.kind.expected if isinstance(one.subject, Fault) else ""


def _codes(codes: Iterable[str]) -> str:
    return ", ".join(f"`{code}`" for code in sorted(codes))


def _share(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.1f} %"


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:g}"
