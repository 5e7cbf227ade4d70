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
        Metric(
            f"{area}/calibration_error",
            "share",
            SHARE,
            f"Expected calibration error of the predictions at labelled {tokens}: in 15 equal bins of the largest probability, the "
            "distance between its mean and the share of hits, weighted by what is in the bin. 0: as certain as it is right.",
            "Guo et al. (2017), arXiv:1706.04599, equation 3: Σ_b |correct_b - confidence_b| ÷ labelled",
        ),
        Metric(
            f"{area}/top_token_share",
            "share",
            SHARE,
            f"Share of labelled {tokens} at which the most frequent prediction was made. Near 1: the head predicts one token whatever "
            "it is given (collapse). Over several ranks, each rank's own most frequent prediction; over several codebooks, each "
            "codebook's.",
            "largest count of argmax ÷ labelled tokens",
        ),
        *(_word_metrics() if modality == "text" else ()),
    )


def _word_metrics() -> tuple[Metric, ...]:
    return (
        Metric(
            "probe/text/word_error_rate",
            "share",
            POSITIVE,
            "Substituted, inserted and deleted words ÷ words of the target; mean over the first samples (up to 8, at most 512 labelled "
            "tokens of each) of this rank's first micro-batch. Teacher-forced: every token was predicted from the right ones before it, so "
            "it is better than what generating gives. Without special tokens; case and punctuation count. Needs jiwer.",
            "jiwer.wer",
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
        Metric(
            "probe/audio/codebook_K/calibration_error",
            "share",
            SHARE,
            "As `probe/audio/calibration_error`, for one codebook.",
            "Guo et al. (2017), arXiv:1706.04599, equation 3",
        ),
        Metric(
            "probe/audio/codebook_K/top_token_share",
            "share",
            SHARE,
            "Share of the codebook's labelled tokens at which its most frequent prediction was made; over several ranks, each rank's own.",
            "largest count of argmax ÷ labelled tokens",
        ),
    )
