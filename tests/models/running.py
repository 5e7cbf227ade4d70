"""Trains a case from a seed and keeps all that two runs must have in common; compares two such runs bit for bit."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import Trainer

from models.case import Case

# The ways of training that everything must work in; ``Case.unsupported`` is keyed by these names.
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "accumulation": {"gradient_accumulation_steps": 2},
    "checkpointing": {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}},
    "checkpointing_reentrant": {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}},
    "bf16": {"bf16": True},
}

# Wall-clock entries of the last log.
_TIMES = ("train_runtime", "train_samples_per_second", "train_steps_per_second", "train_tokens_per_second")
_IGNORED_PREFIX = "probe/"
_SHOWN = 4  # differences told of each part


@dataclass(frozen=True)
class RunResult:
    """What a run left behind.

    ``log_history`` holds each step's logged loss (rounded to four digits by some versions) and gradient norm, and in its last entry
    ``train_loss``, the mean of the losses in full precision. The tensors are copies. ``rng_attached`` is the state of every random
    generator when ``attach`` had returned, ``rng`` when training had ended.
    """

    trainer: Trainer
    model: nn.Module
    attached: Any
    log_history: list[dict[str, Any]]
    state_dict: dict[str, Tensor]
    optimizer: dict[str, Any]
    rng_attached: dict[str, Any]
    rng: dict[str, Any]

    @property
    def losses(self) -> list[float]:
        """Return the training losses as logged."""
        return [entry["loss"] for entry in self.log_history if "loss" in entry]


def run(
    case: Case,
    *,
    seed: int = 0,
    attach: Callable[[nn.Module], Any] | None = None,
    built: Callable[[Trainer], Any] | None = None,
    samples: int = 8,
    **argument_overrides: Any,
) -> RunResult:
    """Build the model of a case, train it, and return what is left.

    Args:
        case: What to train.
        seed: Seeds Python, NumPy, torch, the model, the data and the Trainer.
        attach: Called with the model before the Trainer is made.
        built: Called with the Trainer before it trains (to add callbacks, say).
        samples: Training samples.
        **argument_overrides: For the training arguments.
    """
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    model = case.build(seed)
    attached = attach(model) if attach is not None else None
    rng_attached = rng_states()
    trainer = case.trainer(model, samples=samples, seed=seed, **argument_overrides)
    if built is not None:
        built(trainer)
    trainer.train()
    return RunResult(
        trainer=trainer,
        model=model,
        attached=attached,
        log_history=[dict(entry) for entry in trainer.state.log_history],
        state_dict=_cloned(model.state_dict()),
        optimizer=_cloned(trainer.optimizer.state_dict()),
        rng_attached=rng_attached,
        rng=rng_states(),
    )


def rng_states() -> dict[str, Any]:
    """Return the state of every global random generator (on CUDA that of each device, too)."""
    states: dict[str, Any] = {"python": random.getstate(), "numpy": np.random.get_state(), "torch": torch.get_rng_state().clone()}
    if torch.cuda.is_available():
        states["cuda"] = [state.clone() for state in torch.cuda.get_rng_state_all()]
    return states


def assert_identical(first: RunResult, second: RunResult) -> None:
    """Fail unless both runs are the same bit for bit: logs (without times and ``probe/`` keys), weights, optimizer, generators."""
    parts = {
        "logs": (_comparable_logs(first), _comparable_logs(second)),
        "weights": (first.state_dict, second.state_dict),
        "optimizer": (first.optimizer, second.optimizer),
        "random state after attach": (first.rng_attached, second.rng_attached),
        "random state after training": (first.rng, second.rng),
    }
    lines: list[str] = []
    for part, pair in parts.items():
        problems = list(_differences(*pair))
        lines += [f"{part}: {problem}" for problem in problems[:_SHOWN]]
        lines += [f"{part}: ... and {len(problems) - _SHOWN} more"] if len(problems) > _SHOWN else []
    if lines:
        raise AssertionError("the runs differ:\n" + "\n".join(lines))


def _comparable_logs(result: RunResult) -> list[dict[str, Any]]:
    ignored = [*_TIMES, *(f"eval_{time.removeprefix('train_')}" for time in _TIMES)]
    return [
        {key: value for key, value in entry.items() if key not in ignored and not key.startswith(_IGNORED_PREFIX)}
        for entry in result.log_history
    ]


def _differences(first: Any, second: Any) -> Iterator[str]:
    left, right = dict(_leaves(first)), dict(_leaves(second))
    for path in [*left, *(path for path in right if path not in left)]:
        if path not in right:
            yield f"{path}: only in the first"
        elif path not in left:
            yield f"{path}: only in the second"
        elif problem := _difference(left[path], right[path]):
            yield f"{path}: {problem}"


def _leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping):
        yield f"{path} keys", list(value)
        for key, inner in value.items():
            yield from _leaves(inner, f"{path}.{key}" if path else str(key))
    elif isinstance(value, (list, tuple)) and not all(isinstance(inner, (int, str)) for inner in value):
        yield f"{path} length", len(value)
        for index, inner in enumerate(value):
            yield from _leaves(inner, f"{path}[{index}]")
    else:
        yield path, torch.from_numpy(value) if isinstance(value, np.ndarray) else value


def _difference(first: Any, second: Any) -> str:
    if not isinstance(first, Tensor) or not isinstance(second, Tensor):
        same = type(first) is type(second) and repr(first) == repr(second)  # repr: NaN is itself, and -0.0 is not 0.0
        return "" if same else f"{_short(first)} != {_short(second)}"
    if (first.shape, first.dtype) != (second.shape, second.dtype):
        return f"{tuple(first.shape)} {first.dtype} != {tuple(second.shape)} {second.dtype}"
    if torch.equal(_bytes(first), _bytes(second)):
        return ""
    unequal = int((first != second).sum())
    largest = float((first.double() - second.double()).abs().max())
    return f"{unequal} of {first.numel()} elements differ, by at most {largest:.3g}"


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _cloned(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, Mapping):
        return {key: _cloned(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_cloned(inner) for inner in value)
    return value
