"""The metric of what the probe itself takes."""

from __future__ import annotations

from probe.catalogue.metric import POSITIVE, Metric


def overhead_metrics() -> tuple[Metric, ...]:
    """Return the probe's own share of the time."""
    return (
        Metric(
            "probe/overhead/pct",
            "%",
            POSITIVE,
            "The probe's own time since the last record ÷ the wall time since then, on this rank; in a training's first record since the "
            "probe was ready, so of the first, sampled step alone. On a CPU the host's time in the probe; on CUDA the time between events "
            "on the device round its work, and the host's time for the rest. The record's `overhead` has it by part.",
            "probe.capture.meter",
            True,
        ),
    )
