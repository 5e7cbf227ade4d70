"""Rules about what the optimizer's step does to the weights: nothing, because the learning rate is 0, too small, or rounded away."""

from __future__ import annotations

from collections.abc import Iterator

from probe.findings.rule import History, Rule, Symptom
from probe.findings.rules.streaks import newest
from probe.records import Part, StepRecord

RECORDS = 3

MOST = 0.5
"""Share of the elements with a gradient that a step leaves as they were."""

DECAYED = 0.1
"""Share of the largest learning rate of the window below which it is taken to decay on purpose."""

ROUNDOFF = {"bfloat16": 2.0**-8, "float16": 2.0**-11, "float32": 2.0**-24, "float64": 2.0**-53}
"""Half a unit in the last place of 1 (unit roundoff): what the update as a whole must be below, by the norm of the weights. In a head most
rows may have next to no gradient and stay, while the others move."""

_HALF = ("bfloat16", "float16")


def learning_rate_zero(history: History) -> list[Symptom] | None:
    """Judge the learning rates of the newest three records; the first step of a warm-up and the last of a schedule may have 0."""
    rates = newest(history, RECORDS, _rates)
    if rates is None:
        return None
    end = history.setup.max_steps if history.setup is not None else None
    if not rates or any(map(any, rates)) or (end is not None and history.last.step >= end):
        return []
    return [
        Symptom(f"the learning rate of every parameter group is 0, in {RECORDS} sampled steps in a row (now step {history.last.step:,})")
    ]


def learning_rate_too_small(history: History) -> list[Symptom] | None:
    """Judge what the step left as it was of the weights in single precision, once the warm-up is over."""
    return _unmoved(history, half=False, why="the update is below the resolution of the weights, or the optimizer does not have them")


def update_lost_to_rounding(history: History) -> list[Symptom] | None:
    """Judge what the step left as it was of the weights in half precision. Critical if it is most of all of them."""
    return _unmoved(history, half=True, why="the update is less than half a unit in the last place of the weights")


def _unmoved(history: History, *, half: bool, why: str) -> list[Symptom] | None:
    """Return one symptom for all parts of one precision that a step hardly moves, in the newest three records that can be judged."""
    rows = newest(history, RECORDS, lambda record: _shares(history, record, half=half))
    if rows is None:
        return None
    stuck = [name for name in rows[-1] if all(row.get(name, 0.0) > MOST for row in rows)] if rows else []
    if not stuck:
        return []
    parts = {part.name: part for part in history.last.parts}
    elements = {name: _elements(parts[name]) for name in rows[-1]}
    lost = sum(rows[-1][name] * elements[name] for name in stuck) / sum(elements.values())
    told = ", ".join(f"{rows[-1][name]:.0%} of {name} ({parts[name].dtype})" for name in stuck)
    message = (
        f"an update leaves weights with a gradient as they were: {told} (bound: {MOST:.0%}), in {RECORDS} sampled steps in a row; {why}"
    )
    evidence = {**{f"unchanged_share/{name}": rows[-1][name] for name in stuck}, "bound": MOST, "learning_rate": _rate(history.last)}
    return [Symptom(message, evidence=evidence, severity=None if lost > MOST else "warning")]


def _shares(history: History, record: StepRecord, *, half: bool) -> dict[str, float] | None:
    """Return the unchanged share by part; ``None`` where the step's learning rate is small on purpose, or nothing was measured."""
    warmup = (history.setup.warmup_steps or 0) if history.setup is not None else 0
    largest = max(_rate(each) for each in history.records)
    if record.step <= warmup or not _rate(record) or _rate(record) < DECAYED * largest:
        return None
    return dict(_measured(record, half=half)) or None


def _measured(record: StepRecord, *, half: bool) -> Iterator[tuple[str, float]]:
    for part in record.parts:
        if part.unchanged_share is not None and (part.dtype in _HALF) is half:
            moves = part.update_ratio is not None and part.update_ratio >= ROUNDOFF.get(part.dtype, 0.0)
            yield part.name, 0.0 if moves else part.unchanged_share


def _elements(part: Part) -> float:
    return max(part.trainable_share * part.parameters, 1.0)


def _rates(record: StepRecord) -> tuple[float, ...] | None:
    return None if record.optimisation is None else record.optimisation.learning_rates or None


def _rate(record: StepRecord) -> float:
    return max(_rates(record) or (0.0,))


RULES: tuple[Rule, ...] = (
    Rule(
        code="learning-rate-zero",
        severity="critical",
        meaning="The learning rate is 0: the training goes on and nothing is learned.",
        advice="Look at learning_rate, at the scheduler (steps or epochs? made for another number of steps?) and at what a "
        "resume restored.",
        threshold="Exactly 0 in every parameter group, in 3 sampled steps in a row (a warm-up begins with 0 once), the last of them "
        "not at the end of the training.",
        check=learning_rate_zero,
    ),
    Rule(
        code="learning-rate-too-small",
        severity="warning",
        meaning="Weights have a gradient, and the optimizer's step does not move them: it is too small for their precision, or "
        "they are not "
        "among the optimizer's parameters.",
        advice="If it is one part only: does the optimizer have its parameters (its param_groups), with a learning rate of their own? Else "
        "raise the learning rate: float32 resolves a ten-millionth of a weight.",
        threshold="More than half of the sampled elements with a gradient other than 0 are bit for bit what they were before the step, "
        "and the update as a whole is below the unit roundoff of the weights (2**-24 in float32) by its norm; in 3 sampled steps in a row "
        "after the warm-up, at a learning rate of at least a tenth of the largest in the window.",
        check=learning_rate_too_small,
    ),
    Rule(
        code="update-lost-to-rounding",
        severity="critical",
        meaning="The weights are in half precision and most updates are smaller than half of what it resolves (1 in 256 for "
        "bfloat16): they "
        "are rounded away, step after step.",
        advice="Keep the weights in float32 and train with bf16=True (autocast), or use an optimizer with float32 master "
        "weights, stochastic "
        "rounding or Kahan summation (with the latter two this finding tells of single steps, not of their sum), or a larger "
        "learning rate.",
        threshold="As for learning-rate-too-small, of weights in bfloat16 (unit roundoff 2**-8) or float16 (2**-11). Critical if it is "
        "more than half of all trained elements in half precision, else a warning.",
        check=update_lost_to_rounding,
    ),
)
