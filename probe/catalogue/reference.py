"""The metrics of the counterfactual passes: what becomes of the predictions when the audio is changed."""

from __future__ import annotations

from probe.catalogue.metric import POSITIVE, SHARE, Metric

_OVER = (
    "over the labelled tokens of those samples of the step's last micro-batch, of every rank, that the change reaches; run again without "
    "gradients and in eval mode"
)
_CHANGES = {
    "swap": "another sample's audio in the place of its own",
    "silence": "silence in the place of the audio",
    "reverse": "the audio reversed in time",
}
_SOURCE = "cross-entropy under the change − cross-entropy as it is, of the same tokens"


def reference_metrics() -> tuple[Metric, ...]:
    """Return the metrics that enter the log: those of audio tokens where the model predicts audio, else those of text."""
    area, of = "probe/reference", "of audio tokens where the model predicts audio, else of text tokens"
    return (
        _delta(f"{area}/delta_loss_swap", "swap", of, headline=True),
        _delta(f"{area}/delta_loss_silence", "silence", of, headline=True),
        _wins(f"{area}/win_rate", of, headline=True),
    )


def reference_detail_metrics() -> tuple[Metric, ...]:
    """Return the metrics of each modality, and the cost."""
    detail: list[Metric] = []
    for modality in ("text", "audio"):
        area, of = f"probe/reference/{modality}", f"of {modality} tokens"
        detail += [_delta(f"{area}/delta_loss_{what}", what, of) for what in _CHANGES]
        detail.append(_wins(f"{area}/win_rate", of))
        detail += [_divergence(f"{area}/divergence_{what}", what, of) for what in ("swap", "silence")]
    cost = Metric(
        "probe/reference/cost_ms",
        "ms",
        POSITIVE,
        "Time that the counterfactual passes of the step took on this rank: by the clock on a CPU, between two events on CUDA.",
        "time.perf_counter, torch.cuda.Event.elapsed_time",
    )
    return (*detail, cost)


def _delta(name: str, what: str, of: str, *, headline: bool = False) -> Metric:
    definition = f"How much more the loss {of} is with {_CHANGES[what]}, {_OVER}."
    return Metric(name, "nats per token", "any", definition, _SOURCE, headline)


def _wins(name: str, of: str, *, headline: bool = False) -> Metric:
    definition = f"Share of samples whose loss {of} is lower with their own audio than with another sample's; a tie counts half."
    return Metric(name, "share", SHARE, definition, "win rate of paired comparisons", headline)


def _divergence(name: str, what: str, of: str) -> Metric:
    definition = (
        f"KL(as it is ‖ changed) between the predicted distributions {of}, with {_CHANGES[what]}; over up to 64 labelled positions of each "
        "rank's last micro-batch, picked by a hash."
    )
    return Metric(name, "nats per token", POSITIVE, definition, "torch.nn.functional.kl_div")
