"""The metrics of what is attended to."""

from __future__ import annotations

from probe.catalogue.metric import SHARE, Metric


def attention_metrics() -> tuple[Metric, ...]:
    """Return the metrics over all layers, then those of each kind."""
    rows = "mean over layers, heads and query rows (sampled, weighted to stand for all non-padding rows), before dropout"
    mass = "Mean probability mass that {queries} queries put on {keys} keys, over rows that can see at least one such key."
    entropy = f"Entropy of the attention probabilities ÷ the logarithm of the number of visible keys; {rows}. 0: one key; 1: uniform."
    nats = f"Entropy of the attention probabilities; {rows}."
    first = f"Probability mass on the first key of the sequence (the usual attention sink); {rows}."
    padding = f"Probability mass on keys that the mask of the batch marks as padding; {rows}. 0 where the model masks them."
    shannon = "Shannon (1948): H = -Σ p ln p"
    sink = "Xiao et al. (2023), arXiv:2309.17453"
    definition = "sum of softmax(QKᵀ·scale + mask) over the named keys"
    directed = tuple(
        Metric(f"probe/attention/{queries}_to_{keys}", "share", SHARE, mass.format(queries=queries, keys=keys), definition, queries != keys)
        for queries, keys in (("text", "audio"), ("audio", "text"), ("text", "text"), ("audio", "audio"))
    )
    kind = (
        "`<kind>` is encoder (audio over audio), decoder (tokens over tokens), cross (tokens over audio) or joint (text and audio "
        "in one sequence)."
    )
    return (
        Metric("probe/attention/entropy", "share", SHARE, entropy, shannon, True),
        *directed,
        Metric("probe/attention/first_token", "share", SHARE, first, sink, True),
        Metric("probe/attention/padding", "share", SHARE, padding, definition, True),
        Metric("probe/attention/entropy_nats", "nats", "0 … ln K", f"{nats} K: visible keys.", shannon),
        Metric(
            "probe/attention/<kind>/entropy",
            "share",
            SHARE,
            f"As `probe/attention/entropy`, over the layers of one kind. {kind}",
            shannon,
            True,
        ),
        Metric(
            "probe/attention/<kind>/entropy_nats",
            "nats",
            "0 … ln K",
            "As `probe/attention/entropy_nats`, over the layers of one kind.",
            shannon,
        ),
        Metric(
            "probe/attention/<kind>/first_token", "share", SHARE, "As `probe/attention/first_token`, over the layers of one kind.", sink
        ),
        Metric("probe/attention/<kind>/padding", "share", SHARE, "As `probe/attention/padding`, over the layers of one kind.", definition),
        *(
            Metric(
                f"probe/attention/<kind>/{what}",
                "share",
                SHARE,
                f"As `probe/attention/{what}`, over the layers of one kind (`cross`: keys are frames; those of padding are no audio).",
                definition,
            )
            for what in ("text_to_text", "text_to_audio", "audio_to_text", "audio_to_audio")
        ),
    )
