"""The frozen data that travels from the hooks to whoever reads it: sites, reasons, and the record of one step.

Everything here is plain host data: Python numbers, strings and tuples, no tensor. A number that could not be measured is ``None`` (or
its key is absent from ``metrics``) and ``StepRecord.not_measured`` says why; NaN never stands for "unknown".

Shapes: B batch, T audio frames, S tokens, H heads, D width, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

Role = Literal["model", "audio_encoder", "projector", "attention", "lm_head", "feed_forward", "custom"]
AttentionKind = Literal["encoder", "decoder", "cross", "joint"]
Modality = Literal["text", "audio"]


@dataclass(frozen=True, slots=True)
class Site:
    """A module of the model with a role.

    Attributes:
        name: Dotted module name below the trained model, without the prefixes that wrappers add ("" is the root).
        role: What the module is to the probe.
        found_by: The rule that found it, in words a person understands.
        kind: For an attention layer: "encoder" (audio over audio), "decoder" (tokens over tokens, text only or with a separate
            encoder), "cross" (tokens over audio), "joint" (text and audio in one sequence).
        modality: For an LM head or a feed-forward branch: which tokens it serves.
        codebooks: For an audio LM head: how many codebooks its last dimension holds side by side; 0 for a text head.
    """

    name: str
    role: Role
    found_by: str
    kind: AttentionKind | None = None
    modality: Modality | None = None
    codebooks: int = 0


@dataclass(frozen=True, slots=True)
class InputTensor:
    """One input of the model by name, as the first micro-batch of the step held it on this rank.

    ``minimum``, ``maximum`` and ``mean`` are over all elements; ``first_values`` is filled for integer tensors only. ``note`` says
    what is odd about the content ("empty", "constant", "3 non-finite values"), or is "".
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    device: str
    minimum: float | None = None
    maximum: float | None = None
    mean: float | None = None
    first_values: tuple[int, ...] = ()
    note: str = ""


@dataclass(frozen=True, slots=True)
class AudioSegment:
    """A run of audio in one sample.

    ``start`` and ``length`` count in ``unit``: "tokens" are placeholder positions in ``input_ids``, "frames" are frames of the audio
    features. ``seconds`` is filled where a feature extractor tells the frame rate. ``note`` says what is odd ("empty", "constant"),
    or is "".
    """

    sample: int
    start: int
    length: int
    unit: Literal["tokens", "frames"]
    seconds: float | None = None
    note: str = ""


@dataclass(frozen=True, slots=True)
class InputSample:
    """The token ids of one sample of the first micro-batch, and their text.

    ``text`` and ``label_text`` keep special tokens visible and name an id that the tokenizer does not know by its position. They are
    ``None`` without a tokenizer, or with ``keep_text=False`` (then the ids are left out too).
    """

    index: int
    ids: tuple[int, ...] = ()
    text: str | None = None
    label_ids: tuple[int, ...] = ()
    label_text: str | None = None


@dataclass(frozen=True, slots=True)
class Inputs:
    """What went into the model in one step.

    ``padding_share``: share of token positions that the attention mask hides. ``labels_masked_share``: share of label positions that
    are -100. ``ids_outside_vocabulary``: token ids below 0 or not below the rows of the input embedding. All three are over all
    micro-batches and ranks; the tables are of this rank's first micro-batch.
    """

    micro_batches: int
    samples: int
    tensors: tuple[InputTensor, ...] = ()
    shown: tuple[InputSample, ...] = ()
    audio: tuple[AudioSegment, ...] = ()
    padding_share: float | None = None
    labels_masked_share: float | None = None
    ids_outside_vocabulary: int | None = None
    audio_clips: int | None = None
    audio_clips_constant: int | None = None


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


@dataclass(frozen=True, slots=True)
class HeadwiseAttention:
    """Per attention head of one layer, on this rank: one value a head, in order; empty where it was not measured. As in ``Attention``."""

    entropy: tuple[float, ...] = ()
    entropy_nats: tuple[float, ...] = ()
    top: tuple[float, ...] = ()
    effective_keys: tuple[float, ...] = ()
    first_token: tuple[float, ...] = ()
    padding: tuple[float, ...] = ()
    sink: tuple[float, ...] = ()
    band: tuple[float, ...] = ()
    distance: tuple[float, ...] = ()
    monotonicity: tuple[float, ...] = ()
    coverage: tuple[float, ...] = ()
    text_to_text: tuple[float, ...] = ()
    text_to_audio: tuple[float, ...] = ()
    text_to_reference: tuple[float, ...] = ()
    audio_to_text: tuple[float, ...] = ()
    audio_to_audio: tuple[float, ...] = ()
    audio_to_reference: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True)
