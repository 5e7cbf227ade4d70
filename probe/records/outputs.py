"""What came out of the sites and the LM heads in one step."""

from __future__ import annotations

from dataclasses import dataclass

from probe.records.sites import Modality, Role


@dataclass(frozen=True, slots=True)
class SiteStatistics:
    """What came out of one site in one step, over all its calls, micro-batches and ranks.

    ``shape`` and ``dtype`` are those of the last call on this rank. ``nonfinite`` counts NaN and Inf values; with any of them the
    other statistics are ``None``. ``time_std`` is the square root of the variance over the frames of a clip, averaged over clips and
    width (0: collapsed in time); ``batch_std`` the same over the clips of a batch.
    """

    site: str
    role: Role
    calls: int
    shape: tuple[int, ...] = ()
    dtype: str = ""
    elements: int = 0
    mean: float | None = None
    rms: float | None = None
    std: float | None = None
    minimum: float | None = None
    maximum: float | None = None
    nonfinite: int = 0
    time_std: float | None = None
    batch_std: float | None = None


@dataclass(frozen=True, slots=True)
class Accuracy:
    """How well one head (or one codebook of it) predicted its labels, teacher-forced, over all labelled positions of the step.

    ``loss`` is the cross-entropy in nats per labelled token (no smoothing, no scaling); ``token_accuracy`` and ``top5_accuracy`` are
    shares; ``entropy`` is the mean entropy of the predicted distribution in nats. ``calibration_error`` is the expected calibration
    error over 15 equal bins of confidence. ``top_token_share`` is the share of the labelled positions at which each rank's most
    frequent prediction was made; ``top_token`` is this rank's.
    """

    labelled: int
    loss: float | None = None
    token_accuracy: float | None = None
    top5_accuracy: float | None = None
    entropy: float | None = None
    calibration_error: float | None = None
    top_token_share: float | None = None
    top_token: int | None = None


@dataclass(frozen=True, slots=True)
class HeadSample:
    """What a head predicted for one sample of this rank's first micro-batch, teacher-forced, at its labelled positions in order.

    ``predicted`` and ``target`` lie over each other, and so do ``predicted_pieces`` and ``target_pieces``, the text of each of the first
    tokens as it stands in its context (for a text head with a tokenizer, and for the first samples only). The texts keep special
    tokens; ``word_error_rate`` is without them, of the words between spaces as they are.
    """

    index: int
    predicted: tuple[int, ...] = ()
    target: tuple[int, ...] = ()
    predicted_pieces: tuple[str, ...] = ()
    target_pieces: tuple[str, ...] = ()
    predicted_text: str | None = None
    target_text: str | None = None
    word_error_rate: float | None = None


@dataclass(frozen=True, slots=True)
class Head:
    """One LM head in one step: its logits, its accuracy, and predicted against target tokens of a few samples.

    ``shape``, ``dtype`` and ``device`` are of the last call on this rank; ``mean``, ``minimum``, ``maximum`` are over all logits.
    ``alignment`` says how labels and logits were laid over each other ("shifted by one", …). ``evaluated`` says what the accuracy rests
    on where the model did without the head ("256 of 1,000 labelled positions: …"), else it is "". ``top_token_text`` is the text of
    ``accuracy.top_token``, for a text head with a tokenizer. ``shown`` holds samples of the first codebook where there are several.
    """

    site: str
    modality: Modality
    calls: int
    shape: tuple[int, ...] = ()
    dtype: str = ""
    device: str = ""
    mean: float | None = None
    minimum: float | None = None
    maximum: float | None = None
    nonfinite: int = 0
    accuracy: Accuracy | None = None
    codebooks: tuple[Accuracy, ...] = ()
    alignment: str = ""
    evaluated: str = ""
    top_token_text: str | None = None
    shown: tuple[HeadSample, ...] = ()
