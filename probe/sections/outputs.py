"""What ``OutputLoggerCallback`` shows: the loss, the logits of every head, and predicted against target tokens."""

from __future__ import annotations

from probe.records import Accuracy, Head, StepRecord
from probe.sections.blocks import Block, Column, Fact, Facts, Note, Section, Table
from probe.sections.loss_audit import loss_audit_blocks
from probe.sections.numbers import MISSING, counted, dtype, fixed, interval, number, shape, share
from probe.sections.reasons import OUTPUT, Reasons
from probe.sections.tokens import tokens

_SHOWN_CODEBOOKS = 16


def section(record: StepRecord) -> Section:
    """Return the section "Output" of a record."""
    reasons = Reasons(record, OUTPUT)
    loss = record.metrics.get("probe/loss")
    if loss is None and record.optimisation is not None:
        loss = record.optimisation.loss
    blocks: list[Block] = [
        Facts((reasons.fact("Loss", None if loss is None else number(loss), "probe/loss", "optimisation/loss", "optimisation"),))
    ]
    if record.heads:
        blocks += [_accuracies(record.heads), _logits(record.heads)]
        blocks += [
            Note(f"{_name(head)}: {counted(head.nonfinite, 'logit')} NaN or Inf", "warning") for head in record.heads if head.nonfinite
        ]
        for head in record.heads:
            blocks += tokens(head, _name(head), reasons)
    else:
        blocks.append(Facts((Fact("LM heads", reasons.missing("lm_head", "heads", "head"), "missing"),)))
    blocks += loss_audit_blocks(record, reasons)
    return Section(OUTPUT, record.step, (*blocks, *reasons.rest()))


def _accuracies(heads: tuple[Head, ...]) -> Table:
    columns = (
        Column("head"),
        Column("tokens"),
        Column("labelled", True),
        Column("loss, nats", True),
        Column("accuracy", True),
        Column("top 5", True),
        Column("entropy, nats", True),
        Column("calibration error", True),
        Column("most frequent", True),
    )
    rows: list[tuple[str, ...]] = []
    left = 0
    for head in heads:
        rows.append((_name(head), head.modality, *_numbers(head.accuracy)))
        rows += [("", f"codebook {index}", *_numbers(accuracy)) for index, accuracy in enumerate(head.codebooks[:_SHOWN_CODEBOOKS])]
        left += max(0, len(head.codebooks) - _SHOWN_CODEBOOKS)
    footer = f"and {counted(left, 'codebook')} more in the record" if left else ""
    return Table("Predictions against labels, teacher-forced", columns, tuple(rows), footer=footer)


def _numbers(accuracy: Accuracy | None) -> tuple[str, ...]:
    if accuracy is None:
        return (MISSING,) * 7
    return (
        f"{accuracy.labelled:,}",
        fixed(accuracy.loss),
        share(accuracy.token_accuracy),
        share(accuracy.top5_accuracy),
        fixed(accuracy.entropy),
        share(accuracy.calibration_error),
        share(accuracy.top_token_share),
    )


def _logits(heads: tuple[Head, ...]) -> Table:
    columns = (
        Column("head"),
        Column("logits"),
        Column("dtype"),
        Column("device"),
        Column("calls", True),
        Column("range", True),
        Column("mean", True),
        Column("NaN, Inf", True),
        Column("alignment", flexible=True),
    )
    rows = tuple(
        (
            _name(head),
            shape(head.shape) if head.shape else MISSING,
            dtype(head.dtype),
            head.device,
            f"{head.calls:,}",
            interval(head.minimum, head.maximum),
            number(head.mean),
            f"{head.nonfinite:,}",
            head.alignment,
        )
        for head in heads
    )
    return Table("Logits", columns, rows)


def _name(head: Head) -> str:
    return head.site or "(the model itself)"
