"""The catalogue of public metrics, as data.

The order of the catalogue is the order of importance: when more headline metrics are present than a log takes, the first ones win.
"""

from __future__ import annotations

from probe.catalogue.attention import attention_metrics
from probe.catalogue.encoder import encoder_metrics
from probe.catalogue.findings import finding_metrics
from probe.catalogue.heads import codebook_metrics, head_metrics
from probe.catalogue.inputs import branch_metrics, input_metrics
from probe.catalogue.loss import loss_audit_metrics
from probe.catalogue.metric import KINDS, Metric
from probe.catalogue.overhead import overhead_metrics
from probe.catalogue.reference import reference_detail_metrics, reference_metrics
from probe.catalogue.training import gradient_metrics, part_metrics

__all__ = ["CATALOGUE", "HEADLINE_LIMIT", "KINDS", "Metric"]

HEADLINE_LIMIT = 24

CATALOGUE: tuple[Metric, ...] = (
    Metric(
        "probe/loss",
        "as the Trainer's loss",
        "any",
        "What `training_step` returned, summed over the micro-batches of the step and averaged over ranks. It is what was backpropagated, "
        "except in transformers 4.46, which with accumulation k returns a k-th of it.",
        "transformers.Trainer.training_step",
        True,
    ),
    *finding_metrics(),
    *loss_audit_metrics(),
    *head_metrics("text", "text tokens"),
    *head_metrics("audio", "audio tokens"),
    *reference_metrics(),
    *encoder_metrics(),
    *attention_metrics(),
    *gradient_metrics(),
    *overhead_metrics(),
    *input_metrics(),
    *branch_metrics(),
    *part_metrics(),
    *codebook_metrics(),
    *reference_detail_metrics(),
    Metric(
        "probe/step",
        "steps",
        "whole number ≥ 1",
        "The sampled step at which the `probe/…` values beside it in a log were measured; the log itself may be of a later step.",
        "TrainerState.global_step at on_step_end",
    ),
)
