"""The table of docs/verdicts-table.md as Markdown."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from datetime import date

import numpy as np
import torch
import transformers

import probe
from benchmarks.verdicts.training import Outcome, Plan
from benchmarks.verdicts.variants import VARIANTS

_ABOUT = """\
# Verdicts on known ground

Made by `make verdicts`; do not edit. The voice cloner of `docs/examples/clone_voice.py` and broken variants of it, trained by an
unmodified Trainer with the probe attached; the verdict of the last record. [Verdict](verdict.md) says how it is reached: its bounds were
set on seeds 0 and 1 and then held against seeds 2, 3 and 4."""
_TRUTH = """\
## The same, measured by hand

After training, on clips drawn for this: the mean over samples of the extra loss with the reference changed by hand, in float64 from full
logits, in nats a token; in brackets what the verdict was reached on, during training."""


def page(outcomes: Sequence[Outcome], plan: Plan) -> str:
    """Return the whole page."""
    versions = f"Python {platform.python_version()} · torch {torch.__version__} · transformers {transformers.__version__}"
    right = sum(outcome.right for outcome in outcomes)
    data = f"{plan.speakers} speakers, {plan.texts} texts, batches of 16"
    made = f"Made on {date.today()}: probe {probe.__version__} · {versions}. {data}. **{right} of {len(outcomes)} right.**"
    return "\n\n".join([_ABOUT, made, _verdicts(outcomes), _TRUTH, _numbers(outcomes), _reasons(outcomes)]) + "\n"


def _verdicts(outcomes: Sequence[Outcome]) -> str:
    seeds = sorted({outcome.seed for outcome in outcomes})
    rows = [["variant", "what", "steps", "right is", *(f"seed {seed}" for seed in seeds)]]
    for variant in VARIANTS:
        mine = {outcome.seed: outcome for outcome in outcomes if outcome.variant == variant.name}
        if mine:
            cells = [_word(mine[seed]) if seed in mine else "" for seed in seeds]
            rows.append([variant.name, variant.what, str(variant.steps), variant.expected or "not measured", *cells])
    return _table(rows)


def _word(outcome: Outcome) -> str:
    word = f"{outcome.verdict.use} (from step {outcome.first} on)" if outcome.verdict is not None else "not measured"
    return word if outcome.right else f"**WRONG: {word}**"


def _numbers(outcomes: Sequence[Outcome]) -> str:
    rows = [["variant", "seed", "loss", "another's audio", "silence", "reversed", "critical findings and warnings open at the end"]]
    for outcome in outcomes:
        truth, evidence = outcome.truth, outcome.verdict.evidence if outcome.verdict is not None else {}
        cells = ["–"] * 3
        if truth is not None:
            cells = [f"{truth.swap:.3f} ± {truth.swap_error:.3f}", f"{truth.silence:.3f}", f"{truth.reverse:.3f}"]
        told = [f" [{evidence[f'delta_loss_{name}']:.3f}]" if evidence else "" for name in ("swap", "silence", "reverse")]
        loss = "–" if outcome.loss is None else f"{outcome.loss:.3f}"
        found = ", ".join(dict.fromkeys(outcome.findings)) or "none"
        rows.append([outcome.variant, str(outcome.seed), loss, *np.char.add(cells, told).tolist(), found])
    return _table(rows)


def _reasons(outcomes: Sequence[Outcome]) -> str:
    reasons = sorted({f"* {outcome.variant}: {outcome.reason}" for outcome in outcomes if outcome.reason})
    return "\n".join(["Not measured, because:", "", *reasons]) if reasons else "Everything was measured."


def _table(rows: Sequence[Sequence[str]]) -> str:
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([lines[0], f"|{'---|' * len(rows[0])}", *lines[1:]])
