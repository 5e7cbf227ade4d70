"""What ``SharedAttentionLoggerCallback`` shows: where the probability mass of the attention went, kind by kind and layer by layer."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from probe.records import Attention, AttentionKind, Branches, StepRecord
from probe.sections.blocks import Block, Column, Fact, Facts, Section, Table
from probe.sections.numbers import MISSING, counted, fixed, share, span
from probe.sections.reasons import ATTENTION, Reasons

_SHOWN_LAYERS = 12
_KINDS: tuple[tuple[AttentionKind, str], ...] = (
    ("joint", "Joint attention (text and audio in one sequence)"),
    ("cross", "Cross-attention (tokens over audio)"),
    ("decoder", "Decoder self-attention"),
    ("encoder", "Encoder self-attention"),
)
_MASSES = (
    ("text → audio", "text_to_audio"),
    ("audio → text", "audio_to_text"),
    ("text → reference", "text_to_reference"),
    ("text → text", "text_to_text"),
    ("audio → audio", "audio_to_audio"),
    ("audio → reference", "audio_to_reference"),
    ("first token", "first_token"),
    ("padding", "padding"),
    ("learned sink", "sink"),
)
_WALKS = (("monotonicity", "monotonicity"), ("coverage", "coverage"))


@dataclass(frozen=True, slots=True)
class _Quantity:
    """One column of a table of layers: its head, the field, how it is written, and the kinds that it tells something of."""

    head: str
    what: str
    write: Callable[[float | None], str]
    kinds: tuple[AttentionKind, ...] = ("joint", "cross", "decoder", "encoder")


# What a person needs to see of a layer, within 120 columns; all the rest is in the record.
_QUANTITIES = (
    _Quantity("entropy", "entropy", fixed),
    _Quantity("eff. keys", "effective_keys", lambda value: fixed(value, 1)),
    _Quantity("top", "top", share, ("cross", "decoder", "encoder")),
    _Quantity("band", "band", share, ("cross", "decoder", "encoder")),
    _Quantity("distance", "distance", lambda value: fixed(value, 1), ("decoder", "encoder")),
    _Quantity("text→audio", "text_to_audio", share, ("joint",)),
    _Quantity("audio→text", "audio_to_text", share, ("joint",)),
    _Quantity("text→ref", "text_to_reference", share, ("joint",)),
    _Quantity("monotone", "monotonicity", lambda value: fixed(value, 2), ("joint", "cross")),
    _Quantity("coverage", "coverage", share, ("joint", "cross")),
    _Quantity("first key", "first_token", share),
    _Quantity("padding", "padding", share),
    _Quantity("sink", "sink", share),
)
_EXTREMES: tuple[tuple[str, str, Callable[..., Any]], ...] = (
    ("lowest entropy", "entropy", min),
    ("highest entropy", "entropy", max),
    ("most on first token", "first_token", max),
    ("most on padding", "padding", max),
    ("least text → audio", "text_to_audio", min),
    ("most text → audio", "text_to_audio", max),
    ("least monotone", "monotonicity", min),
    ("least coverage", "coverage", min),
)


def section(record: StepRecord) -> Section:
    """Return the section "Shared attention" of a record."""
    reasons = Reasons(record, ATTENTION)
    blocks: list[Block] = []
    if record.attention:
        blocks.append(_overall(record, reasons))
        for kind, title in _KINDS:
            layers = [layer for layer in record.attention if layer.kind == kind]
            if layers:
                blocks.append(_table(title, kind, layers, record.metrics))
    else:
        blocks.append(Facts((Fact("Attention", reasons.missing("attention", "probe/attention"), "missing"),)))
    blocks.append(_branches(record, reasons))
    return Section(ATTENTION, record.step, (*blocks, *reasons.rest()))


def _overall(record: StepRecord, reasons: Reasons) -> Facts:
    metrics = record.metrics
    rows = [reasons.fact("Entropy", _concentration(metrics), "probe/attention/entropy")]
    for label, what in _MASSES:
        name = f"probe/attention/{what}"
        if name in metrics:
            rows.append(Fact(label, f"{share(metrics[name])} of the probability"))
    if "probe/attention/monotonicity" in metrics:
        rows.append(Fact("monotonicity", f"{fixed(metrics['probe/attention/monotonicity'], 2)} (text rows over audio, -1 … 1)"))
    if "probe/attention/coverage" in metrics:
        rows.append(Fact("coverage", f"{share(metrics['probe/attention/coverage'])} of the audio that text rows can see"))
    missing = record.not_measured
    labels = {f"probe/attention/{what}": label for label, what in (*_MASSES, *_WALKS) if f"probe/attention/{what}" in missing}
    for reason in dict.fromkeys(missing[name] for name in labels):
        alike = [name for name in labels if missing[name] == reason]
        more = f" and {len(alike) - 1} more" if len(alike) > 1 else ""
        rows.append(Fact(f"{labels[alike[0]]}{more}", reasons.missing(alike[0]), "missing"))
    return Facts(tuple(rows), f"Mean over {counted(len(record.attention), 'layer')}, before dropout")


def _concentration(metrics: dict[str, float]) -> str | None:
    entropy, nats, alike = (metrics.get(f"probe/attention/{what}") for what in ("entropy", "entropy_nats", "effective_keys"))
    if entropy is None:
        return None
    keys = "" if alike is None else f", {fixed(alike, 1)} effective keys"
    return f"{fixed(entropy)} of uniform{'' if nats is None else f', {fixed(nats, 2)} nats'}{keys}"


def _table(title: str, kind: AttentionKind, layers: list[Attention], metrics: dict[str, float]) -> Table:
    shown = [quantity for quantity in _QUANTITIES if kind in quantity.kinds and _tells(quantity.what, layers)]
    summarised = len(layers) > _SHOWN_LAYERS
    pattern, names = _short_names([layer.site for layer in layers])
    columns = (
        Column("layer"),
        *(Column(quantity.head, True) for quantity in shown),
        *((Column("shown as", flexible=True),) if summarised else ()),
    )
    rows: list[tuple[str, ...]] = []
    if len(layers) > 1 and f"probe/attention/{kind}/entropy" in metrics:
        means = [quantity.write(metrics.get(f"probe/attention/{kind}/{quantity.what}")) for quantity in shown]
        rows.append((f"mean of {len(layers)}", *means, *(("",) if summarised else ())))
    if summarised:
        rows += [(*_row(name, layer, shown), ", ".join(why)) for name, layer, why in _extremes(names, layers)]
    else:
        rows += [_row(name, layer, shown) for name, layer in zip(names, layers)]
    footer = f"{counted(len(layers), 'layer')}, every one in the record" if summarised else ""
    heads, keys, rows_seen, calls = (
        span((getattr(layer, f"{noun}s") for layer in layers), noun) for noun in ("head", "key", "row", "call")
    )
    how = ", ".join(sorted({layer.how for layer in layers}))
    about = f"{heads}, {keys}, {rows_seen} in {calls} a layer"
    return Table(title, columns, tuple(rows), f"{pattern}: {about}; {how}", footer)


def _tells(what: str, layers: Sequence[Attention]) -> bool:
    """Tell whether a column says something: entropy always, another if it was measured; that nothing is on padding is said once, above."""
    values = [getattr(layer, what) for layer in layers]
    return what == "entropy" or any(value if what == "padding" else value is not None for value in values)


def _row(name: str, layer: Attention, shown: Sequence[_Quantity]) -> tuple[str, ...]:
    return (name, *(quantity.write(getattr(layer, quantity.what)) for quantity in shown))


def _extremes(names: Sequence[str], layers: Sequence[Attention]) -> list[tuple[str, Attention, list[str]]]:
    """Return the layers that stand out, in the order of the model, each with all that it stands out by."""
    reasons: dict[int, list[str]] = {}
    for words, what, choose in _EXTREMES:
        measured = [index for index, layer in enumerate(layers) if getattr(layer, what) is not None]
        values = {getattr(layers[index], what) for index in measured}
        if len(values) > 1:
            found: int = choose(measured, key=lambda index: getattr(layers[index], what))
            reasons.setdefault(found, []).append(words)
    return [(names[index], layers[index], reasons[index]) for index in sorted(reasons)]


def _short_names(sites: Sequence[str]) -> tuple[str, list[str]]:
    """Return what the names have in common, with "*" for the layer's number, and the numbers; all names where they differ otherwise."""
    split = [re.split(r"(?<=\.)(\d+)(?=\.|$)", site, maxsplit=1) for site in sites]
    if all(len(parts) == 3 for parts in split) and len({(parts[0], parts[2]) for parts in split}) == 1:
        return f"{split[0][0]}*{split[0][2]}", [parts[1] for parts in split]
    return counted(len(sites), "layer"), list(sites)


