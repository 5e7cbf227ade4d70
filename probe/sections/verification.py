"""What ``ZeroShotVerificationLoggerCallback`` shows: whether the model heard the audio, and whether that part of it learns."""

from __future__ import annotations

from probe.records import Conditioning, Part, SiteStatistics, StepRecord
from probe.sections.blocks import Block, Column, Fact, Facts, Note, Section, Table
from probe.sections.conditioning import conditioning_blocks
from probe.sections.findings import open_findings
from probe.sections.gradients import gradient_blocks, gradient_flow
from probe.sections.numbers import MISSING, counted, dtype, interval, number, scaled, shape, share
from probe.sections.reasons import VERIFICATION, Reasons

_SHOWN_SITES = 8
_SHOWN_PARTS = 3
# Heads and attention layers have sections of their own; of a feed-forward branch the tokens that it received say more.
_ROLES = ("audio_encoder", "projector", "custom")


def section(record: StepRecord) -> Section:
    """Return the section "Zero-shot verification" of a record, with every reason that no other section shows."""
    reasons = Reasons(record, VERIFICATION)
    encoder = next((row for row in record.statistics if row.role == "audio_encoder"), None)
    blocks: list[Block] = [*open_findings(record)]
    for row in record.statistics:
        if row.nonfinite:
            reasons.missing(f"site:{row.site}")  # the note says it better
            blocks.append(Note(f"{row.site or row.role}: {row.nonfinite:,} of {row.elements:,} output values are NaN or Inf", "warning"))
    blocks += conditioning_blocks(record, reasons)
    facts = (*_encoder(record, encoder, reasons), *_conditioning(record.conditioning, reasons), *_optimisation(record, reasons))
    blocks.append(Facts(facts))
    blocks += gradient_blocks(record, reasons)
    shown = tuple(row for row in record.statistics if row.role in _ROLES)
    if shown:
        blocks.append(_statistics(shown))
    return Section(VERIFICATION, record.step, (*blocks, *reasons.rest()))


def _encoder(record: StepRecord, row: SiteStatistics | None, reasons: Reasons) -> list[Fact]:
    """Return the state of the audio encoder as measured: called or not, what came out, what trains, what gradient reached it."""
    conditioning = record.conditioning
    name = row.site if row is not None else conditioning.encoder if conditioning is not None else ""
    if not name and row is None:
        return [Fact("Audio encoder", reasons.missing("audio_encoder", "conditioning", "probe/audio_encoder"), "missing")]
    if "statistics" in record.not_measured and not (row is not None and row.calls):
        return [Fact("Audio encoder", f"{name}, {reasons.missing('statistics')}", "missing")]
    calls = row.calls if row is not None else conditioning.encoder_calls if conditioning is not None else 0
    facts = [_calls(name, calls, record)]
    if not calls:
        reasons.missing(f"site:{name}")  # said just now
    if row is not None and calls:
        facts += [Fact("  output", f"{shape(row.shape)} {dtype(row.dtype)}"), *_spread(row, reasons)]
    part = next((part for part in record.parts if part.name in ("audio_encoder", "encoder", name)), None)
    facts.append(reasons.fact("  trains", None if part is None else _trains(part), "parts", "parts/audio_encoder", "grad"))
    norm = conditioning.output_gradient_norm if conditioning is not None else None
    facts.append(
        reasons.fact(
            "  gradient",
            None if norm is None else f"norm {number(norm)} reached the output",
            "probe/audio_encoder/gradient_norm",
            "audio_encoder/gradient_norm",
            "conditioning/output_gradient_norm",
        )
    )
    return facts


def _calls(name: str, calls: int, record: StepRecord) -> Fact:
    micro_batches = record.inputs.micro_batches if record.inputs is not None else None
    over = "" if micro_batches is None else f" in {counted(micro_batches, 'micro-batch')}"
    if not calls:
        return Fact("Audio encoder", f"{name}, not called{over}", "warning")
    without = record.conditioning.micro_batches_without_encoder if record.conditioning is not None else 0
    skipped = f", left out in {counted(without, 'micro-batch')}" if without else ""
    return Fact("Audio encoder", f"{name}, called {counted(calls, 'time')}{over}{skipped}", "warning" if without else "plain")


