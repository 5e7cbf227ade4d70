"""Loss, gradients and conditioning of one step."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class LossAudit:
    """The loss that was backpropagated against the one put together from the captured predictions and labels.

    ``backpropagated`` and ``expected`` are over all micro-batches, averaged over ranks; ``ratio`` is the first by the second. ``logged``
    is what the Trainer's log said of this very step (only with ``logging_steps=1``). ``reduction`` says in words how ``expected`` was
    put together; ``standard_error`` is that of ``expected`` where only some rows of a head were evaluated (0: all were). ``causes``
    explains, most telling first, what is off; empty when nothing is. ``kinds`` is as long: the short name of each cause (see
    :data:`probe.assemble.loss_figures.Kind`).
    """

    backpropagated: float | None = None
    expected: float | None = None
    ratio: float | None = None
    logged: float | None = None
    reduction: str = ""
    standard_error: float = 0.0
    causes: tuple[str, ...] = ()
    kinds: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Part:
    """One part of the model, or one layer of it: what trains in it, what gradient reached it, and how far the update moved it.

    ``parameters`` counts elements; ``trainable_share`` is the share of them with ``requires_grad``. ``tensors`` counts parameter tensors
    that should train, ``without_gradient`` those of them that received no gradient (``None``: gradients could not be read, see
    ``not_measured``). ``gradient_norm`` is the L2 norm before clipping, ``clipped_norm`` as the optimizer gets it. ``nonfinite``:
    whether the gradient holds a NaN or Inf. The rest is from a fixed sample of ``sampled`` elements: ``zero_share`` of gradients that
    are exactly 0 (of tensors that have one), ``update_ratio`` the norm of what the step added to the weights by the norm of the weights,
    ``unchanged_share`` the share of elements with a gradient other than 0 that the step left as they were, ``weight_rms`` the root mean
    square of the weights.
    ``dtype`` is that of the weights that train (of most of them, where they differ).
    """

    name: str
    parameters: int
    trainable_share: float
    without_gradient: int | None = None
    gradient_norm: float | None = None
    tensors: int = 0
    clipped_norm: float | None = None
    nonfinite: bool = False
    sampled: int = 0
    zero_share: float | None = None
    update_ratio: float | None = None
    unchanged_share: float | None = None
    weight_rms: float | None = None
    dtype: str = ""


@dataclass(frozen=True, slots=True)
class ActivationGradient:
    """The gradient of the loss that reached one site's output in one step, over all calls, micro-batches and ranks, unscaled.

    ``norm`` is the L2 norm, ``rms`` the root mean square an element; ``None`` where it holds a NaN or Inf (then ``nonfinite`` counts the
    calls whose gradient did).
    """

    site: str
    calls: int
    norm: float | None = None
    rms: float | None = None
    nonfinite: int = 0


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
    clipping, over all parameters that train. ``loss_scale`` is the factor of fp16 training by which the backpropagated loss was
    multiplied (loss and gradients stand here without it); ``None`` without.
    """

    loss: float | None = None
    learning_rates: tuple[float, ...] = ()
    gradient_norm: float | None = None
    loss_scale: float | None = None
