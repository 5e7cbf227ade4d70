"""Rules about the loss: not finite, scaled by accumulation, another one than meant, without its audio."""

from __future__ import annotations

from probe.findings.rule import History, Rule, Symptom
from probe.findings.rules.streaks import newest
from probe.records import LossAudit, Severity, StepRecord

CONSTANT = 2e-3
"""How far ratios of several steps may differ for a constant factor, relative: twice what counts as agreement of one loss."""

_ELSEWHERE = ("masked", "nonfinite", "accumulation", "shift", "padding", "audio", "log")
"""Kinds of causes that have findings of their own, or hide nothing by themselves (``log`` goes with ``accumulation``)."""

_ON_PURPOSE = ("loss_function", "forward", "override")
"""Kinds that may be meant: somebody wrote another loss."""


def loss_not_finite(history: History) -> list[Symptom] | None:
    """Judge the loss that was backpropagated, and the logits of the heads, in the newest three records."""
    now = _nonfinite(history.last)
    if now is None:
        return None
    rows = [why for record in history.records[-3:] if (why := _nonfinite(record))]
    if not now or len(rows) < 2:
        return []
    return [Symptom(f"{now}, in {len(rows)} of the newest {min(len(history.records), 3)} sampled steps")]


def loss_scaled_by_accumulation(history: History) -> list[Symptom] | None:
    """Judge what the loss audit says of accumulation."""
    audit = history.last.loss_audit
    if audit is None or audit.ratio is None:
        return None
    if "accumulation" not in audit.kinds:
        return []
    evidence = {"ratio": audit.ratio}
    if history.setup is not None:
        evidence["accumulation"] = float(history.setup.accumulation)
    return [
        Symptom(f"the loss is {audit.ratio:.3g} times what it should be (1 ± 0.001): {_cause(audit, 'accumulation')}", evidence=evidence)
    ]


def loss_off(history: History) -> list[Symptom] | None:
    """Judge what else the loss audit says, in two audited records in a row. What may be meant is info, unless it is a constant factor."""
    found = newest(history, 2, _audited)
    if found is None:
        return None
    kinds = [kind for kind in found[-1].kinds if kind not in _ELSEWHERE] if found else []
    if not kinds or not all(set(audit.kinds) - set(_ELSEWHERE) for audit in found):
        return []
    last = found[-1]
    ratios = [audit.ratio or 0.0 for audit in found]
    factor = abs(ratios[0] - ratios[1]) <= CONSTANT * abs(ratios[1])
    severity: Severity = "info" if set(kinds) <= set(_ON_PURPOSE) and not factor else "warning"
    message = f"the loss is {ratios[-1]:.4g} times what it is expected to be (1 ± 0.001), twice in a row: {_cause(last, kinds[0])}"
    evidence = {"ratio": ratios[-1], "backpropagated": last.backpropagated or 0.0, "expected": last.expected or 0.0}
    return [Symptom(message, evidence=evidence, severity=severity)]


def audio_loss_missing(history: History) -> list[Symptom] | None:
    """Judge whether audio labels are there, counted, scored, in the loss, and reached by a gradient; each in two or three records."""
    if _labels(history.last) is None:
        return None
    why = _masked(history) or _unscored(history) or _not_in_the_loss(history)
    if not why:
        return []
    return [Symptom(why, evidence={"audio_labels": float(_labels(history.last) or 0)})]


def _masked(history: History) -> str:
    counts = newest(history, 3, _labels)
    text = history.last.checks is not None and history.last.checks.labels is not None and history.last.checks.labels.labelled > 0
    return "every audio label is -100, in 3 sampled steps in a row" if counts and not any(counts) and text else ""


def _unscored(history: History) -> str:
    """Return which audio head took no part in forwards that had audio labels."""
    found = newest(history, 2, lambda record: _idle_head(record) if _labels(record) else None)
    return f"there are audio labels, and {found[-1]} was not called" if found and all(found) else ""


def _not_in_the_loss(history: History) -> str:
    by_audit = newest(history, 2, lambda record: "audio" in record.loss_audit.kinds if record.loss_audit is not None else None)
    audit = history.last.loss_audit
    if by_audit and all(by_audit) and audit is not None:
        return f"{_cause(audit, 'audio')} (ratio {audit.ratio or 0:.3g})"
    cut = newest(history, 2, lambda record: _head_without_gradient(record) if _labels(record) else None)
    return f"there are audio labels, and no gradient reaches the output of {cut[-1]}" if cut and all(cut) else ""


def _labels(record: StepRecord) -> int | None:
    return None if record.checks is None else record.checks.audio_labels


