"""The headline metrics in the Trainer's own logs, so that TensorBoard, W&B and ``state.log_history`` see them."""

from __future__ import annotations

import math
import numbers
from collections.abc import Mapping
from typing import Any

STEP = "probe/step"


def is_training_log(logs: Mapping[str, Any]) -> bool:
    """Whether ``logs`` is a training log: it has "loss", and is neither an evaluation nor the summary at the end of training."""
    return "loss" in logs and "train_runtime" not in logs and not any(name.startswith("eval_") for name in logs)


def enter(logs: dict[str, Any], state: Any, metrics: Mapping[str, float], step: int) -> None:
    """Add metrics and ``probe/step`` to a training log, in place, and to its copy in ``state.log_history``.

    The Trainer appends a copy of ``logs`` to ``log_history`` before it calls ``on_log``; that copy is recognised by being the last, with
    "loss" and the current ``global_step``. A name that is already there stays as it is. Only plain Python numbers go in, because
    integrations drop everything else and ``log_history`` is written as JSON: a number that is not finite is left out.

    Args:
        logs: What ``on_log`` was given.
        state: The Trainer's state.
        metrics: Headline metrics by public name.
        step: The sampled step that they were measured at.
    """
    entries: dict[str, float] = {STEP: int(step)}
    for name, value in metrics.items():
        number = _plain(value)
        if number is not None and name != STEP:
            entries[name] = number
    _add(logs, entries)
    history = getattr(state, "log_history", None)
    if history and history[-1] is not logs and "loss" in history[-1] and history[-1].get("step") == state.global_step:
        _add(history[-1], entries)


def _plain(value: Any) -> float | None:
    if isinstance(value, numbers.Integral):
        return int(value)
    if isinstance(value, numbers.Real) and math.isfinite(value):
        return float(value)
    return None


def _add(entry: dict[str, Any], entries: Mapping[str, float]) -> None:
    for name, value in entries.items():
        entry.setdefault(name, value)
