"""The page of scaling, from a units file, counted layouts and counted launches; text only, nothing is measured here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.scaling import prose
from benchmarks.scaling.launches import Launches
from benchmarks.scaling.layouts import Columns, Watched
from benchmarks.scaling.model import Network, both, line, ring_bytes

RANKS = (8, 64, 512, 4096, 16_384)
CADENCE = 100
TOKENS = 4096
# Assumptions; each is said on the page.
NETWORK = Network(latency_s=10e-6, bytes_s=25e9)
FLOPS_S = 400e12
READ_S = 2.4e12
LAUNCH_S = 10e-6
ROUND_TRIP_S = 100e-6


@dataclass(frozen=True)
class Counted:
    """What is counted here and not measured: columns and watched outputs of the models, by name, and launches."""

    columns: Sequence[Columns]
    watched: Mapping[str, Watched]
    launches: Launches


def page(report: Mapping[str, Any], counted: Counted, *, source: str) -> str:
    """Return the whole page.

    Args:
        report: What ``benchmarks.units`` wrote.
        counted: The layouts and launches.
        source: The name of the file of units; "" if there is none: then nothing measured is shown.
    """
    measured = prose.UNMEASURED
    if source:
        machine = report["machine"]
        versions = f"{machine['date']} · {machine['device']} · torch {machine['torch']} · transformers {machine['transformers']}"
        measured = prose.MEASURED.format(source=source, versions=versions)
    parts = [
        prose.ABOUT.format(measured=measured),
        _assumptions(),
        _layout(counted.columns),
        _collectives(counted.columns[-1], max(seen.forward_flops for seen in counted.watched.values())),
        _measured_collectives(report),
        _agreement(report),
        _work(counted, report),
        _memory(report),
        _files(report, counted.columns),
        prose.HONEST,
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _assumptions() -> str:
    rows = [
        ("latency of one message, α", f"{NETWORK.latency_s * 1e6:.0f} µs", "between nodes, the library's launch included"),
        ("bandwidth of a rank, 1/β", f"{NETWORK.bytes_s / 1e9:.0f} GB/s", "half of a 400 Gb/s link for each GPU"),
        ("arithmetic of a rank", f"{FLOPS_S / 1e12:.0f} TFLOP/s", "bf16, some 40 % of the peak of an H100"),
        ("memory of a rank", f"{READ_S / 1e12:.1f} TB/s", "read by the statistics: some 70 % of an H100's"),
        ("launch of one operation", f"{LAUNCH_S * 1e6:.0f} µs", "on the host, Python and dispatch included"),
        ("round trip to the store", f"{ROUND_TRIP_S * 1e6:.0f} µs", "between nodes, one request at a time"),
        ("tokens of a rank in a step", f"{TOKENS:,}", "one micro-batch; more make the step longer and the shares smaller"),
    ]
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([prose.ASSUMED, "", "| what | value | where from |", "|---|---|---|", *lines])


def _layout(columns: Sequence[Columns]) -> str:
    head = "| model | parameters | sites | parameter tensors | sums and counts | maxima | first all-reduce | second |"
    rows = [
        f"| {one.model} | {one.parameters / 1e9:.1f} B | {one.sites} | {one.tensors:,} | {one.sums:,} | {one.maxima:,} | "
        f"{one.sum_bytes / 1024:.1f} KiB | {one.maximum_bytes / 1024:.1f} KiB |"
        for one in columns
    ]
    return "\n".join([prose.LAYOUT, "", head, "|---|---|---|---|---|---|---|---|", *rows])


def _collectives(one: Columns, forward_flops: float) -> str:
    step = 3 * forward_flops / FLOPS_S
    rows = []
    for ranks in RANKS:
        ring, tree = both(one.sum_bytes, one.maximum_bytes, ranks, NETWORK)
        sent = ring_bytes(one.sum_bytes + one.maximum_bytes, ranks)
        shares = " | ".join(f"{seconds / (CADENCE * step):.2g}" for seconds in (ring, tree))
        rows.append(f"| {ranks:,} | {sent / 1024:.0f} KiB | {ring * 1e3:.3g} ms | {tree * 1e3:.3g} ms | {shares} |")
    text = prose.COLLECTIVES.format(cadence=CADENCE, step=step)
    head = "| ranks | sent by each rank | by a ring | by a tree | share, ring | share, tree |"
    return "\n".join([text, "", head, "|---|---|---|---|---|---|", *rows, "", prose.COLLECTIVES_END])


def _measured_collectives(report: Mapping[str, Any]) -> str:
    rows = report["rows"].get("ranks", {}).get("all_reduce", [])
    if not rows:
        return ""
    lines = [f"| {row['world']} | {row['columns']:,} | {_interval(row['ms'])} |" for row in rows]
    return "\n".join([prose.GLOO, "", "| processes | columns | ms |", "|---|---|---|", *lines])


def _agreement(report: Mapping[str, Any]) -> str:
    rows = report["rows"].get("ranks", {}).get("store", [])
    if len(rows) < 2:
        return ""
    lines = [
        f"| {row['world']:,} | {row['world'] + 3:,} | {_interval(row['ms'])} | {(row['world'] - 1) * ROUND_TRIP_S:.2g} s |" for row in rows
    ]
    slope_ms, _ = line([(row["world"], row["ms"]["median"]) for row in rows])
    last = rows[-1]
    request_us = last["request_us"]
    asked, rate = 4 * (last["world"] - 1), 1e6 / request_us
    end = prose.AGREEMENT_END.format(asked=asked, world=last["world"], rate=rate, request_us=request_us)
    head = "| ranks | keys | rank 0, measured on one machine, ms | one request a rank between nodes, at the assumed round trip |"
    return "\n".join([prose.AGREEMENT.format(us=slope_ms * 1e3), "", head, "|---|---|---|---|", *lines, "", end])


def _work(counted: Counted, report: Mapping[str, Any]) -> str:
    heads = {row["vocabulary"]: row for row in report["rows"].get("heads", []) if row["dtype"] == "float32"}
    over_loss = heads[max(heads)]["over_loss"]["median"] if heads else None
    rows = []
    for one in counted.columns:
        seen = counted.watched.get(one.model)
        if seen is None:
            continue
        reading = seen.output_bytes / READ_S
        scoring = None if over_loss is None else 3 * 4 * seen.logits * over_loss / READ_S
        launching = (counted.launches.fixed + counted.launches.a_layer * seen.attention_calls) * LAUNCH_S
        step = 3 * seen.forward_flops / FLOPS_S
        total = reading + (scoring or 0.0) + launching
        rows.append(
            f"| {one.model} | {seen.output_bytes / 1e9:.2g} GB | {reading * 1e3:.2g} ms | {_ms(scoring)} | {launching * 1e3:.2g} ms | "
            f"{step:.2g} s | {total / step:.2%} | {total / step / CADENCE:.4%} |"
        )
    said = "an amount that was not measured" if over_loss is None else prose.OVER_LOSS.format(over_loss=over_loss)
    added = counted.launches
    text = prose.WORK.format(tokens=TOKENS, heads=said, a_layer=added.a_layer, fixed=added.fixed)
    head = "| model | outputs, bf16 | statistics | heads | launches | plain step | share of a sampled step | at cadence 100 |"
    return "\n".join([text, "", head, "|---|---|---|---|---|---|---|---|", *rows])


def _memory(report: Mapping[str, Any]) -> str:
    rows = report["rows"].get("memory", [])
    if not rows:
        return ""
    lines = [
        f"| {row['workload']} | {row['plain_mib']:,.0f} MiB | {row['extra_mib']:.1f} MiB | {row['at_peak']} | {_largest(row)} |"
        for row in rows
    ]
    head = "| model and batch | peak of a plain step | more in a sampled one | running at the peak | largest part |"
    return "\n".join([prose.MEMORY, "", head, "|---|---|---|---|---|", *lines])


def _largest(row: Mapping[str, Any]) -> str:
    parts = row["parts"]
    return f"{parts[0]['name']}: {parts[0]['most_mib']:.1f} MiB" if parts else "not known"


def _files(report: Mapping[str, Any], columns: Sequence[Columns]) -> str:
    rows = report["rows"].get("host", {}).get("bytes", [])
    if not rows:
        return ""
    most = max(rows, key=lambda row: row["columns"]["cells"])
    a_cell = most["record_bytes"] / most["columns"]["cells"]
    lines = [f"| {row['workload']} | measured | {row['columns']['cells']} | {row['record_bytes'] / 1024:.0f} KiB |" for row in rows]
    lines += [f"| {one.model} | extrapolated | {one.cells} | {one.cells * a_cell / 1024:.0f} KiB |" for one in columns]
    last = columns[-1].cells * a_cell
    text = prose.FILES.format(a_cell=a_cell, cadence=CADENCE, gb=last * 1e4 / 1e9)
    return "\n".join([text, "", "| model | how known | cells | a record |", "|---|---|---|---|", *lines])


def _interval(value: Mapping[str, float]) -> str:
    return f"{value['median']:.3g} [{value['low']:.3g}, {value['high']:.3g}]"


def _ms(seconds: float | None) -> str:
    return "not measured" if seconds is None else f"{seconds * 1e3:.2g} ms"