def _idle_head(record: StepRecord) -> str | None:
    heads = [head for head in record.heads if head.modality == "audio"]
    if not heads or "heads" in record.not_measured:
        return None
    idle = [head.site for head in heads if not head.calls and not (head.accuracy is not None and head.accuracy.labelled)]
    return idle[0] if len(idle) == len(heads) else ""


def _head_without_gradient(record: StepRecord) -> str | None:
    """Return the audio head without a gradient while another head has one, "" if all is well, ``None`` if that cannot be told."""
    norms = {row.site: row.norm for row in record.activation_gradients}
    audio = [head.site for head in record.heads if head.modality == "audio" and head.calls]
    if not audio or not any(norms.get(head.site) for head in record.heads if head.modality != "audio"):
        return None
    return "" if any(norms.get(site, 0.0) for site in audio) else audio[0]


def _nonfinite(record: StepRecord) -> str | None:
    """Return in words what of the loss is not finite, "" if all is, ``None`` if nothing is known of it."""
    audit = record.loss_audit
    if audit is not None and "nonfinite" in audit.kinds:
        return _cause(audit, "nonfinite")
    if audit is not None and audit.backpropagated is None:
        return "the loss that was backpropagated is NaN or Inf"
    # Some models mask logits with -Inf on purpose: only where no loss could be taken of them is that the trouble.
    head = next((head for head in record.heads if head.nonfinite and head.accuracy is not None and not head.accuracy.labelled), None)
    if head is not None and audit is None:
        return f"{head.nonfinite:,} logits of {head.site} are NaN or Inf"
    return None if audit is None and not any(head.calls for head in record.heads) else ""


def _audited(record: StepRecord) -> LossAudit | None:
    return record.loss_audit if record.loss_audit is not None and record.loss_audit.ratio is not None else None


def _cause(audit: LossAudit, kind: str) -> str:
    return next((cause for cause, its in zip(audit.causes, audit.kinds) if its == kind), "")


RULES: tuple[Rule, ...] = (
    Rule(
        code="loss-not-finite",
        severity="critical",
        meaning="The loss is NaN or Inf. Its gradient is NaN for every parameter; one such update, and so are the weights. The "
        "log may hide "
        "it (logging_nan_inf_filter).",
        advice="Look at what else is not finite: activations name the first site. Else it is the loss: a mean over no label (all -100), "
        "a logarithm or a division by 0 in compute_loss, logits beyond float16.",
        threshold="NaN or Inf in 2 of the newest 3 sampled steps: a single one can be a bad batch.",
        check=loss_not_finite,
    ),
    Rule(
        code="loss-scaled-by-accumulation",
        severity="critical",
        meaning="The loss is multiplied or divided by the number of accumulated micro-batches: gradients, the effect of clipping and the "
        "logged loss are off by that factor, and runs with other accumulation cannot be compared.",
        advice="The cause names what multiplies. In a compute_loss of your own divide by num_items_in_batch, or by "
        "gradient_accumulation_steps; for a defect of the installed transformers set trainer.model_accepts_loss_kwargs = False, or train "
        "without accumulation. See the loss audit.",
        threshold="The loss audit finds that a factor of the number of micro-batches explains the loss to 3 in 10,000. It is at least 2.",
        check=loss_scaled_by_accumulation,
    ),
    Rule(
        code="loss-off",
        severity="warning",
        meaning="The loss that is backpropagated is not the cross-entropy of the model's predictions as its class and the "
        "Trainer's settings "
        "are meant to put it together.",
        advice="Read the cause, and the page on the loss audit. If somebody meant it so (an auxiliary loss, a weight), it can stay.",
        threshold="More than 1 in 1,000 off (more in half precision), in two audited steps in a row. What changes from step to "
        "step and comes "
        "from a loss function, a forward or a method that somebody wrote is only told (info); a constant factor is a warning.",
        check=loss_off,
    ),
    Rule(
        code="audio-loss-missing",
        severity="critical",
        meaning="There are labels for audio tokens, and the loss is without them: the audio head, and what serves it, learns nothing.",
        advice="Follow the audio labels from the collator to the loss: do they get to the model (the name in forward, "
        "remove_unused_columns, label_names), are they masked by mistake, is their loss added to what training_step backpropagates?",
        threshold="All audio labels are -100 in 3 sampled steps in a row while text has labels; or, in 2, the audio head is not called, "
        "the loss equals that of the text alone to 3 in 10,000, or no gradient reaches the audio head while one reaches another head.",
        check=audio_loss_missing,
    ),
)
