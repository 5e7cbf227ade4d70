"""The metrics of what comes out: loss, accuracy and certainty of the LM heads, whole and by codebook."""

from __future__ import annotations

from probe.catalogue.metric import POSITIVE, SHARE, Metric


def head_metrics(modality: str, tokens: str) -> tuple[Metric, ...]:
    """Return the metrics of one modality; ``tokens`` names what its heads predict."""
    area = f"probe/{modality}"
    return (
        Metric(
            f"{area}/loss",
            "nats per token",
            POSITIVE,
            f"Cross-entropy of the predictions against the labels over all labelled {tokens} of the step (all micro-batches and ranks); "
            "teacher-forced, no label smoothing, no scaling.",
            "torch.nn.functional.cross_entropy, reduction='sum' ÷ labelled tokens",
            True,
        ),
        Metric(
            f"{area}/token_accuracy",
            "share",
            SHARE,
            f"Share of labelled {tokens} whose argmax is the label; teacher-forced.",
            "argmax of the logits against the aligned labels",
            True,
        ),
        Metric(
            f"{area}/top5_accuracy",
            "share",
            SHARE,
            f"Share of labelled {tokens} whose label is among the five largest logits; teacher-forced.",
            "top-5 accuracy",
        ),
        Metric(
            f"{area}/entropy",
            "nats per token",
            "0 … ln V",
            f"Mean entropy of the predicted distribution over labelled {tokens}. 0: certain; ln V: uniform over the V entries "
            "of the vocabulary.",
            "Shannon (1948): H = -Σ p ln p",
        ),
    )


def codebook_metrics() -> tuple[Metric, ...]:
    """Return the metrics of each audio codebook."""
    return (
        Metric(
            "probe/audio/codebook_K/loss",
            "nats per token",
            POSITIVE,
            "As `probe/audio/loss`, for one codebook; codebooks are counted from 0.",
            "torch.nn.functional.cross_entropy",
        ),
        Metric(
            "probe/audio/codebook_K/token_accuracy",
            "share",
            SHARE,
            "As `probe/audio/token_accuracy`, for one codebook.",
            "argmax of the logits against the aligned labels",
        ),
    )
