"""The block "Loss audit" of the outputs: the loss that was backpropagated beside the expected one, their ratio, and what is off."""

from __future__ import annotations

from probe.records import LossAudit, StepRecord
from probe.sections.blocks import Block, Fact, Facts, Note, Tone
from probe.sections.numbers import number
from probe.sections.reasons import Reasons

_RATIO, _LOGGED = "probe/loss_audit/ratio", "probe/loss_audit/logged_ratio"
_AGREES = 1e-3
_WRONG = 1e-2  # from here on gradients are scaled by more than what rounding or padding would explain


def loss_audit_blocks(record: StepRecord, reasons: Reasons) -> tuple[Block, ...]:
    """Return the audit's line and one note a cause; where there is no ratio, the reason; nothing if the record knows of no audit."""
    audit, why = record.loss_audit, record.not_measured
    reasons.missing(_LOGGED)  # said by the line below, which has no "logged" then
    if audit is None and (_RATIO not in why or why[_RATIO] == why.get("probe/loss")):
        return ()
    if audit is None or audit.expected is None:
        causes = () if audit is None else audit.causes
        return (Facts((Fact("Loss audit", reasons.missing(_RATIO), "missing"),)), *(Note(f"Loss audit: {c}", "critical") for c in causes))
    tone = _tone(audit)
    return (Note(f"Loss audit: {_line(audit)}", tone), *(Note(f"Loss audit: {cause}", tone) for cause in audit.causes))


def _line(audit: LossAudit) -> str:
    error = f" ± {number(audit.standard_error)}" if audit.standard_error else ""
    expected = f"expected {number(audit.expected)}{error} ({audit.reduction})"
    if audit.backpropagated is None or audit.ratio is None:
        return f"backpropagated NaN or Inf, {expected}"
    logged = "" if audit.logged is None else f", logged {number(audit.logged)}"
    return f"backpropagated {number(audit.backpropagated)}, {expected}{logged}: ratio {audit.ratio:.3f}"


def _tone(audit: LossAudit) -> Tone:
    """Critical where the loss is not finite or off by more than 1 %; a warning for whatever else has a cause."""
    if audit.ratio is None or (audit.causes and abs(audit.ratio - 1) > _WRONG):
        return "critical"
    return "warning" if audit.causes or (abs(audit.ratio - 1) > _AGREES and not audit.standard_error) else "plain"
