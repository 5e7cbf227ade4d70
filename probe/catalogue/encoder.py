"""The metrics of the audio encoder and the projector."""

from __future__ import annotations

from probe.catalogue.metric import POSITIVE, Metric


def encoder_metrics() -> tuple[Metric, ...]:
    """Return the metrics of the encoder, then those of the projector."""
    area, unit = "probe/audio_encoder", "units of the activation"
    return (
        Metric(f"{area}/rms", unit, POSITIVE, "Root mean square of the audio encoder's output.", "√ mean(x²)", True),
        Metric(
            f"{area}/time_std",
            unit,
            POSITIVE,
            "Square root of the variance of the encoder's output over the frames of a clip, the variance averaged over clips and width. "
            "0: collapsed in time.",
            "√ mean(var over time)",
            True,
        ),
        Metric(
            f"{area}/batch_std",
            unit,
            POSITIVE,
            "Square root of the variance of the encoder's output over the clips of a batch, the variance averaged over frames and width. "
            "0: every clip looks the same. Not measured with one clip.",
            "√ mean(var over clips)",
            True,
        ),
        Metric(
            f"{area}/gradient_norm",
            "loss per unit of the activation",
            POSITIVE,
            "L2 norm of the gradient of the loss that reached the encoder's output. 0: nothing flowed back into the encoder.",
            "√ Σ (∂loss/∂x)²",
            True,
        ),
        Metric(f"{area}/nonfinite", "values", "whole number ≥ 0", "NaN and Inf values in the encoder's output.", "torch.isfinite"),
        Metric(
            f"{area}/calls",
            "calls",
            "whole number ≥ 0",
            "Calls of the audio encoder inside training forwards of the step, over all micro-batches and ranks; recompute not counted.",
            "forward hook",
        ),
        Metric(
            "probe/projector/rms",
            unit,
            POSITIVE,
            "Root mean square of the output of the projector between audio encoder and decoder.",
            "√ mean(x²)",
        ),
        Metric(
            "probe/projector/gradient_norm",
            "loss per unit of the activation",
            POSITIVE,
            "L2 norm of the gradient of the loss that reached the projector's output. 0: the decoder did not use it.",
            "√ Σ (∂loss/∂x)²",
        ),
    )
