"""One micro-batch: what the Trainer handed over, what the root's forward received and returned."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(slots=True)
class MicroBatch:
    """The inputs of one training forward of the root model, by reference, and its output while the forward runs.

    Attributes:
        index: 0 for the first micro-batch of the step.
        batch: What ``training_step`` was given (a shallow copy of the mapping): the only place where labels are always found, because
            label smoothing and ``compute_loss_func`` pop them before the forward.
        kwargs: What the root's forward was given, by parameter name, on the model's device.
        output: What the root's forward returned. Set while the hooks of the root's return run, ``None`` before and after.
        scratch: Results that observers share within the micro-batch (row choices, modality of tokens), by key.
    """

    index: int
    batch: Mapping[str, Any] = field(default_factory=dict)
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    output: Any = None
    scratch: dict[Any, Any] = field(default_factory=dict)

    @property
    def inputs(self) -> dict[str, Any]:
        """Everything known by name: the forward's arguments first, then what only ``training_step`` saw. ``None`` values are left out."""
        merged = {name: value for name, value in self.kwargs.items() if value is not None}
        merged.update((name, value) for name, value in self.batch.items() if name not in merged and value is not None)
        return merged


def named_output(output: Any, name: str) -> Any:
    """Return a field of a model's output, whether that is a ``ModelOutput``, a mapping or an object; ``None`` if it has no such field."""
    if isinstance(output, Mapping):
        return output.get(name)
    return getattr(output, name, None)
