"""What trains and what gradient reached it: parts, layers and activations of a record, and the ``probe/grad/…`` metrics."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

from probe.assemble.draft import Draft, ratio
from probe.capture.observers.activation_gradients import ORDER, activation_cell
from probe.capture.observers.gradients import LOSS_SCALE, STILL_SCALED, UNITS, clipped_cell, gradient_cell
from probe.capture.observers.reference_gradient import CELL as REFERENCE_CELL
from probe.capture.observers.reference_gradient import METRIC
from probe.capture.observers.updates import SAMPLED, UPDATES, update_cell, zero_cell
from probe.records import ActivationGradient, Part
from probe.sites.parts import PARTS, UnitFacts

_INCOMPLETE = "training_step did not end with a complete backward"
_NO_UPDATE = "the optimizer's step was not seen: in a loop without a Trainer nothing tells when it is made"
_NOT_FINITE = "its gradient holds NaN or Inf"
_SKIPPED = "gradients hold NaN or Inf: the step was skipped, or made all weights NaN"


def parts(draft: Draft) -> tuple[Part, ...]:
    """Return what trains in each part, which gradient reached it and how far it moved; enter the metrics of each part and of all."""
    units = _units(draft)
    present = [name for name in PARTS if any(unit.part == name for unit in units)]
    rows = [_row(draft, name, [index for index, unit in enumerate(units) if unit.part == name], units) for name in present]
    skipped = any(row.nonfinite for row in rows)
    made = tuple(_measured(draft, row, skipped=skipped) for row in rows)
    _total(draft, made, "norm", {row.name: row.gradient_norm for row in made})
    _total(draft, made, "clipped_norm", {row.name: row.clipped_norm for row in made})
    return made


def layers(draft: Draft) -> tuple[Part, ...]:
    """Return the same columns for each layer, and for what is in no layer by part, in the order of the forward."""
    units = _units(draft)
    names = list(dict.fromkeys(unit.layer for unit in units))
    rows = [_row(draft, name, [index for index, unit in enumerate(units) if unit.layer == name], units) for name in names]
    return tuple(_without_update(row) if any(other.nonfinite for other in rows) else row for row in rows)


def activation_gradients(draft: Draft) -> tuple[ActivationGradient, ...]:
    """Return the gradient that reached each site's output, in the order of the forward, and name the sites that none reached."""
    scale = _scale(draft)
    sites = [site.name for site in draft.run.sites.sites if site.role != "model"]
    order = {name: place for place, name in enumerate(draft.host.facts.get(ORDER, ()))}
    found = []
    for name in sorted(sites, key=lambda name: order.get(name, len(order))):
        values = draft.host.cells[activation_cell(name)]
        calls, elements = int(values.counts["calls"]), values.counts["elements"]
        if calls:
            nonfinite = int(values.sums["nonfinite"])
            norm = None if nonfinite else math.sqrt(values.sums["squares"]) / scale
            rms = None if norm is None or not elements else norm / math.sqrt(elements)
            found.append(ActivationGradient(name, calls, norm, rms, nonfinite))
        elif name in order:
            why = draft.host.reasons.get(activation_cell(name), "no backward reached its output")
            draft.reasons.setdefault(activation_cell(name), draft.blind.get("activation_gradients", why))
    return tuple(found)


def reference_gradient(draft: Draft) -> None:
    """Enter the norm of the gradient that reached the embeddings of reference audio."""
    values, blind = draft.host.cells[REFERENCE_CELL.name], draft.blind.get("reference_gradient")
    norm = math.sqrt(values.sums["squares"]) / _scale(draft) if values.sums["rows"] and not values.sums["nonfinite"] else None
    told = draft.host.reasons.get(METRIC) or draft.host.reasons.get("probe/attention/text_to_reference") or _why_no_reference(draft)
    bad = int(values.sums["nonfinite"])
    draft.measure(METRIC, norm, blind or (f"{bad} of its rows hold NaN or Inf" if bad else told))


def _why_no_reference(draft: Draft) -> str:
    if not any(site.kind == "joint" for site in draft.run.sites.of("attention")):
        return "no attention layer has text and audio in one sequence"
    if draft.count(REFERENCE_CELL.name, "calls"):
        return "no token of this step is reference audio"
    return "no backward reached the embeddings that the decoder begins with, or nothing tells which of them are audio"


def why_no_activation_gradient(draft: Draft, site: str, row: ActivationGradient | None) -> str:
    """Return why a site's activation gradient has no norm."""
    if row is not None:
        return f"{row.nonfinite} of the {row.calls} gradients that reached it hold NaN or Inf"
    blind = draft.blind.get("activation_gradients")
    return blind or draft.host.reasons.get(activation_cell(site), f"no backward reached the output of {site}")


def _units(draft: Draft) -> Sequence[UnitFacts]:
    """Return the sizes of the units as they were at the end of the step, or when training began."""
    facts: Sequence[UnitFacts] = draft.host.facts.get(UNITS, draft.run.units)
    return facts


def _scale(draft: Draft) -> float:
    scale = draft.host.local.get(LOSS_SCALE)
    return 1.0 if scale is None else float(scale)


