"""What the Trainer does with a loss: how it counts labels, smooths, divides and logs, read from its settings and its class.

Checked on transformers 4.46.3, 4.57.6 and 5.23.0 (``Trainer.compute_loss``, ``training_step``, ``get_batch_samples``, ``LabelSmoother``):

* 4.46 divides by the accumulation steps only what ``training_step`` *returns*; the loss was backpropagated undivided. Nothing else divides
  it: the Trainer never tells accelerate of the accumulation. Found by comparing gradients of the same samples as 1 x 4 and 4 x 1.
* 4.57 and 5.23 divide the loss itself, unless ``num_items_in_batch`` was counted, which happens whenever ``forward`` takes ``**kwargs``.
* 4.46 and 4.57 count every label that is not -100; 5.23 leaves out the first of each row for classes whose ``loss_type`` shifts.
* ``LabelSmoother`` takes the mean over a micro-batch before 5.x, and divides by ``num_items_in_batch`` since. It shifts labels only for
  class names in ``MODEL_FOR_CAUSAL_LM_MAPPING_NAMES``.

Private names used here: ``Trainer._loss_shifts_labels``, ``Trainer.get_tp_size`` and the like, ``TrainingArguments.n_gpu``.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import transformers
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

_METHODS = ("training_step", "compute_loss", "get_batch_samples")
_SIZES = ("get_tp_size", "get_cp_size", "get_sp_size")


@dataclass(frozen=True, slots=True)
class LossSettings:
    """What one Trainer will do with the loss of its model.

    Attributes:
        smoothing: Factor of the label smoother; 0 without one.
        smoother_shifts: Whether the smoother lays the label of a position over the logits of the one before it.
        smoother_takes_items: Whether the smoother divides by ``num_items_in_batch`` (else it takes the mean over a micro-batch).
        accumulation: Micro-batches a step.
        takes_kwargs: The Trainer believes that the model uses ``num_items_in_batch`` (``model_accepts_loss_kwargs``).
        counts_first: ``num_items_in_batch`` is by rule the number of all labels, the first of each row too, which no causal loss is over.
            False: by rule the number of labels that the loss is over.
        skips_first: The Trainer takes this class for one that shifts, and leaves the first label of each row out of the number.
        averages_tokens: ``num_items_in_batch`` is of all ranks, and the loss is multiplied by their number.
        ranks: Processes.
        split_by: What splits one batch over devices ("nn.DataParallel", "tensor, context or sequence parallelism"), or "".
        scaled: ``Trainer.loss_is_scaled_for_ga`` where someone has set it.
        loss_function: Name of ``compute_loss_func``, or "".
        overridden: What replaces the Trainer's own method, by its name: the class that does, or "the instance".
        backward_share: What was backpropagated ÷ what ``training_step`` returned, where no ``num_items_in_batch`` was given to it.
        accelerate_divides: accelerate's own divisor in ``backward``, which ``training_step`` does not return.
        logs_every_step: Each training log is of exactly one step.
        hides_nonfinite: ``logging_nan_inf_filter``.
        version: Of transformers.
    """

    smoothing: float = 0.0
    smoother_shifts: bool = False
    smoother_takes_items: bool = False
    accumulation: int = 1
    takes_kwargs: bool = False
    counts_first: bool = False
    skips_first: bool = False
    averages_tokens: bool = False
    ranks: int = 1
    split_by: str = ""
    scaled: bool | None = None
    loss_function: str = ""
    overridden: tuple[tuple[str, str], ...] = ()
    backward_share: float = 1.0
    accelerate_divides: int = 1
    logs_every_step: bool = False
    hides_nonfinite: bool = False
    version: str = transformers.__version__

    def divides(self, *, items: bool) -> bool:
        """Tell whether the Trainer divides the loss that it backpropagates by the accumulation steps.

        Args:
            items: ``num_items_in_batch`` was given to ``training_step``.
        """
        if self.backward_share != 1.0:
            return False
        if self.scaled is not None:
            return not self.scaled
        return not ((self.takes_kwargs and items) or self.loss_function)


def read_loss_settings(trainer: Any) -> LossSettings:
    """Read what a Trainer that is about to train will do with its loss. Changes nothing, and takes what is missing for not set."""
    args, smoother = trainer.args, getattr(trainer, "label_smoother", None)
    overridden = tuple(_overridden(trainer))
    old = transformers.__version__.startswith("4.46.")
    stock_step = all(method != "training_step" for method, _ in overridden)
    accelerator = trainer.accelerator
    deepspeed = str(getattr(accelerator, "distributed_type", "")).endswith("DEEPSPEED")  # the engine divides by itself, once
    accumulation = int(args.gradient_accumulation_steps)
    return LossSettings(
        smoothing=0.0 if smoother is None else float(smoother.epsilon),
        smoother_shifts=smoother is not None and _trained_class(trainer) in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values(),
        smoother_takes_items=smoother is not None and "num_items_in_batch" in inspect.signature(type(smoother).__call__).parameters,
        accumulation=accumulation,
        takes_kwargs=bool(getattr(trainer, "model_accepts_loss_kwargs", False)),
        counts_first=not hasattr(trainer, "_loss_shifts_labels"),
        skips_first=bool(getattr(trainer, "_loss_shifts_labels", False)),
        averages_tokens=bool(getattr(args, "average_tokens_across_devices", False)),
        ranks=int(getattr(accelerator, "num_processes", 1)),
        split_by=_split_by(trainer),
        scaled=getattr(trainer, "loss_is_scaled_for_ga", None),
        loss_function=_name(getattr(trainer, "compute_loss_func", None)),
        overridden=overridden,
        backward_share=float(accumulation) if old and stock_step and not deepspeed else 1.0,
        accelerate_divides=1 if deepspeed else int(getattr(accelerator, "gradient_accumulation_steps", 1) or 1),
        logs_every_step=_logs_every_step(args),
        hides_nonfinite=bool(getattr(args, "logging_nan_inf_filter", False)),
    )


def _trained_class(trainer: Any) -> str:
    """Name the class of the trained model as ``Trainer.compute_loss`` does: what wrapped it taken off, PEFT looked through."""
    model = trainer.accelerator.unwrap_model(trainer.model)
    if any(base.__module__.partition(".")[0] == "peft" for base in type(model).__mro__):
        model = getattr(getattr(model, "base_model", model), "model", model)
    return str(model._get_name())


def _overridden(trainer: Any) -> Iterator[tuple[str, str]]:
    for method in _METHODS:
        owner = next((base for base in type(trainer).__mro__ if method in vars(base)), None)
        if method in vars(trainer):
            yield method, "the instance"
        elif owner is not None and owner.__module__.partition(".")[0] != "transformers":
            yield method, owner.__name__


def _split_by(trainer: Any) -> str:
    if int(getattr(trainer.args, "n_gpu", 1) or 0) > 1:
        return "nn.DataParallel"
    sizes = (getattr(trainer, size, None) for size in _SIZES)
    split = any(callable(size) and int(size()) > 1 for size in sizes)
    return "tensor, context or sequence parallelism" if split else ""


def _logs_every_step(args: Any) -> bool:
    strategy = getattr(args, "logging_strategy", "")
    return getattr(strategy, "value", strategy) == "steps" and getattr(args, "logging_steps", 0) == 1


def _name(function: Any) -> str:
    return "" if function is None else str(getattr(function, "__name__", type(function).__name__))
