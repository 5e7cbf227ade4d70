"""The metrics of what is attended to."""

from __future__ import annotations

from probe.catalogue.metric import SHARE, Metric

_ROWS = "mean over layers, heads and query rows (sampled, weighted to stand for all non-padding rows), before dropout"
_SHANNON = "Shannon (1948): H = -Σ p ln p"
_SINK = "Xiao et al. (2023), arXiv:2309.17453"
_MASS = "sum of softmax(QKᵀ·scale + mask) over the named keys"
_PAIRS = (("text", "audio"), ("audio", "text"), ("text", "reference"), ("text", "text"), ("audio", "audio"), ("audio", "reference"))
_KIND = (
    "`<kind>` is encoder (audio over audio), decoder (tokens over tokens), cross (tokens over audio) or joint (text and audio in one "
    "sequence)."
)


def attention_metrics() -> tuple[Metric, ...]:
    """Return the metrics over all layers, then those of each kind."""
    entropy = (
        "Entropy of the attention probabilities ÷ the logarithm of the number of visible keys (a learned sink counts as one); "
        f"{_ROWS}. 0: one key; 1: uniform."
    )
    nats = f"Entropy of the attention probabilities; {_ROWS}. K: visible keys."
    first = f"Probability mass on the first key of the sequence (the usual attention sink); {_ROWS}."
    padding = f"Probability mass on keys that the mask of the batch marks as padding; {_ROWS}. 0 where the model masks them."
    masses = tuple(_directed(queries, keys) for queries, keys in _PAIRS)
    return (
        Metric("probe/attention/entropy", "share", SHARE, entropy, _SHANNON, True),
        *masses[:3],
        Metric("probe/attention/first_token", "share", SHARE, first, _SINK),
        Metric("probe/attention/padding", "share", SHARE, padding, _MASS),
        *masses[3:],
        Metric("probe/attention/entropy_nats", "nats", "0 … ln K", nats, _SHANNON),
        *_shape_metrics(),
        *_walk_metrics(),
        *_kind_metrics(masses),
    )


def _directed(queries: str, keys: str) -> Metric:
    """Return the metric of the mass that rows of one modality put on keys of another."""
    which, more = keys, " Audio includes the reference." if "audio" in (queries, keys) else ""
    if keys == "reference":
        which = "reference (audio that the model is given and does not predict)"
        more = " Audio queries are those of predicted audio." if queries == "audio" else ""
    about = f"Mean probability mass that {queries} queries put on {which} keys, over rows that can see at least one such key.{more}"
    name = f"probe/attention/{queries}_to_{keys}"
    return Metric(name, "share", SHARE, about, _MASS, (queries, keys) in _PAIRS[:3])


def _shape_metrics() -> tuple[Metric, ...]:
    """Return what a row's distribution is like, whatever the keys are."""
    return (
        Metric(
            "probe/attention/effective_keys",
            "keys",
            "1 … K",
            f"1 / Σp² of a row: as many keys, evenly attended to, would be as concentrated (a learned sink counts as one); {_ROWS}.",
            "Inverse participation ratio; Hill number of order 2: Hill (1973), Ecology 54",
        ),
        Metric("probe/attention/top", "share", SHARE, f"The largest probability of a row; {_ROWS}.", "max p"),
        Metric(
            "probe/attention/sink",
            "share",
            SHARE,
            f"Probability mass on a learned sink, a logit of each head that is no key; {_ROWS}. Only of layers that have one.",
            "gpt-oss (OpenAI 2025), `sinks` of its attention modules; Xiao et al. (2023), arXiv:2309.17453",
        ),
        Metric(
            "probe/attention/distance",
            "keys",
            "0 … K",
            f"Σ p·|key - query| of a row of self-attention: how far it looks, in keys; {_ROWS}.",
            "expectation of |key - query|",
        ),
    )


def _walk_metrics() -> tuple[Metric, ...]:
    """Return how text rows walk over audio keys."""
    over = "mean over cross-attention and joint layers, heads and samples"
    return (
        Metric(
            "probe/attention/monotonicity",
            "rank correlation",
            "-1 … 1",
            "Kendall's tau-a between the place of a text row and its centre of attention over the audio keys, over pairs of sampled rows "
            f"of a sample; {over}. 1: later text looks at later audio, as in speech that is read aloud; 0: no order.",
            "Kendall (1938), Biometrika 30",
        ),
        Metric(
            "probe/attention/coverage",
            "share",
            "0 … 1",
            "exp of the entropy of the mean distribution over audio keys of a sample's sampled text rows ÷ the number of audio keys that "
            f"they can see; {over}. 1: all of the audio is attended to alike; near 0: only a few frames of it.",
            "Hill number of order 1: Hill (1973), Ecology 54",
        ),
    )


def _kind_metrics(masses: tuple[Metric, ...]) -> tuple[Metric, ...]:
    """Return the metrics over the layers of one kind."""
    area = "probe/attention/<kind>"

    def of_kind(what: str, unit: str, span: str, source: str, more: str = "") -> Metric:
        return Metric(f"{area}/{what}", unit, span, f"As `probe/attention/{what}`, over the layers of one kind.{more}", source)

    band = (
        "Probability mass on the diagonal band. In self-attention the keys at most 4 from the query's own place; in cross-attention those "
        f"whose place among the frames that sound is at most 0.1 from the row's among the tokens (as shares of both lengths); {_ROWS}."
    )
    return (
        Metric(f"{area}/entropy", "share", SHARE, f"As `probe/attention/entropy`, over the layers of one kind. {_KIND}", _SHANNON, True),
        of_kind("entropy_nats", "nats", "0 … ln K", _SHANNON),
        of_kind("first_token", "share", SHARE, _SINK),
        of_kind("padding", "share", SHARE, _MASS),
        Metric(f"{area}/band", "share", SHARE, band, _MASS),
        *(of_kind(metric.name.rsplit("/", 1)[1], metric.unit, metric.range, metric.source) for metric in _shape_metrics()),
        *(of_kind(metric.name.rsplit("/", 1)[1], metric.unit, metric.range, metric.source) for metric in _walk_metrics()),
        *(
            of_kind(metric.name.rsplit("/", 1)[1], "share", SHARE, _MASS, " In `cross`, keys are frames; those of padding are no audio.")
            for metric in masses
        ),
    )