def _row(draft: Draft, name: str, mine: Sequence[int], units: Sequence[UnitFacts]) -> Part:
    """Put the units of one part, or of one layer, together."""
    of, sampled = [units[index] for index in mine], draft.host.facts.get(SAMPLED, ())
    training = [unit for unit in of if unit.tensors]
    gradient = _added(draft, [gradient_cell(unit.part, unit.layer) for unit in training])
    clipped = _added(draft, [clipped_cell(unit.part, unit.layer) for unit in training if _has_gradient(draft, unit)])
    zeros = _added(draft, [zero_cell(unit.part, unit.layer) for unit in training])
    update = _added(draft, [update_cell(unit.part, unit.layer) for unit in training])
    elements, trainable = sum(unit.elements for unit in of), sum(unit.trainable for unit in of)
    tensors = sum(unit.tensors for unit in of)
    missing = None if gradient is None else int(gradient["missing"])
    known = gradient is not None and missing != tensors
    still = _scale(draft) if draft.host.facts.get(STILL_SCALED) else 1.0
    moved = update is not None and not update["nonfinite"]
    return Part(
        name=name,
        parameters=elements,
        trainable_share=ratio(trainable, elements) or 0.0,
        without_gradient=missing,
        gradient_norm=_norm(gradient, _scale(draft)) if known else None,
        tensors=tensors,
        clipped_norm=_norm(clipped, still) if known else None,
        nonfinite=bool(gradient is not None and gradient["nonfinite"]),
        sampled=sum(sampled[index] for index in mine) if sampled else 0,
        zero_share=None if zeros is None else ratio(zeros["zero"], zeros["gradients"]),
        update_ratio=_root_ratio(update, "moved", "weights") if moved else None,
        unchanged_share=ratio(update["unchanged"], update["compared"]) if moved and update is not None else None,
        weight_rms=_root_ratio(update, "weights", "elements") if moved else None,
        dtype=max(training, key=lambda unit: unit.trainable).dtype if training else "",
    )


def _has_gradient(draft: Draft, unit: UnitFacts) -> bool:
    return draft.host.cells[gradient_cell(unit.part, unit.layer)].maxima["missing"] < unit.tensors


def _added(draft: Draft, cells: Sequence[str]) -> dict[str, float] | None:
    """Add up the columns of cells; ``None`` if there is no cell, or nothing was measured in one of them."""
    rows = [draft.host.cells[cell].maxima for cell in cells]
    if not rows or any(value == -math.inf for row in rows for value in row.values()):
        return None
    return {column: math.fsum(row[column] for row in rows) for column in rows[0]}


def _norm(sums: dict[str, float] | None, scale: float) -> float | None:
    return None if sums is None or sums["nonfinite"] else math.sqrt(sums["squares"]) / scale


def _root_ratio(sums: dict[str, float] | None, above: str, below: str) -> float | None:
    return None if sums is None or not sums[below] else math.sqrt(sums[above] / sums[below])


def _without_update(row: Part) -> Part:
    """Return a row of a step that was skipped: that nothing moved says nothing."""
    return replace(row, update_ratio=None, unchanged_share=None)


def _measured(draft: Draft, row: Part, *, skipped: bool) -> Part:
    """Enter the metrics of one part, or the reasons."""
    row = _without_update(row) if skipped else row
    area, blind = f"probe/grad/{row.name}", draft.blind.get("gradients")
    none = draft.host.reasons.get(f"{area}/norm")
    unread = _NOT_FINITE if row.nonfinite else none or blind or _INCOMPLETE
    draft.measure(f"{area}/norm", row.gradient_norm, unread)
    draft.measure(f"{area}/clipped_norm", row.clipped_norm, unread if row.gradient_norm is None else blind or _NO_UPDATE)
    sampled = none or draft.host.reasons.get(UPDATES) or draft.blind.get("updates")
    draft.measure(f"{area}/zero_share", row.zero_share, sampled or _INCOMPLETE)
    moved = _SKIPPED if skipped else sampled or _NO_UPDATE
    draft.measure(f"{area}/update_ratio", row.update_ratio, "its sampled weights are all 0" if row.weight_rms == 0 else moved)
    draft.measure(f"{area}/unchanged_share", row.unchanged_share, "its sampled gradients are all 0" if row.zero_share == 1 else moved)
    return row


def _total(draft: Draft, rows: Sequence[Part], what: str, norms: Mapping[str, float | None]) -> None:
    """Enter the norm over all parts that have a gradient, unless one of them could not be read."""
    training = [row for row in rows if row.tensors]
    lacking = [row.name for row in training if norms[row.name] is None and row.without_gradient != row.tensors]
    known = [norm for norm in norms.values() if norm is not None]
    if lacking:
        why = f"{', '.join(lacking)}: {draft.reasons[f'probe/grad/{lacking[0]}/{what}']}"
    else:
        why = "no parameter that trains has a .grad after the backward" if training else "no parameter trains"
    draft.measure(f"probe/grad/{what}", None if lacking or not known else math.hypot(*known), why)
