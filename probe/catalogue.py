"""The catalogue of public metrics, as data: name, unit, range, definition, source, and which enter the Trainer's own log.

The order of the catalogue is the order of importance: when more headline metrics are present than a log takes, the first ones win.
A name may hold one placeholder: ``<kind>`` (of attention), ``<part>`` (of the model), ``K`` in ``codebook_K`` (from 0).
"""

from __future__ import annotations

import re
from dataclasses import dataclass

HEADLINE_LIMIT = 24
KINDS = ("cross", "joint", "decoder", "encoder")

_PLACEHOLDERS = {"<kind>": "|".join(KINDS), "<part>": "[^/]+", "codebook_K": r"codebook_\d+"}
_SHARE = "0 … 1"
_POSITIVE = "≥ 0"


@dataclass(frozen=True, slots=True)
class Metric:
    """One public metric.

    Attributes:
        name: The public name, perhaps with one placeholder.
        unit: What one unit of the value is ("nats per token", "share").
        range: The values that can occur, in words or as an interval.
        definition: What the number is, over what it is taken.
        source: The code, formula or paper that defines it elsewhere.
        headline: Whether it enters the Trainer's own log (at most ``HEADLINE_LIMIT`` do).
    """

    name: str
    unit: str
    range: str
    definition: str
    source: str
    headline: bool = False

    @property
    def pattern(self) -> re.Pattern[str]:
        """A regular expression that matches the concrete names of this metric, whole."""
        expression = re.escape(self.name)
        for placeholder, choices in _PLACEHOLDERS.items():
            expression = expression.replace(re.escape(placeholder), f"(?:{choices})")
        return re.compile(expression)

    @property
    def is_pattern(self) -> bool:
        """Whether the name stands for several concrete names."""
        return any(placeholder in self.name for placeholder in _PLACEHOLDERS)


