"""The metrics of the loss audit."""

from __future__ import annotations

from probe.catalogue.metric import Metric


def loss_audit_metrics() -> tuple[Metric, ...]:
    """Return the ratios of the audit."""
    return (
        Metric(
            "probe/loss_audit/ratio",
            "1",
            "any; 1 when healthy",
            "The loss that was backpropagated ÷ the loss that the captured predictions and labels make, put together as the model's class "
            "and the Trainer's settings mean it (label smoothing, the labels of all micro-batches and ranks, several heads), over the "
            "step. k: something scales the loss by k. How it is put together: docs/loss-audit.md.",
            "torch.nn.functional.cross_entropy; transformers.trainer_pt_utils.LabelSmoother",
            True,
        ),
        Metric(
            "probe/loss_audit/logged_ratio",
            "1",
            "any; 1 when healthy",
            "The training loss that the Trainer logs of the step ÷ the loss that was backpropagated. Only with `logging_steps=1`; "
            "transformers before 5 round the log to 4 decimals.",
            "transformers.Trainer.log",
        ),
    )
