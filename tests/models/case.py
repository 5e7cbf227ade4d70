"""One model to test on: how it is built, fed and trained, and the truth about its sites that tests compare with."""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import transformers
from torch import nn
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerFast, Trainer, TrainingArguments


@dataclass(frozen=True)
class Case:
    """A tiny model with its data.

    Attributes:
        name: Its key in ``models.CASES``.
        build: Makes the model from a seed (and sets the seed of torch's global generator).
        dataset: ``dataset(n, seed)``: n samples, of at least two lengths when n > 1.
        collate: The data collator.
        tokenizer: Makes the tokenizer that the samples were made with.
        vocabulary: Rows of the input embedding; some of the last have no token, as in released models.
        shift: 1 where logits of a position are compared with the label of the next (decoder-only), 0 where with its own.
        heads: The LM heads.
        attention: Attention layers by kind.
        needs: The class that transformers must have, "" if none.
        encoder: The audio encoder.
        projector: What makes encoder outputs as wide as tokens.
        dual_layers: Decoder layers that own both ``mlp`` and ``audio_mlp``.
        audio_token: The placeholder token of audio in ``input_ids``, if there is one.
        trainer_class: The Trainer that people use with this model.
        arguments_class: The arguments of that Trainer.
        unsupported: Keys of ``running.VARIANTS`` in which the installed transformers cannot train this model by itself, and why.
    """

    name: str
    build: Callable[[int], nn.Module]
    dataset: Callable[[int, int], Dataset[Any]]
    collate: Callable[[Sequence[Any]], Any]
    tokenizer: Callable[[], PreTrainedTokenizerFast]
    vocabulary: int
    shift: int
    heads: tuple[str, ...]
    attention: Mapping[str, tuple[str, ...]]
    needs: str = ""
    encoder: str | None = None
    projector: str | None = None
    dual_layers: tuple[str, ...] = ()
    audio_token: str | None = None
    trainer_class: type[Trainer] = Trainer
    arguments_class: type[TrainingArguments] = TrainingArguments
    unsupported: Mapping[str, str] = field(default_factory=dict)

    def available(self) -> bool:
        """Say whether the installed transformers has this model."""
        return not self.needs or hasattr(transformers, self.needs)

    def arguments(self, **overrides: Any) -> TrainingArguments:
        """Return arguments for 20 quiet steps on the CPU in a folder that goes when Python ends, unless ``output_dir`` is given."""
        chosen: dict[str, Any] = {
            "max_steps": 20,
            "per_device_train_batch_size": 2,
            "per_device_eval_batch_size": 2,
            "learning_rate": 1e-3,
            "logging_steps": 1,
            "report_to": "none",
            "use_cpu": True,
            "disable_tqdm": True,
            "remove_unused_columns": False,
            "save_strategy": "no",
            "dataloader_pin_memory": False,
        }
        chosen.update(overrides)
        os.environ.pop("ACCELERATE_MIXED_PRECISION", None)  # transformers 4 leaves it there: after one bf16 run all were
        if "output_dir" not in chosen:
            chosen["output_dir"] = tempfile.mkdtemp(prefix=f"case-{self.name}-")
            atexit.register(shutil.rmtree, chosen["output_dir"], ignore_errors=True)
        return self.arguments_class(**chosen)

    def trainer(self, model: nn.Module, *, samples: int = 8, seed: int = 0, **overrides: Any) -> Trainer:
        """Return an unmodified Trainer of this case with ``samples`` training and half as many evaluation samples."""
        return self.trainer_class(
            model=model,
            args=self.arguments(seed=seed, **overrides),
            train_dataset=self.dataset(samples, seed),
            eval_dataset=self.dataset(max(samples // 2, 2), seed + 1),
            data_collator=self.collate,
        )


def transformers_major() -> int:
    """Return the installed transformers' major version; module names of some models differ between 4 and 5."""
    return int(transformers.__version__.split(".")[0])


def layer_names(prefix: str, layers: int, attention: str = "self_attn") -> tuple[str, ...]:
    """Return ``<prefix>.layers.<i>.<attention>`` for every layer."""
    return tuple(f"{prefix}.layers.{layer}.{attention}" for layer in range(layers))
