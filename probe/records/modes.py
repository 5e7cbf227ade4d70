"""Which modules trained and which did not while a step ran: training mode, dropout, adapters."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Modes:
    """The state of the modules inside the training forwards of one step, on this rank.

    ``in_eval_mode`` names the outermost modules that are in eval mode inside a model in training mode ("" is the model itself), with
    those of them whose parameters are all frozen (or that have none) left out; ``in_eval_mode_frozen`` names these. ``dropout_modules``
    counts dropout layers with a probability above 0, ``dropout_active`` those of them in training mode. ``dropout_in_evaluation``:
    dropout layers in training mode during the last evaluation batch that was seen, ``None`` before any. ``adapters`` counts adapter
    layers, ``adapters_disabled`` those switched off or without an active adapter, ``adapters_zero`` those whose output weight is all 0.
    """

    in_eval_mode: tuple[str, ...] = ()
    in_eval_mode_frozen: tuple[str, ...] = ()
    dropout_modules: int = 0
    dropout_active: int = 0
    dropout_in_evaluation: int | None = None
    adapters: int = 0
    adapters_disabled: int = 0
    adapters_zero: int | None = None
