"""A training that is about to be made: everything that a fault, or a healthy variation, may change about it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import Trainer

from models.case import Case

Waveform = NDArray[np.float64]
Fields = dict[str, Any]


@dataclass
class Training:
    """One training of a tiny model by a Trainer. Changes are applied in the order in which they were added.

    Attributes:
        case: The model, its data and its Trainer.
        steps: Optimizer steps.
        every: Cadence of the probe.
        seed: Of everything.
        samples: In the training set.
        fresh: Begin from random weights; else from weights that were trained on data of this kind before.
        arguments: For the training arguments.
        tokenizer: Given to the probe instead of the case's own.
        attach: Further options for ``probe.attach``.
        mixins: Classes put before the case's Trainer.
        waveforms: Changes of a clip of float samples in [-1, 1] at 16 kHz, before its log-mel features are computed.
        features: Changes of the log-mel features of a clip, (mel, T).
        rows: Changes of a sample; they get its index, too.
        batches: Changes of a collated batch, as a dict.
        models: Changes of the model before the Trainer is built; what one returns, if anything, takes the model's place.
        trainers: Changes of the Trainer before it trains.
        collate: Instead of the case's own collator.
        onset: The step after which it is broken.
    """

    case: Case
    steps: int = 24
    every: int = 1
    seed: int = 0
    samples: int = 64
    fresh: bool = False
    arguments: dict[str, Any] = field(default_factory=dict)
    tokenizer: Any = None
    attach: dict[str, Any] = field(default_factory=dict)
    mixins: list[type] = field(default_factory=list)
    waveforms: list[Callable[[Waveform], Waveform]] = field(default_factory=list)
    features: list[Callable[[Tensor], Tensor]] = field(default_factory=list)
    rows: list[Callable[[Fields, int], Fields]] = field(default_factory=list)
    batches: list[Callable[[Fields], Fields]] = field(default_factory=list)
    models: list[Callable[[nn.Module], nn.Module | None]] = field(default_factory=list)
    trainers: list[Callable[[Trainer], None]] = field(default_factory=list)
    collate: Callable[[Sequence[Any]], Any] | None = None
    onset: int = 0

    @property
    def labels(self) -> str:
        """The name of the text labels in a batch."""
        return "label_ids" if self.case.name == "original" else "labels"

    @property
    def features_name(self) -> str:
        """The name of the log-mel features (or the waveforms) in a batch."""
        return {"original": "audio_features", "moonshine": "input_values"}.get(self.case.name, "input_features")

    def trainer_class(self) -> type[Trainer]:
        """Return the case's Trainer with the mixins before it."""
        base = self.case.trainer_class
        return type(base.__name__, (*reversed(self.mixins), base), {}) if self.mixins else base

    def collated(self, samples: Sequence[Any]) -> Any:
        """Return the batch of samples, changes and all, in the case's own type of batch."""
        batch = (self.collate or self.case.collate)(samples)
        if not self.batches:
            return batch
        fields = {name: batch[name] for name in batch.keys()}  # noqa: SIM118  (one case's batch is no mapping)
        for change in self.batches:
            fields = change(fields)
        return fields if isinstance(batch, Mapping) else type(batch)(**fields)


def returning(module: nn.Module, change: Callable[[Any], Any]) -> None:
    """Have ``module`` return ``change`` of what it returned; of a ``ModelOutput`` or tuple only the first entry is changed."""
    forward = module.forward

    def changed(*args: Any, **kwargs: Any) -> Any:
        output = forward(*args, **kwargs)
        if isinstance(output, Tensor):
            return change(output)
        if isinstance(output, tuple):
            return (change(output[0]), *output[1:])
        first = next(iter(output))
        output[first] = change(output[first])
        return output

    module.forward = changed


def taking(module: nn.Module, change: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """Have ``module`` get ``change`` of its keyword arguments."""
    forward = module.forward
    module.forward = lambda *args, **kwargs: forward(*args, **change(kwargs))


def of(model: nn.Module, name: str | None) -> nn.Module:
    """Return the module of that name, below any wrapper of PEFT.

    Raises:
        LookupError: if there is none.
    """
    core = model.get_base_model() if hasattr(model, "get_base_model") else model
    if name is None:
        raise LookupError(f"{type(core).__name__} has no such module")
    return core.get_submodule(name)
