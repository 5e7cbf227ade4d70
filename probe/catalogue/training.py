"""The metrics of gradients, updates and learning rate."""

from __future__ import annotations

from probe.catalogue.metric import POSITIVE, SHARE, Metric

_UNIT = "loss per unit of the weights"
_NORM = "torch.nn.utils.clip_grad_norm_ (the norm that it returns)"


def gradient_metrics() -> tuple[Metric, ...]:
    """Return the gradient norm, before and after clipping, and the learning rate."""
    return (
        Metric("probe/grad/norm", _UNIT, POSITIVE, "L2 norm of the gradient over all parameters that train, before clipping.", _NORM, True),
        Metric(
            "probe/grad/clipped_norm",
            _UNIT,
            POSITIVE,
            "The same as the optimizer gets it: after clipping, without the factor of fp16 training. Not measured without a Trainer.",
            "torch.nn.utils.clip_grad_norm_",
        ),
        Metric(
            "probe/reference/gradient_norm",
            "loss per unit of the activation",
            POSITIVE,
            "L2 norm of the gradient of the loss that reached the embeddings of reference audio where they enter the decoder. Of models "
            "that predict audio and have it in one sequence with text.",
            "√ Σ (∂loss/∂x)²",
        ),
        Metric(
            "probe/learning_rate",
            "1",
            POSITIVE,
            "Learning rate of the first parameter group, as the step used it.",
            "optimizer.param_groups[0]['lr']",
        ),
    )


def part_metrics() -> tuple[Metric, ...]:
    """Return what is measured of each part of the model: gradient and update."""
    area = "probe/grad/<part>"
    sample = "Estimated from a fixed sample of elements."
    return (
        Metric(
            f"{area}/norm",
            _UNIT,
            POSITIVE,
            "L2 norm of the gradient over the parameters of one part of the model (`adapters`, `projector`, `audio_encoder`, "
            "`text_branch`, `audio_branch`, `lm_head`, `embedding`, `rest`), before clipping.",
            _NORM,
            True,
        ),
        Metric(f"{area}/clipped_norm", _UNIT, POSITIVE, "The same as the optimizer gets it, after clipping.", _NORM),
        Metric(
            f"{area}/update_ratio",
            "1",
            POSITIVE,
            f"L2 norm of what the optimizer's step added to the weights, by the L2 norm of the weights before it. {sample}",
            "‖Δw‖ / ‖w‖",
        ),
        Metric(
            f"{area}/zero_share",
            "share",
            SHARE,
            f"Share of gradients that are exactly 0, among tensors that have one, before clipping. {sample}",
            "torch.count_nonzero",
        ),
        Metric(
            f"{area}/unchanged_share",
            "share",
            SHARE,
            "Share of weights that the optimizer's step left exactly as they were, among those whose gradient is not 0. Near 1 in a "
            f"narrow dtype: updates are lost to rounding. {sample}",
            "w after == w before",
        ),
    )