def _spread(row: SiteStatistics, reasons: Reasons) -> list[Fact]:
    if row.nonfinite:
        return [Fact("  size, spread", f"not measured: {counted(row.nonfinite, 'value')} NaN or Inf", "missing")]
    return [
        reasons.fact(
            "  size",
            None if row.rms is None else f"rms {number(row.rms)}, range {interval(row.minimum, row.maximum)}",
            "probe/audio_encoder/rms",
            "statistics",
        ),
        reasons.fact("  spread over time", None if row.time_std is None else number(row.time_std), "probe/audio_encoder/time_std"),
        reasons.fact("  spread over batch", None if row.batch_std is None else number(row.batch_std), "probe/audio_encoder/batch_std"),
    ]


def _trains(part: Part) -> str:
    without = f", {counted(part.without_gradient, 'tensor')} without gradient" if part.without_gradient else ""
    return f"{share(part.trainable_share)} of {scaled(part.parameters)} parameters{without}"


def _conditioning(conditioning: Conditioning | None, reasons: Reasons) -> list[Fact]:
    codes = None if conditioning is None else conditioning.audio_codes
    words = None if codes is None else f"{counted(codes, 'position')} of discrete audio codes in the inputs"
    facts = [reasons.fact("Audio codes", words, "conditioning/audio_codes", "audio_codes", "conditioning")]
    if conditioning is not None and conditioning.tokens:
        facts.append(Fact("Chat structure", ", ".join(f"{count:,} {name}" for name, count in conditioning.tokens)))
    else:
        facts.append(Fact("Chat structure", reasons.missing("conditioning/tokens", "audio_tokens", "conditioning"), "missing"))
    return facts


def _optimisation(record: StepRecord, reasons: Reasons) -> list[Fact]:
    optimisation = record.optimisation
    rates = () if optimisation is None else optimisation.learning_rates
    distinct = list(dict.fromkeys(rates))
    groups = f" ({counted(len(rates), 'parameter group')})" if len(rates) > 1 else ""
    words = f"{', '.join(map(number, distinct))}{groups}" if rates else None
    return [
        reasons.fact("Learning rate", words, "probe/learning_rate", "optimisation/learning_rates", "optimisation"),
        *gradient_flow(record, reasons),
        *_overhead(record, reasons),
    ]


def _overhead(record: StepRecord, reasons: Reasons) -> list[Fact]:
    """Return what the probe itself took of the time, and most of it for what; nothing of a record that tells neither that nor why."""
    overhead = record.overhead
    if overhead is None:
        untold = "probe/overhead/pct" not in record.not_measured
        return [] if untold else [Fact("The probe's share", reasons.missing("probe/overhead/pct"), "missing")]
    most = ", ".join(f"{name} {share(seconds / overhead.wall_seconds)}" for name, seconds in list(overhead.seconds.items())[:_SHOWN_PARTS])
    return [Fact("The probe's share", f"{share(overhead.pct / 100.0)} of the time since the last record{f' ({most})' if most else ''}")]


def _statistics(statistics: tuple[SiteStatistics, ...]) -> Table:
    columns = (
        Column("site"),
        Column("role"),
        Column("calls", True),
        Column("output"),
        Column("mean", True),
        Column("rms", True),
        Column("range", True),
        Column("NaN, Inf", True),
    )
    rows = tuple(
        (
            row.site or "(the model itself)",
            row.role,
            f"{row.calls:,}",
            shape(row.shape) if row.calls else MISSING,
            number(row.mean),
            number(row.rms),
            interval(row.minimum, row.maximum),
            f"{row.nonfinite:,}",
        )
        for row in statistics[:_SHOWN_SITES]
    )
    left = len(statistics) - len(rows)
    footer = f"and {counted(left, 'site')} more in the record" if left else ""
    return Table("Outputs of the observed sites", columns, rows, footer=footer)
