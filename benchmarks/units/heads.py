"""Heads at growing vocabularies, rows fixed: the score against the model's own cross-entropy of the same logits, and its memory."""

from __future__ import annotations

import statistics
from dataclasses import dataclass

import torch
from torch.nn import functional

from benchmarks.units.memory import curve
from benchmarks.units.targets import Target
from benchmarks.units.timing import Estimate, interleaved, ratio
from probe.measure.heads import score
from probe.measure.variants import Variant

VOCABULARIES = (51_865, 151_936, 262_144)
ROWS = 128
MIB = 1 << 20


@dataclass(frozen=True)
class HeadRow:
    """One vocabulary.

    Attributes:
        vocabulary: Logits a row.
        dtype: Of the logits.
        loss_ms: ``cross_entropy(logits.float())``, forward only, as transformers computes it.
        score_ms: What the probe takes for all it says of a head (loss, accuracy, entropy, calibration, three audited slips).
        over_loss: The latter over the former.
        ns_a_logit: Of the score.
        extra_mib: Its memory at the peak; ``None`` on CUDA.
        logits_mib: The logits themselves.
    """

    vocabulary: int
    dtype: str
    loss_ms: float
    score_ms: float
    over_loss: Estimate
    ns_a_logit: float
    extra_mib: float | None
    logits_mib: float


def head_costs(device: torch.device, *, vocabularies: tuple[int, ...] = VOCABULARIES, rows: int = ROWS, rounds: int = 5) -> list[HeadRow]:
    """Measure each vocabulary, in float32 and bfloat16."""
    return [_one(device, vocabulary, dtype, rows, rounds) for vocabulary in vocabularies for dtype in (torch.float32, torch.bfloat16)]


def _one(device: torch.device, vocabulary: int, dtype: torch.dtype, rows: int, rounds: int) -> HeadRow:
    generator = torch.Generator(device).manual_seed(vocabulary)
    logits = torch.randn((rows, vocabulary), generator=generator, device=device).to(dtype)
    labels = torch.randint(0, vocabulary, (rows,), generator=generator, device=device)
    others: dict[Variant, torch.Tensor] = {"shift_less": labels.roll(1), "shift_more": labels.roll(-1), "padding_out": labels.clone()}

    def own() -> torch.Tensor:
        return functional.cross_entropy(logits.float(), labels)

    def scored() -> object:
        return score(logits, labels, others=others)

    with torch.no_grad():
        times = interleaved({"loss": own, "score": scored}, rounds=rounds, device=device)
        extra = None if device.type == "cuda" else curve(scored).peak / MIB
    took = statistics.median(times["score"])
    return HeadRow(
        vocabulary,
        str(dtype).removeprefix("torch."),
        statistics.median(times["loss"]) * 1e3,
        took * 1e3,
        ratio(times["score"], times["loss"]),
        took * 1e9 / logits.numel(),
        extra,
        logits.numel() * logits.itemsize / MIB,
    )


def target(rows: list[HeadRow]) -> Target:
    """Judge growth: nanoseconds a logit at the largest vocabulary over those at the smallest."""
    alone = [row for row in rows if row.dtype == "float32"]
    growth = alone[-1].ns_a_logit / alone[0].ns_a_logit
    most = max((row.extra_mib for row in rows if row.extra_mib is not None), default=None)
    held = "" if most is None else f"; memory {most:.3g} MiB at most"
    return Target(
        "growth: flat in the vocabulary beyond one pass over the logits",
        "time a logit grows by a factor of at most 1.25",
        f"{growth:.2f} from {alone[0].vocabulary:,} to {alone[-1].vocabulary:,} "
        f"({alone[0].ns_a_logit:.3g} to {alone[-1].ns_a_logit:.3g} ns a logit; {alone[-1].over_loss.text()} times the loss itself){held}",
        growth <= 1.25,
        "" if growth <= 1.25 else "fewer rows fit into a block of bounded memory, so that what a block costs whatever its size weighs more",
    )