def _branches(record: StepRecord, reasons: Reasons) -> Block:
    if not record.branches:
        return Facts((Fact("Dual feed-forward", reasons.missing("feed_forward", "branches", "probe/feed_forward"), "missing"),))
    counts = {(layer.text_tokens, layer.audio_tokens) for layer in record.branches}
    if len(counts) == 1:
        pattern, numbers = _short_names([layer.layer for layer in record.branches])
        name = f"{pattern} ({len(numbers)} layers alike)" if len(numbers) > 1 else record.branches[0].layer
        return _branch_table([(name, record.branches[0])])
    return _branch_table([(layer.layer, layer) for layer in record.branches[:_SHOWN_LAYERS]], len(record.branches) - _SHOWN_LAYERS)


def _branch_table(rows: Iterable[tuple[str, Branches]], left: int = 0) -> Table:
    columns = (Column("layer"), Column("text branch", True), Column("share", True), Column("audio branch", True), Column("share", True))
    cells = []
    for name, layer in rows:
        total = layer.text_tokens + layer.audio_tokens
        text, audio = (share(part / total) if total else MISSING for part in (layer.text_tokens, layer.audio_tokens))
        cells.append((name, counted(layer.text_tokens, "token"), text, counted(layer.audio_tokens, "token"), audio))
    footer = f"and {counted(left, 'layer')} more in the record" if left > 0 else ""
    return Table("Dual feed-forward: tokens that each branch received", columns, tuple(cells), footer=footer)
