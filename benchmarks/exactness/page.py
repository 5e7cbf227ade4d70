"""The tables of docs/exactness.md as Markdown."""

from __future__ import annotations

import platform
from collections.abc import Iterable, Sequence
from datetime import date

import torch
import transformers

import probe
from benchmarks.exactness.attention import AttentionRow
from benchmarks.exactness.audit import AuditRow
from benchmarks.exactness.heads import HeadRow, SizeRow
from benchmarks.exactness.memory import MemoryRow

_ABOUT = """\
# How exact it is

Made by `make exactness`; do not edit. Every figure is the largest difference from an independent computation on fresh random inputs:
attention from the weights of an eager copy of the model, head scores from the full logits in float64, the audited loss from the one that
the unmodified Trainer backpropagated."""
_ATTENTION = """\
## Attention probabilities against eager attention

Models in evaluation mode, float32, every layer, at query rows that are not padding (`rows` were taken, padding among them). The eager
model's hidden states differ from the other kernel's by rounding, layer by layer; that is in the difference, too. `flash (stand-in)`:
transformers' own flash-attention integration, calling a stand-in for the `flash_attn` package written in PyTorch, for want of a GPU."""
_MEMORY = """\
Everything that is said of one call of random q and k in bf16, 64 rows: the peak of extra memory by the allocator's own counters beside the
size of the full matrix in float32, and the largest difference of a probability from float64 on the same q and k."""
_HEADS = """\
## Heads: cross-entropy and accuracy against the full logits

One sampled training step of the tiny models of the test suite, in float32 and under bf16 autocast; differences in nats and in shares."""
_SIZES = """\
Random logits of real vocabularies, scored on their own: relative difference of the cross-entropy, and the peak of extra memory by the
allocator's own counters."""
_AUDIT = """\
## The loss audit on unmodified Trainers

The second step of training; `k` is gradient accumulation. A ratio other than 1 with a cause is what the installed transformers really does.
`never called`: a stand-in for fused losses (Liger, TRL) that computes the loss without calling the head; the head is then evaluated on at
most 256 labelled rows of a micro-batch (here on all of them)."""


def page(
    attention: Iterable[AttentionRow],
    memory: Iterable[MemoryRow],
    heads: Iterable[HeadRow],
    sizes: Iterable[SizeRow],
    audits: Iterable[AuditRow],
) -> str:
    """Return the whole page."""
    versions = (
        f"Python {platform.python_version()} · torch {torch.__version__} · transformers {transformers.__version__} · "
        f"probe {probe.__version__}"
    )
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU ({platform.machine()})"
    parts = [
        _ABOUT,
        f"{date.today().isoformat()} · {device} · {versions}",
        _ATTENTION,
        _table(("model", "layers", "kernel", "mask", "(B, H, S, K)", "rows", "heads", "largest difference"), map(_attention, attention)),
        _MEMORY,
        _table(("(B, H, S, K)", "full matrix, MiB", "extra memory, MiB", "largest difference"), map(_memory, memory)),
        _HEADS,
        _table(("model", "head", "logits", "labelled", "cross-entropy", "accuracy"), map(_head, heads)),
        _SIZES,
        _table(("vocabulary", "rows", "dtype", "logits, MiB", "cross-entropy", "accuracy", "extra memory, MiB"), map(_size, sizes)),
        _AUDIT,
        _table(("model", "k", "smoothing", "head", "backpropagated", "expected", "ratio", "what the audit says"), map(_audit, audits)),
    ]
    return "\n\n".join(parts) + "\n"


def _table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [f"| {' | '.join(columns)} |", "|" + "---|" * len(columns)]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)])


def _attention(row: AttentionRow) -> Sequence[str]:
    about = (row.model, row.layers, row.kernel, row.mask)
    if row.difference is None:
        return (*about, "", "", "", row.note)
    return (*about, str(row.shape), str(row.rows), str(row.shape[1]), f"{row.difference:.1e}")


def _memory(row: MemoryRow) -> Sequence[str]:
    return (str(row.shape), f"{row.matrix_mib:,.0f}", f"{row.peak_mib:.1f}", f"{row.difference:.1e}")


def _head(row: HeadRow) -> Sequence[str]:
    logits = f"{row.shape} {row.dtype}"
    return (row.model, f"`{row.head}`", logits, str(row.labelled), f"{row.loss_difference:.1e}", f"{row.accuracy_difference:.1e}")


def _size(row: SizeRow) -> Sequence[str]:
    differences = (f"{row.loss_difference:.1e}", f"{row.accuracy_difference:.1e}")
    return (f"{row.vocabulary:,}", f"{row.rows:,}", row.dtype, f"{row.logits_mib:,.0f}", *differences, f"{row.peak_mib:.1f}")


def _audit(row: AuditRow) -> Sequence[str]:
    about = (row.model, str(row.accumulation), f"{row.smoothing:g}", row.head)
    audit = row.audit
    if audit is None or audit.ratio is None or audit.backpropagated is None or audit.expected is None:
        return (*about, "", "", "", row.note)
    said = "; ".join((audit.reduction, *audit.causes))
    return (*about, f"{audit.backpropagated:.5f}", f"{audit.expected:.5f}", f"{audit.ratio:.5f}", said)
