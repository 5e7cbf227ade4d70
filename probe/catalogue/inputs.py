"""The metrics of what goes in, and of which feed-forward branch it takes."""

from __future__ import annotations

from probe.catalogue.metric import SHARE, Metric


def input_metrics() -> tuple[Metric, ...]:
    """Return the metrics of the batch."""
    area = "probe/input"
    return (
        Metric(
            f"{area}/padding_share", "share", SHARE, "Share of token positions that the attention mask hides.", "attention_mask == 0", True
        ),
        Metric(
            f"{area}/labels_masked_share",
            "share",
            SHARE,
            "Share of label positions that are -100, so that no loss is taken there.",
            "ignore_index of torch.nn.functional.cross_entropy",
        ),
        Metric(
            f"{area}/ids_outside_vocabulary",
            "tokens",
            "whole number ≥ 0",
            "Token ids below 0 or not below the number of rows of the input embedding.",
            "rows of get_input_embeddings()",
        ),
        Metric(
            f"{area}/audio_clips_constant",
            "clips",
            "whole number ≥ 0",
            "Clips whose features are one value everywhere.",
            "maximum == minimum",
        ),
        Metric(
            f"{area}/audio_clips",
            "clips",
            "whole number ≥ 0",
            "Audio clips among the inputs of the step.",
            "first dimension of the audio features",
        ),
        Metric(
            f"{area}/samples",
            "samples",
            "whole number ≥ 0",
            "Samples of the step, over all micro-batches and ranks.",
            "first dimension of the inputs",
        ),
    )


def branch_metrics() -> tuple[Metric, ...]:
    """Return the shares of separate feed-forward branches."""
    return tuple(
        Metric(
            f"probe/feed_forward/{modality}_token_share",
            "share",
            SHARE,
            f"Share of the tokens that the {modality} branch received, in layers with separate feed-forward branches for text and audio.",
            "tokens of the branch ÷ tokens of both branches",
        )
        for modality in ("text", "audio")
    )
