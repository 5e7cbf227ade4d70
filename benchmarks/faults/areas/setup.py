"""Faults of the setup and of the modules' modes: tokenizer, schedule, tying, dropout, eval mode, adapters, new tokens."""

from __future__ import annotations

from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import TrainerCallback

from benchmarks.faults.fault import Kind, kind
from benchmarks.faults.training import Training, of
from models.tokens import byte_tokenizer

WHISPER, QWEN, VOXTRAL, HIGGS, LLAMA, ORIGINAL = "whisper", "qwen2_audio", "voxtral", "higgs_audio_v2", "llama", "original"
_TARGETS = ["q_proj", "v_proj"]


def with_lora(model: nn.Module, **options: Any) -> nn.Module:
    """Return the model with LoRA on the queries and values of its language model."""
    return get_peft_model(model, LoraConfig(r=4, target_modules=r".*language_model.*(q_proj|v_proj)", **options))


def with_lora_everywhere(model: nn.Module, **options: Any) -> nn.Module:
    """Return the model with LoRA on all queries and values."""
    return get_peft_model(model, LoraConfig(r=4, target_modules=_TARGETS, **options))


def tokenizer_with_too_many_tokens(training: Training) -> None:
    """The tokenizer got 60 more tokens and the model's embedding was not resized; this data does not use them yet."""
    old = training.case.tokenizer()
    special = [old.convert_ids_to_tokens(i) for i in range(256, len(old))]
    more = [*special, *(f"<|extra_{n}|>" for n in range(60))]
    training.tokenizer = byte_tokenizer(more, pad=old.pad_token, bos=old.bos_token, eos=old.eos_token)


def warm_up_longer_than_training(training: Training) -> None:
    """500 steps of warm-up were copied from a long run into a short one."""
    training.arguments["warmup_steps"] = 500


def head_copied(training: Training) -> None:
    """The config says that head and embedding are tied, but a copy was assigned to the head."""

    def untie(model: nn.Module) -> None:
        model.config.tie_word_embeddings = True
        head = of(model, training.case.heads[0])
        head.weight = nn.Parameter(head.weight.detach().clone())

    training.models.append(untie)


def dropout_set_to_zero(training: Training) -> None:
    """The config says dropout 0.1, and a loop over the modules set every dropout to 0."""

    def zero(model: nn.Module) -> None:
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
            for name in ("dropout", "attention_dropout", "activation_dropout", "dropout_p"):
                if isinstance(getattr(module, name, None), float):
                    setattr(module, name, 0.0)

    training.models.append(zero)


def lora_dropout_in_eval_mode(training: Training) -> None:
    """LoRA with dropout 0.1, the only dropout there is, whose dropout layers stay in eval mode while the rest trains."""

    def stay(model: nn.Module) -> nn.Module:
        for module in model.modules():
            if isinstance(getattr(module, "attention_dropout", None), float):
                module.attention_dropout = 0.0
        model = with_lora_everywhere(model, lora_dropout=0.1)
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.eval().train = lambda mode=True, module=module: module
        return model

    training.models.append(stay)


