"""Rules about the outputs of sites: not finite, exploding, vanishing; each names the first site in the order of the forward."""

from __future__ import annotations

from statistics import median

from probe.findings.rule import History, Rule, Symptom
from probe.findings.rules.before import open_before
from probe.records import SiteStatistics, StepRecord

TIMES, SUDDEN, EARLIER = 100.0, 10.0, 8
"""Times the median, and the largest, of a site's at least so many earlier records: outputs grow while a model learns, but step by step."""

LARGEST = 65_504.0
"""The largest float16. Half of it is one doubling away from Inf; bfloat16 reaches as far as float32."""

NOTHING = 1e-6
"""Root mean square of an output that is added to a residual stream of size 1: less is rounded away even in float32 (2**-24 = 6e-8) once
it is a tenth of that."""

STREAM = 1e-3
"""Root mean square of what else is there, so that it is not the whole model that is small."""

RECORDS = 3

_EXPLODING = "activation-exploding"


def activation_not_finite(history: History) -> list[Symptom] | None:
    """Judge all outputs but logits (some models mask these with -Inf). A warning if neither loss nor gradient are touched."""
    rows = _judged(history.last)
    if not rows:
        return None
    bad = [row for row in rows if row.nonfinite]
    if not bad:
        return []
    row = _same_as_before(history, "activation-not-finite", bad)
    others = f", and of {len(bad) - 1} more sites" if len(bad) > 1 else ""
    message = f"{row.nonfinite:,} of {row.elements:,} values in the output of {row.site} are NaN or Inf{others}"
    evidence = {"nonfinite": float(row.nonfinite), "elements": float(row.elements), "sites": float(len(bad))}
    return [Symptom(message, row.site, evidence, "warning" if _harmless(history.last) else "critical")]


def activation_exploding(history: History) -> list[Symptom] | None:
    """Judge each output's size against its own past, and against what float16 can hold."""
    rows = [row for row in _judged(history.last) if row.rms is not None]
    if not rows:
        return None
    usual = _usual_sizes(history, rows)
    found = {row.site: told for row in rows if (told := _grown(row, usual.get(row.site)) or _near_the_end(row)) is not None}
    if not found:
        return []
    row = _same_as_before(history, _EXPLODING, [row for row in rows if row.site in found])
    why, evidence = found[row.site]
    others = f"; {len(found) - 1} more sites, too" if len(found) > 1 else ""
    return [Symptom(f"the output of {row.site} {why}{others}", row.site, evidence)]


def activation_vanishing(history: History) -> list[Symptom] | None:
    """Judge what attention layers and sites of the user's own give, in three records in a row."""
    if not any(row.rms is not None for row in _adding(history.last)):
        return None
    records = history.newest(RECORDS)
    small = [{row.site for row in _adding(record) if row.rms is not None and row.rms < NOTHING} for record in records]
    gone = set.intersection(*small) if small else set()
    if not gone or not all(_stream(record) > STREAM for record in records):
        return []
    row = _same_as_before(history, "activation-vanishing", [row for row in _adding(history.last) if row.site in gone])
    others = f"; {len(gone) - 1} more sites, too" if len(gone) > 1 else ""
    message = f"the output of {row.site} has rms {row.rms or 0:.2g} (bound: {NOTHING:g}), in {RECORDS} sampled steps in a row{others}"
    return [Symptom(message, row.site, {"rms": row.rms or 0.0, "bound": NOTHING})]


def _judged(record: StepRecord) -> list[SiteStatistics]:
    return [row for row in record.statistics if row.role not in ("lm_head", "model") and row.calls and row.elements]


def _adding(record: StepRecord) -> list[SiteStatistics]:
    """Return the rows of what is added to a stream: encoder, projector and branches have findings of their own."""
    return [row for row in _judged(record) if row.role in ("attention", "custom")]


def _stream(record: StepRecord) -> float:
    return max((row.rms for row in _judged(record) if row.rms is not None), default=0.0)


