"""What the probe itself took of the time."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Overhead:
    """The probe's own time on this rank since the last record, by part; of a training's first record since the probe was ready.

    ``pct`` is the sum of ``seconds`` as a percentage of ``wall_seconds``, the time that passed. Parts are the observers by name
    (``heads``, ``attention``, …; ``counterfactual`` are the passes with changed audio), ``hooks`` (registering them, and what they do
    beside the observers), ``packing`` and ``publication``. What is counted, on a CPU and on CUDA, says :class:`probe.capture.meter.Meter`.
    """

    pct: float
    wall_seconds: float
    seconds: dict[str, float]
