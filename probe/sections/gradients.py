"""What is shown of gradient flow: whether a gradient reached what trains, by part, and the layers that stand out."""

from __future__ import annotations

import math
from collections.abc import Sequence

from probe.records import Part, StepRecord
from probe.sections.blocks import Block, Column, Fact, Facts, Table, Tone
from probe.sections.numbers import MISSING, counted, number, scaled, share
from probe.sections.reasons import Reasons

_WEAKEST, _STRONGEST = 3, 2


def gradient_flow(record: StepRecord, reasons: Reasons) -> list[Fact]:
    """Return the answer to "does the gradient flow", as measured, and the norm before and after clipping."""
    optimisation = record.optimisation
    norm = None if optimisation is None else optimisation.gradient_norm
    words = None if norm is None else f"{number(norm)} before clipping"
    after = record.metrics.get("probe/grad/clipped_norm")
    words = words if after is None or words is None else f"{words}, {number(after)} as the optimizer got it"
    keys = ("probe/grad/norm", "optimisation/gradient_norm", "optimisation", "grad")
    return [_flow(record, reasons), reasons.fact("Gradient norm", words, *keys)]


def gradient_blocks(record: StepRecord, reasons: Reasons) -> list[Block]:
    """Return the table of parts, and below it the layers with the weakest and the strongest gradient."""
    if not record.parts:
        return [Facts((Fact("Parts", reasons.missing("parts", "grad", "probe/grad"), "missing"),))]
    for part in record.parts:
        if not part.trainable_share:
            reasons.missing(f"probe/grad/{part.name}")  # the table says it: nothing of it trains
    blocks: list[Block] = [_parts(record.parts)]
    shown = _standing_out(record)
    if shown:
        blocks.append(_layers(shown, len(_trained_layers(record)) - len(shown)))
    return blocks


def _flow(record: StepRecord, reasons: Reasons) -> Fact:
    """Say in one sentence what gradient reached the parts that train."""
    training = [part for part in record.parts if part.trainable_share]
    if not record.parts:
        return reasons.fact("Gradient flow", None, "parts", "grad", "probe/grad")
    if not training:
        return Fact("Gradient flow", "none: nothing trains, every parameter is frozen", "warning")
    read = [part for part in training if part.without_gradient is not None]
    if not read:
        return reasons.fact("Gradient flow", None, f"probe/grad/{training[0].name}/norm", "probe/grad")
    tensors, without = sum(part.tensors for part in read), sum(part.without_gradient or 0 for part in read)
    if without == tensors > 0:
        return Fact("Gradient flow", f"none: not one of the {tensors:,} tensors that train has a gradient after the backward", "critical")
    words, tone = _sentence(read, tensors, without)
    unread = [part.name for part in training if part.without_gradient is None]
    words += f"; not measured of {', '.join(unread)}" if unread else ""
    return Fact("Gradient flow", words, tone)


def _sentence(read: Sequence[Part], tensors: int, without: int) -> tuple[str, Tone]:
    broken = [part.name for part in read if part.nonfinite]
    if broken:
        return f"NaN or Inf in the gradient of {', '.join(broken)}", "critical"
    cut = [part.name for part in read if part.without_gradient == part.tensors > 0 or part.gradient_norm == 0.0]
    reached = f"{tensors - without:,} of {counted(tensors, 'tensor')}"
    if cut:
        return f"reached {reached} that train, and nothing of {', '.join(cut)}", "warning"
    every = counted(len(read), "part") if len(read) == 1 else f"all {len(read)} parts"
    return f"reached {every} that train ({reached}){_moved(read)}", "plain"


def _moved(read: Sequence[Part]) -> str:
    ratios = [part.update_ratio for part in read if part.update_ratio is not None]
    if not ratios:
        return ""
    low, high = number(min(ratios)), number(max(ratios))
    return f"; the step moved weights by {low if low == high else f'{low} … {high}'} of their size"


def _parts(parts: Sequence[Part]) -> Table:
    columns = (
        Column("part"),
        Column("parameters", True),
        Column("train", True),
        Column("gradient norm", True),
        Column("clipped", True),
        Column("update", True),
        Column("zero", True),
        Column("tensors without gradient", True),
    )
    rows = tuple((part.name, scaled(part.parameters), share(part.trainable_share), *_numbers(part), _without(part)) for part in parts)
    sampled = sum(part.sampled for part in parts)
    caption = f"update (change by size of the weights) and zero (share of gradients that are 0) from {counted(sampled, 'sampled element')}"
    return Table("What trains, and the gradient", columns, rows, caption=caption if sampled else "")


def _layers(layers: Sequence[Part], left: int) -> Table:
    columns = (
        Column("layer"),
        Column("gradient norm", True),
        Column("clipped", True),
        Column("update", True),
        Column("zero", True),
        Column("tensors without gradient", True),
    )
    rows = tuple((layer.name, *_numbers(layer), _without(layer)) for layer in layers)
    footer = f"and {counted(left, 'layer')} more in the record" if left else ""
    title = "Layers with the weakest and the strongest gradient" if left else "The gradient by layer"
    return Table(title, columns, rows, footer=footer)


def _numbers(row: Part) -> tuple[str, str, str, str]:
    norm = "NaN, Inf" if row.nonfinite else number(row.gradient_norm)
    return norm, number(row.clipped_norm), number(row.update_ratio), share(row.zero_share)


def _without(row: Part) -> str:
    if not row.trainable_share or row.without_gradient is None:
        return MISSING
    return f"{row.without_gradient:,} of {row.tensors:,}" if row.without_gradient else "0"


def _trained_layers(record: StepRecord) -> list[Part]:
    """Return the layers that train, without the rows of what is in no layer (those carry the name of a part)."""
    parts = {part.name for part in record.parts}
    return [layer for layer in record.layers if layer.trainable_share and layer.name not in parts]


def _standing_out(record: StepRecord) -> list[Part]:
    """Return a few layers, in the order of the forward: by what is broken, then by the gradient an element."""
    layers = _trained_layers(record)
    if len(layers) < 2:
        return []
    by_size = sorted(layers, key=_strength)
    chosen = {layer.name for layer in (*by_size[:_WEAKEST], *by_size[-_STRONGEST:])}
    return [layer for layer in layers if layer.name in chosen]


def _strength(layer: Part) -> float:
    if layer.gradient_norm is None:  # broken, or none at all: first of all
        return -2.0 if layer.nonfinite else -1.0
    return layer.gradient_norm / math.sqrt(max(1.0, layer.parameters * layer.trainable_share))