def _same_as_before(history: History, code: str, rows: list[SiteStatistics]) -> SiteStatistics:
    """Return the row of the site that the finding is open at, if it is among them, else the first."""
    open_at = {finding.site for finding in open_before(history, code)}
    return next((row for row in rows if row.site in open_at), rows[0])


def _harmless(record: StepRecord) -> bool:
    """Tell whether loss and gradient are finite all the same: the values belong to positions that nothing looks at."""
    read = [part for part in record.parts if part.tensors and part.gradient_norm is not None]
    finite_loss = record.optimisation is not None and record.optimisation.loss is not None
    return finite_loss and bool(read) and not any(part.nonfinite for part in record.parts)


def _usual_sizes(history: History, rows: list[SiteStatistics]) -> dict[str, float]:
    """Return, by site, the median of earlier sizes where it has grown suddenly; while that finding is open, the one it began with."""
    earlier: dict[str, list[float]] = {row.site: [] for row in rows}
    for record in history.records[:-1]:
        for row in record.statistics:
            if row.rms is not None and row.site in earlier:
                earlier[row.site].append(row.rms)
    sizes = ((row, earlier[row.site]) for row in rows)
    sudden = {row.site: median(known) for row, known in sizes if len(known) >= EARLIER and (row.rms or 0) > SUDDEN * max(known)}
    began = {finding.site: finding.evidence["median"] for finding in open_before(history, _EXPLODING) if "median" in finding.evidence}
    return {**sudden, **began}


def _grown(row: SiteStatistics, usual: float | None) -> tuple[str, dict[str, float]] | None:
    if not usual or row.rms is None or row.rms <= TIMES * usual:
        return None
    why = f"has rms {row.rms:.3g}, {row.rms / usual:,.0f} times its median before ({usual:.3g}; bound: {TIMES:g} times)"
    return why, {"rms": row.rms, "median": usual, "bound": TIMES * usual}


def _near_the_end(row: SiteStatistics) -> tuple[str, dict[str, float]] | None:
    largest = max(abs(row.minimum or 0.0), abs(row.maximum or 0.0))
    if row.dtype.removeprefix("torch.") != "float16" or largest <= LARGEST / 2:
        return None
    return f"reaches {largest:,.0f} in float16 (bound: {LARGEST / 2:,.0f}, half of what it can hold)", {
        "largest": largest,
        "bound": LARGEST / 2,
    }


RULES: tuple[Rule, ...] = (
    Rule(
        code="activation-not-finite",
        severity="critical",
        meaning="Values in the output of a module are NaN or Inf. What is computed from them is, too: the loss, and after one update the "
        "weights.",
        advice="The named site is the first in the order of the forward: look at its inputs (features, a mask that hides a whole row) and "
        "its weights (were they NaN in the checkpoint?). With float16 try bfloat16.",
        threshold="Any NaN or Inf in the output of a site other than a head (some models mask logits with -Inf). A warning while loss and "
        "gradient stay finite: then the values are of positions that nothing looks at.",
        check=activation_not_finite,
    ),
    Rule(
        code="activation-exploding",
        severity="warning",
        meaning="A module's output has become far larger than it was, or nears what float16 can hold.",
        advice="Look at the learning rate and at the gradient norm of the steps before, and at what was loaded or changed in "
        "this module. With "
        "float16 try bfloat16.",
        threshold="Its root mean square is more than 100 times the median, and 10 times the largest, of the records before (at "
        "least 8); or "
        "a value in float16 is beyond half of the largest, 65,504.",
        check=activation_exploding,
    ),
    Rule(
        code="activation-vanishing",
        severity="warning",
        meaning="A layer's output is so small that it adds nothing to the stream it is added to: the model goes on without this layer.",
        advice="Look at this layer's weights (its output projection, a scale or gate beside it): loaded, initialised, trained?",
        threshold="Root mean square below 1e-6 in 3 sampled steps in a row (layers whose gate begins at 0 have opened by then) "
        "of an attention "
        "layer or a site of your own, while some other output is above 1e-3.",
        check=activation_vanishing,
    ),
)