class EvaluatesInTrainingMode:
    """A Trainer whose evaluation leaves the model in training mode."""

    def prediction_step(self, model: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """Predict with dropout on."""
        model.train()
        return super().prediction_step(model, *args, **kwargs)


def dropout_left_on_in_evaluation(training: Training) -> None:
    """``prediction_step`` is overridden and calls ``model.train()``: the evaluation loss is one with dropout."""
    training.mixins.append(EvaluatesInTrainingMode)
    training.arguments.update(eval_strategy="steps", eval_steps=4)
    if training.case.name == QWEN:
        training.models.append(lambda model: with_lora(model, lora_dropout=0.1))


def encoder_stays_in_eval_mode(training: Training) -> None:
    """The encoder trains, but a ``train()`` override from the days when it was frozen keeps it in eval mode."""

    def stay(model: nn.Module) -> None:
        encoder = of(model, training.case.encoder)
        encoder.eval()
        encoder.train = lambda mode=True: encoder

    training.models.append(stay)


class TrainsInEvalMode:
    """A Trainer with a ``training_step`` of its own that forgot ``model.train()``."""

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> torch.Tensor:
        """Forward and backward in eval mode."""
        model.eval()
        loss = self.compute_loss(model, self._prepare_inputs(inputs))
        self.accelerator.backward(loss)
        return loss.detach()


def model_in_eval_mode(training: Training) -> None:
    """``training_step`` is overridden and leaves the whole model in eval mode after the first evaluation."""
    training.mixins.append(TrainsInEvalMode)


class SwitchesAdaptersOff(TrainerCallback):
    """Measures the base model before training and forgets to switch the adapters on again."""

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Switch them off."""
        model.disable_adapter_layers()


def adapters_switched_off(training: Training) -> None:
    """The adapters were switched off for a comparison with the base model, and never on again."""

    def adapted(model: nn.Module) -> nn.Module:
        model = with_lora_everywhere(model)
        model.enable_input_require_grads()
        return model

    training.models.append(adapted)
    training.trainers.append(lambda trainer: trainer.add_callback(SwitchesAdaptersOff()))


def adapters_not_in_optimizer(training: Training) -> None:
    """The optimizer was made from the norms alone: LoRA's output weights stay 0 for ever."""

    def adapted(model: nn.Module) -> nn.Module:
        model = with_lora_everywhere(model)
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.requires_grad_(True)
        return model

    def partly(trainer: Any) -> None:
        norms = [p for n, p in trainer.model.named_parameters() if "norm" in n]
        trainer.optimizer = torch.optim.AdamW(norms, lr=1e-3)

    training.models.append(adapted)
    training.trainers.append(partly)


def new_tokens_with_frozen_embedding(training: Training) -> None:
    """Four tokens were added to the tokenizer and stand in every text, but LoRA leaves the embedding as it is."""
    tokenizer = training.case.tokenizer()
    special = [tokenizer.convert_ids_to_tokens(i) for i in range(256, len(tokenizer))]
    ours = byte_tokenizer(special, pad=tokenizer.pad_token, bos=tokenizer.bos_token, eos=tokenizer.eos_token)
    ours.add_tokens([f"<emotion_{n}>" for n in range(4)])
    training.tokenizer = ours
    first = ours.convert_tokens_to_ids("<emotion_0>")

    def marked(sample: dict[str, Any], index: int) -> dict[str, Any]:
        ids, labels = list(sample["input_ids"]), list(sample["labels"])
        return {**sample, "input_ids": [*ids[:-1], first + index % 4, ids[-1]], "labels": [*labels[:-1], first + index % 4, labels[-1]]}

    training.rows.append(marked)
    training.models.append(with_lora_everywhere)


_NOTHING_TRAINS = ("backward-never-ran", "part-without-gradient", "loss-not-connected")

KINDS: tuple[Kind, ...] = (
    kind("setup", "tokenizer-larger-than-model", tokenizer_with_too_many_tokens, LLAMA, QWEN, WHISPER),
    kind("setup", "warm-up-never-ends", warm_up_longer_than_training, WHISPER, LLAMA, ORIGINAL, also=["learning-rate-too-small"]),
    kind("setup", "head-untied", head_copied, WHISPER, LLAMA),
    kind("setup", "dropout-off", dropout_set_to_zero, WHISPER, QWEN),
    kind("setup", "dropout-off", lora_dropout_in_eval_mode, LLAMA, also=["module-in-eval-mode"]),
    kind("setup", "dropout-in-evaluation", dropout_left_on_in_evaluation, QWEN, WHISPER),
    kind("setup", "module-in-eval-mode", encoder_stays_in_eval_mode, WHISPER, QWEN, ORIGINAL),
    kind("setup", "module-in-eval-mode", model_in_eval_mode, WHISPER, LLAMA, also=["dropout-off"]),
    kind("setup", "adapters-without-effect", adapters_switched_off, LLAMA, also=_NOTHING_TRAINS),
    kind(
        "setup",
        "adapters-without-effect",
        adapters_not_in_optimizer,
        LLAMA,
        HIGGS,
        also=["learning-rate-too-small", "part-without-gradient"],
    ),
    kind("setup", "new-tokens-not-trained", new_tokens_with_frozen_embedding, LLAMA, QWEN),
)