def _head(modality: str, tokens: str) -> tuple[Metric, ...]:
    area = f"probe/{modality}"
    return (
        Metric(
            f"{area}/loss",
            "nats per token",
            _POSITIVE,
            f"Cross-entropy of the predictions against the labels over all labelled {tokens} of the step (all micro-batches and ranks); "
            "teacher-forced, no label smoothing, no scaling.",
            "torch.nn.functional.cross_entropy, reduction='sum' ÷ labelled tokens",
            True,
        ),
        Metric(
            f"{area}/token_accuracy",
            "share",
            _SHARE,
            f"Share of labelled {tokens} whose argmax is the label; teacher-forced.",
            "argmax of the logits against the aligned labels",
            True,
        ),
        Metric(
            f"{area}/top5_accuracy",
            "share",
            _SHARE,
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


def _attention() -> tuple[Metric, ...]:
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
        Metric(
            f"probe/attention/{queries}_to_{keys}", "share", _SHARE, mass.format(queries=queries, keys=keys), definition, queries != keys
        )
        for queries, keys in (("text", "audio"), ("audio", "text"), ("text", "text"), ("audio", "audio"))
    )
    kind = (
        "`<kind>` is encoder (audio over audio), decoder (tokens over tokens), cross (tokens over audio) or joint (text and audio "
        "in one sequence)."
    )
    return (
        Metric("probe/attention/entropy", "share", _SHARE, entropy, shannon, True),
        *directed,
        Metric("probe/attention/first_token", "share", _SHARE, first, sink, True),
        Metric("probe/attention/padding", "share", _SHARE, padding, definition, True),
        Metric("probe/attention/entropy_nats", "nats", "0 … ln K", f"{nats} K: visible keys.", shannon),
        Metric(
            "probe/attention/<kind>/entropy",
            "share",
            _SHARE,
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
            "probe/attention/<kind>/first_token", "share", _SHARE, "As `probe/attention/first_token`, over the layers of one kind.", sink
        ),
        Metric("probe/attention/<kind>/padding", "share", _SHARE, "As `probe/attention/padding`, over the layers of one kind.", definition),
        *(
            Metric(
                f"probe/attention/<kind>/{what}",
                "share",
                _SHARE,
                f"As `probe/attention/{what}`, over the layers of one kind (`cross`: keys are frames; those of padding are no audio).",
                definition,
            )
            for what in ("text_to_text", "text_to_audio", "audio_to_text", "audio_to_audio")
        ),
    )


def _encoder() -> tuple[Metric, ...]:
    area, unit = "probe/audio_encoder", "units of the activation"
    return (
        Metric(f"{area}/rms", unit, _POSITIVE, "Root mean square of the audio encoder's output.", "√ mean(x²)", True),
        Metric(
            f"{area}/time_std",
            unit,
            _POSITIVE,
            "Square root of the variance of the encoder's output over the frames of a clip, the variance averaged over clips and width. "
            "0: collapsed in time.",
            "√ mean(var over time)",
            True,
        ),
        Metric(
            f"{area}/batch_std",
            unit,
            _POSITIVE,
            "Square root of the variance of the encoder's output over the clips of a batch, the variance averaged over frames and width. "
            "0: every clip looks the same. Not measured with one clip.",
            "√ mean(var over clips)",
            True,
        ),
        Metric(
            f"{area}/gradient_norm",
            "loss per unit of the activation",
            _POSITIVE,
            "L2 norm of the gradient of the loss that reached the encoder's output. 0: nothing flowed back into the encoder.",
            "√ Σ (∂loss/∂x)²",
            True,
        ),
        Metric(f"{area}/nonfinite", "values", "whole number ≥ 0", "NaN and Inf values in the encoder's output.", "torch.isfinite", True),
        Metric(
            f"{area}/calls",
            "calls",
            "whole number ≥ 0",
            "Calls of the audio encoder inside training forwards of the step, over all micro-batches and ranks; recompute not counted.",
            "forward hook",
        ),
        Metric(
            "probe/projector/rms",
            unit,
            _POSITIVE,
            "Root mean square of the output of the projector between audio encoder and decoder.",
            "√ mean(x²)",
        ),
    )


def _gradients() -> tuple[Metric, ...]:
    norm = "torch.nn.utils.clip_grad_norm_ (the norm that it returns)"
    return (
        Metric(
            "probe/grad/norm",
            "loss per unit of the weights",
            _POSITIVE,
            "L2 norm of the gradient over all parameters that train, before clipping.",
            norm,
            True,
        ),
        Metric(
            "probe/learning_rate",
            "1",
            _POSITIVE,
            "Learning rate of the first parameter group, as the step used it.",
            "optimizer.param_groups[0]['lr']",
        ),
    )


def _inputs() -> tuple[Metric, ...]:
    area = "probe/input"
    return (
        Metric(
            f"{area}/padding_share", "share", _SHARE, "Share of token positions that the attention mask hides.", "attention_mask == 0", True
        ),
        Metric(
            f"{area}/labels_masked_share",
            "share",
            _SHARE,
            "Share of label positions that are -100, so that no loss is taken there.",
            "ignore_index of torch.nn.functional.cross_entropy",
            True,
        ),
        Metric(
            f"{area}/ids_outside_vocabulary",
            "tokens",
            "whole number ≥ 0",
            "Token ids below 0 or not below the number of rows of the input embedding.",
            "rows of get_input_embeddings()",
            True,
        ),
        Metric(
            f"{area}/audio_clips_constant",
            "clips",
            "whole number ≥ 0",
            "Clips whose features are one value everywhere.",
            "maximum == minimum",
            True,
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


def _branches() -> tuple[Metric, ...]:
    return tuple(
        Metric(
            f"probe/feed_forward/{modality}_token_share",
            "share",
            _SHARE,
            f"Share of the tokens that the {modality} branch received, in layers with separate feed-forward branches for text and audio.",
            "tokens of the branch ÷ tokens of both branches",
            modality == "text",
        )
        for modality in ("text", "audio")
    )


def _codebooks() -> tuple[Metric, ...]:
    return (
        Metric(
            "probe/audio/codebook_K/loss",
            "nats per token",
            _POSITIVE,
            "As `probe/audio/loss`, for one codebook; codebooks are counted from 0.",
            "torch.nn.functional.cross_entropy",
        ),
        Metric(
            "probe/audio/codebook_K/token_accuracy",
            "share",
            _SHARE,
            "As `probe/audio/token_accuracy`, for one codebook.",
            "argmax of the logits against the aligned labels",
        ),
    )


CATALOGUE: tuple[Metric, ...] = (
    Metric(
        "probe/loss",
        "as the Trainer's loss",
        "any",
        "What `training_step` returned, summed over the micro-batches of the step and averaged over ranks. It is what was backpropagated, "
        "except in transformers 4.46, which with accumulation k returns a k-th of it.",
        "transformers.Trainer.training_step",
        True,
    ),
    *_head("text", "text tokens"),
    *_head("audio", "audio tokens"),
    *_encoder(),
    *_attention(),
    *_gradients(),
    *_inputs(),
    *_branches(),
    Metric(
        "probe/grad/<part>/norm",
        "loss per unit of the weights",
        _POSITIVE,
        "L2 norm of the gradient over the parameters of one part of the model (audio encoder, projector, heads, the rest), before "
        "clipping.",
        "torch.nn.utils.clip_grad_norm_ (the norm that it returns)",
        True,
    ),
    *_codebooks(),
    Metric(
        "probe/step",
        "steps",
        "whole number ≥ 1",
        "The sampled step at which the `probe/…` values beside it in a log were measured; the log itself may be of a later step.",
        "TrainerState.global_step at on_step_end",
    ),
)
