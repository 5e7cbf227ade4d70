"""The metrics of loss, gradients and learning rate."""

from __future__ import annotations

from probe.catalogue.metric import POSITIVE, Metric


def gradient_metrics() -> tuple[Metric, ...]:
    """Return the gradient norm and the learning rate."""
    norm = "torch.nn.utils.clip_grad_norm_ (the norm that it returns)"
    return (
        Metric(
            "probe/grad/norm",
            "loss per unit of the weights",
            POSITIVE,
            "L2 norm of the gradient over all parameters that train, before clipping.",
            norm,
            True,
        ),
        Metric(
            "probe/learning_rate",
            "1",
            POSITIVE,
            "Learning rate of the first parameter group, as the step used it.",
            "optimizer.param_groups[0]['lr']",
        ),
    )