class Attention:
    """One attention layer in one step, from its probabilities before dropout, for sampled query rows.

    ``how`` says where the probabilities came from ("materialised softmax", "recomputed from q and k"). ``rows`` is the number of
    (query, sample) pairs looked at; means are weighted by what each row stands for. ``entropy`` is relative to the logarithm of the
    number of visible keys (0 … 1). ``top`` is the largest probability of a row, ``effective_keys`` its 1 / Σp². ``first_token``,
    ``padding``, ``sink`` (a learned sink that is no key), ``band`` (the diagonal band) and the ``…_to_…`` values are probability masses;
    audio includes the reference. ``distance`` is the mean number of keys between query and key in self-attention. ``monotonicity``
    (-1 … 1) and ``coverage`` (0 … 1) are of text rows over audio keys. Definitions: :mod:`probe.catalogue`.
    """

    site: str
    kind: AttentionKind
    how: str
    calls: int
    heads: int = 0
    keys: int = 0
    rows: int = 0
    entropy: float | None = None
    entropy_nats: float | None = None
    top: float | None = None
    effective_keys: float | None = None
    first_token: float | None = None
    padding: float | None = None
    sink: float | None = None
    band: float | None = None
    distance: float | None = None
    monotonicity: float | None = None
    coverage: float | None = None
    text_to_text: float | None = None
    text_to_audio: float | None = None
    text_to_reference: float | None = None
    audio_to_text: float | None = None
    audio_to_audio: float | None = None
    audio_to_reference: float | None = None
    per_head: HeadwiseAttention | None = None


@dataclass(frozen=True, slots=True)
class LossAudit:
    """The loss that was backpropagated against the one put together from the captured predictions and labels.

    ``backpropagated`` and ``expected`` are over all micro-batches, averaged over ranks; ``ratio`` is the first by the second. ``logged``
    is what the Trainer's log said of this very step (only with ``logging_steps=1``). ``reduction`` says in words how ``expected`` was
    put together; ``standard_error`` is that of ``expected`` where only some rows of a head were evaluated (0: all were). ``causes``
    explains, most telling first, what is off; empty when nothing is.
    """

    backpropagated: float | None = None
    expected: float | None = None
    ratio: float | None = None
    logged: float | None = None
    reduction: str = ""
    standard_error: float = 0.0
    causes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Branches:
    """One decoder layer with separate feed-forward branches for text and audio: how many tokens each received."""

    layer: str
    text_tokens: int
    audio_tokens: int


@dataclass(frozen=True, slots=True)
class Part:
    """One part of the model (encoder, projector, heads, the rest): what trains in it and what gradient reached it.

    ``parameters`` counts elements; ``trainable_share`` is the share of them with ``requires_grad``. ``without_gradient`` counts
    parameter tensors that should train and received none. ``gradient_norm`` is the L2 norm before clipping.
    """

    name: str
    parameters: int
    trainable_share: float
    without_gradient: int | None = None
    gradient_norm: float | None = None


@dataclass(frozen=True, slots=True)
class Conditioning:
    """What audio the model was conditioned on in one step, over all micro-batches and ranks.

    ``encoder`` is the encoder's site name ("" if there is none). ``output_gradient_norm`` is the norm of the gradient that reached
    the encoder's output. ``audio_codes`` counts positions of discrete audio codes among the inputs. ``tokens`` counts, by the
    config's own name for it (``audio_token_id``, …), how often each special audio token stands in ``input_ids``.
    """

    encoder: str = ""
    encoder_calls: int = 0
    micro_batches_without_encoder: int = 0
    output_gradient_norm: float | None = None
    audio_codes: int | None = None
    tokens: tuple[tuple[str, int], ...] = ()


@dataclass(frozen=True, slots=True)
class Optimisation:
    """The loss, the learning rate and the gradient norm of one step.

    ``loss`` is what ``training_step`` returned, summed over the micro-batches and averaged over ranks. It is the number that was
    backpropagated, except in transformers 4.46, which with accumulation k returns a k-th of it. ``gradient_norm`` is before
    clipping, over all parameters that train.
    """

    loss: float | None = None
    learning_rates: tuple[float, ...] = ()
    gradient_norm: float | None = None


@dataclass(frozen=True, slots=True)
class Finding:
    """A diagnosis: something that is, or may be, wrong with the run."""

    code: str
    severity: Literal["critical", "warning", "info"]
    site: str
    since_step: int
    message: str
    evidence: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class StepRecord:
    """The finished, host-side, immutable result of one sampled step.

    ``metrics`` holds every number by its public name (``probe/text/loss``); ``not_measured`` says for everything that is missing
    why it is. Tables (``inputs``, ``heads``, …) hold what does not fit a name.
    """

    step: int
    time: float
    ranks: int
    metrics: dict[str, float]
    not_measured: dict[str, str]
    inputs: Inputs | None = None
    statistics: tuple[SiteStatistics, ...] = ()
    heads: tuple[Head, ...] = ()
    attention: tuple[Attention, ...] = ()
    branches: tuple[Branches, ...] = ()
    parts: tuple[Part, ...] = ()
    conditioning: Conditioning | None = None
    optimisation: Optimisation | None = None
    loss_audit: LossAudit | None = None
    findings: tuple[Finding, ...] = ()
