"""Rules about the size of gradients: not finite, exploding, vanishing."""

from __future__ import annotations

import math
from statistics import median

from probe.findings.rule import History, Rule, Symptom
from probe.findings.rules.before import open_before
from probe.findings.rules.streaks import newest, spanning
from probe.records import ActivationGradient, StepRecord

TIMES, SUDDEN, EARLIER = 100.0, 10.0, 8
"""Times the median, and the largest, of at least so many earlier records: norms of batches scatter by less than ten."""

CLIPPED = 1000.0
"""Times by which clipping shrinks a gradient: at max_grad_norm=1 norms of 1 … 100 are usual."""

VANISHED = 1e-6
"""Gradient at the first observed output by that at the last one, each per element."""

HALVINGS = 16
"""Steps in which the scaler of fp16 training goes from its first factor, 65,536, to 1: it halves it with every step that it skips."""

_CODE = "gradient-exploding"


def gradient_not_finite(history: History) -> list[Symptom] | None:
    """Judge whether gradients hold NaN or Inf; with a loss scale only where it cannot be the scale."""
    now = _nonfinite(history.last)
    if now is None:
        return None
    scaled = history.last.optimisation is not None and history.last.optimisation.loss_scale is not None
    rows = spanning(history, steps=HALVINGS, records=3) if scaled else history.records[-3:]
    bad = sum(bool(_nonfinite(record)) for record in rows)
    if not now or bad < (max(len(rows), 3) if scaled else 2):
        return []
    begins = [row.site for row in history.last.activation_gradients if row.nonfinite]
    where = f"; going back from the loss it begins at {begins[-1]}" if begins else ""
    message = f"the gradient of {', '.join(now)} holds NaN or Inf, in {bad} of the newest {len(rows)} sampled steps{where}"
    return [Symptom(message, evidence={"records": float(bad)})]


def gradient_exploding(history: History) -> list[Symptom] | None:
    """Judge the norm against those of earlier records, and what clipping leaves of it."""
    norm = _norm(history.last)
    if norm is None:
        return None
    shares = newest(history, 3, _clipping)
    if shares and min(shares) > CLIPPED:
        bound = f"bound: {CLIPPED:,.0f}, in 3 sampled steps in a row"
        message = f"clipping divides the gradient, whose norm is {norm:.3g}, by {shares[-1]:,.0f} ({bound})"
        return [Symptom(message, evidence={"norm": norm, "clipped_by": shares[-1], "bound": CLIPPED})]
    usual = _usual(history)
    if usual is None or norm <= TIMES * usual:
        return []
    message = f"the gradient norm is {norm:.3g}, {norm / usual:,.0f} times its median before ({usual:.3g}; bound: {TIMES:g} times)"
    return [Symptom(message, evidence={"norm": norm, "median": usual, "bound": TIMES * usual})]


def gradient_vanishing(history: History) -> list[Symptom] | None:
    """Judge the gradient at the first observed output against that at the last one."""
    if _faded(history.last) is None:
        return None
    rows = [found for record in spanning(history, steps=10, records=3) if (found := _faded(record)) is not None]
    if len(rows) < 3 or max(share for share, _, _ in rows) >= VANISHED:
        return []
    share, first, last = rows[-1]
    bound = f"bound: {VANISHED:g}, in {len(rows)} sampled steps in a row"
    message = f"the gradient at {first} is {share:.2g} of that at {last}, per element ({bound})"
    return [Symptom(message, first, {"share": share, "bound": VANISHED})]


def _nonfinite(record: StepRecord) -> list[str] | None:
    """Return the parts whose gradient is not finite; ``None`` where no gradient was read."""
    read = [part for part in record.parts if part.tensors and (part.without_gradient is not None or part.nonfinite)]
    return [part.name for part in read if part.nonfinite] if read else None


def _norm(record: StepRecord) -> float | None:
    return None if record.optimisation is None else record.optimisation.gradient_norm


def _clipping(record: StepRecord) -> float | None:
    """Return by what clipping divides the gradient."""
    norm, clipped = _norm(record), [part.clipped_norm for part in record.parts if part.clipped_norm is not None]
    left = math.hypot(*clipped) if clipped else 0.0
    return None if norm is None or not left else norm / left


def _usual(history: History) -> float | None:
    """Return the median of the norms before an explosion, if the last one is (or still is) one; else ``None``."""
    norm = _norm(history.last) or 0.0
    known = [finding.evidence["median"] for finding in open_before(history, _CODE) if "median" in finding.evidence]
    if known:
        return known[0]
    earlier = [value for record in history.records[:-1] if (value := _norm(record)) is not None]
    clip = 0.0 if history.setup is None else history.setup.max_grad_norm or 0.0
    if len(earlier) < EARLIER or norm <= SUDDEN * max(earlier) or norm <= (clip or 1.0):
        return None
    return median(earlier) or None


def _faded(record: StepRecord) -> tuple[float, str, str] | None:
    """Return the gradient at the first observed output by that at the last, and both sites; ``None`` where it cannot be told."""
    rows: list[ActivationGradient] = [row for row in record.activation_gradients if row.rms is not None]
    if len(rows) < 2 or not rows[0].rms or not rows[-1].rms:
        return None  # exactly 0: it does not fade, it is cut off
    return rows[0].rms / rows[-1].rms, rows[0].site, rows[-1].site


RULES: tuple[Rule, ...] = (
    Rule(
        code="gradient-not-finite",
        severity="critical",
        meaning="The gradient holds NaN or Inf. Unless a scaler skips the step, the weights it belongs to are NaN after it.",
        advice="If the loss is finite, look at what is differentiated after the named site: a square root or a norm at 0, a division, a "
        "0 * Inf behind a mask. With float16 try bfloat16.",
        threshold="In 2 of the newest 3 sampled steps. With the loss scale of fp16 training, which finds its size by overflowing, in all "
        "sampled steps over 16 steps: then it has come down from 65,536 to 1.",
        check=gradient_not_finite,
    ),
    Rule(
        code="gradient-exploding",
        severity="warning",
        meaning="The gradient is far larger than it was, or so large that clipping leaves next to nothing of it.",
        advice="Look at the batch and at the loss of this step; lower the learning rate or lengthen the warm-up. If only "
        "clipping is far off: "
        "is the loss a sum that should be a mean, is max_grad_norm meant?",
        threshold="More than 100 times the median of the records before (at least 8), 10 times the largest of them, and above "
        "max_grad_norm (1 without). Or divided by more than 1,000 in clipping, in 3 sampled steps in a row.",
        check=gradient_exploding,
    ),
    Rule(
        code="gradient-vanishing",
        severity="warning",
        meaning="Of the gradient at the heads next to nothing arrives at the first layers: with residual connections that does "
        "not happen by "
        "itself.",
        advice="Look between the two sites for a factor on the gradient or on the activation, saturated gates, a branch that "
        "bypasses the rest.",
        threshold="Per element a millionth at the first observed output of that at the last one, in all sampled steps (at least 3) over 10 "
        "steps: a gate that begins at 0 has opened by then. Exactly 0 is another finding.",
        check=gradient_vanishing,
    ),
)
