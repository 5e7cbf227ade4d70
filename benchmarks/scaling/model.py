"""What two all-reduces of a fixed size take on many ranks, by the usual model of latency and bandwidth; pure arithmetic."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Network:
    """Assumptions about a network.

    Attributes:
        latency_s: α, of one message between neighbours, the library's own overhead included.
        bytes_s: 1/β, what one rank sends (and receives at the same time) a second.
    """

    latency_s: float
    bytes_s: float


def ring_s(nbytes: int, ranks: int, network: Network) -> float:
    """Return the seconds of a ring all-reduce: latency grows with the ranks.

    Source: Thakur, Rabenseifner, Gropp, "Optimization of Collective Communication Operations in MPICH", 2005: 2(p-1)α + 2(p-1)/p·nβ.
    """
    return 2 * (ranks - 1) * network.latency_s + 2 * (ranks - 1) / ranks * nbytes / network.bytes_s


def tree_s(nbytes: int, ranks: int, network: Network) -> float:
    """Return the seconds of an all-reduce by trees (reduce, then broadcast, pipelined): latency grows with the logarithm of the ranks.

    Source: Sanders, Speck, Träff, "Two-tree algorithms for full bandwidth broadcast, reduction and scan", 2009, which NCCL's double
    binary trees follow: 2·log2(p)·α + 2nβ.
    """
    return 2 * math.ceil(math.log2(ranks)) * network.latency_s + 2 * nbytes / network.bytes_s if ranks > 1 else 0.0


def ring_bytes(nbytes: int, ranks: int) -> float:
    """Return what each rank sends in a ring all-reduce; no algorithm without help from the network sends less."""
    return 2 * (ranks - 1) / ranks * nbytes


def both(sums: int, maxima: int, ranks: int, network: Network) -> tuple[float, float]:
    """Return the seconds of the two all-reduces, one after the other: by rings, and by trees."""
    return (
        ring_s(sums, ranks, network) + ring_s(maxima, ranks, network),
        tree_s(sums, ranks, network) + tree_s(maxima, ranks, network),
    )


def line(points: list[tuple[float, float]]) -> tuple[float, float]:
    """Return (slope, value at 0) of the line through the last two points, which the largest sizes decide.

    Raises:
        ValueError: if there are fewer than two.
    """
    if len(points) < 2:
        raise ValueError(f"a line needs two points, got {len(points)}")
    (x0, y0), (x1, y1) = sorted(points)[-2:]
    slope = (y1 - y0) / (x1 - x0)
    return slope, y0 - slope * x0
