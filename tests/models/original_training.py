"""The case of the original-style model: its batch that is no mapping, its data, and its trainer with a ``training_step`` of its own."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast, Trainer

from models.case import Case, layer_names
from models.original import OriginalConfig, OriginalModel, OriginalWrapper
from models.samples import IGNORED, Sample, Samples, clip_features, delayed_codes, integer, make_samples, pad_rows, words
from models.tokens import byte_tokenizer, encode

SPECIAL = ("<pad>", "<|begin_of_text|>", "<|eot_id|>", "<|audio_bos|>", "<|AUDIO|>", "<|AUDIO_OUT|>", "<|audio_eos|>", "<|audio_out_bos|>")
_CONFIG = OriginalConfig()
_BOOKS, _MELS, _FRAMES = _CONFIG.audio_num_codebooks, _CONFIG.num_mel_bins, _CONFIG.mel_frames


class OriginalBatch:
    """A batch with ``keys()``, ``[]`` and ``get`` that is no ``Mapping``; asking for a missing name is an AttributeError."""

    def __init__(self, **fields: Tensor) -> None:
        self.__dict__.update(fields)

    def keys(self) -> list[str]:
        """Return the names."""
        return list(self.__dict__)

    def __getitem__(self, name: str) -> Any:
        return getattr(self, name)

    def __contains__(self, name: str) -> bool:
        return name in self.__dict__

    def __len__(self) -> int:
        return len(self.__dict__)

    def get(self, name: str, default: Any = None) -> Any:
        """Return one field."""
        return self.__dict__.get(name, default)

    def to(self, device: Any, non_blocking: bool = False) -> OriginalBatch:
        """Move the tensors; accelerate calls this, the Trainer does not."""
        return OriginalBatch(**{name: field.to(device, non_blocking=non_blocking) for name, field in self.__dict__.items()})


class OriginalTrainer(Trainer):
    """A Trainer that does the step itself and tells the callbacks of it once too often."""

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        """Forward, a second ``on_step_end`` before the gradients exist, backward; return the loss that was backpropagated."""
        model.train()
        with self.compute_loss_context_manager():
            loss = model(**inputs).loss
        self.control = self.callback_handler.on_step_end(self.args, self.state, self.control)
        loss = loss / self.args.gradient_accumulation_steps  # the Trainer tells accelerate of one step, so nobody else divides
        self.accelerator.backward(loss)
        return loss.detach()


@cache
def tokenizer() -> PreTrainedTokenizerFast:
    """Return the tokenizer."""
    return byte_tokenizer(SPECIAL, pad="<pad>", bos="<|begin_of_text|>", eos="<|eot_id|>")


def build(seed: int) -> OriginalWrapper:
    """Return the wrapped model."""
    ids = {token: tokenizer().convert_tokens_to_ids(token) for token in SPECIAL}
    config = OriginalConfig(audio_in_token_idx=ids["<|AUDIO|>"], audio_out_token_idx=ids["<|AUDIO_OUT|>"], pad_token_id=ids["<pad>"])
    torch.manual_seed(seed)
    return OriginalWrapper(OriginalModel(config))


def _text_sample(generator: torch.Generator) -> Sample:
    prompt = encode(tokenizer(), f"<|begin_of_text|>{words(generator, 4, 8)}<|eot_id|>")
    answer = encode(tokenizer(), f"{words(generator, 5, 15)}<|eot_id|>")
    return {"input_ids": prompt + answer, "label_ids": [IGNORED] * len(prompt) + answer, "clip": None, "codes_in": None, "codes_out": None}


def _sample(index: int, generator: torch.Generator) -> Sample:
    if index % 5 == 3:
        return _text_sample(generator)
    valid = integer(generator, 40, 90)
    reference = "<|audio_bos|><|AUDIO|><|audio_eos|>"
    prompt = encode(tokenizer(), f"<|begin_of_text|>{words(generator, 3, 6)}{reference}{words(generator, 4, 8)}<|eot_id|>")
    answer = encode(tokenizer(), f"{words(generator, 1, 3)}<|audio_out_bos|><|AUDIO_OUT|><|audio_eos|><|eot_id|>")
    codes_in, _ = delayed_codes(generator, _BOOKS, _CONFIG.audio_codebook_size, integer(generator, 3, 5))
    frames = integer(generator, 4 + 4 * (index % 2), 6 + 4 * (index % 2))
    codes_out, labels_out = delayed_codes(generator, _BOOKS, _CONFIG.audio_codebook_size, frames)
    labels_out[0] = IGNORED  # else the last frame of the segment before would be asked for it
    return {
        "input_ids": prompt + answer,
        "label_ids": [IGNORED] * len(prompt) + answer,
        "clip": (clip_features(generator, _MELS, _FRAMES, valid), (torch.arange(_FRAMES) < valid).long()),
        "codes_in": codes_in.T,
        "codes_out": (codes_out.T, labels_out.T),
    }


def dataset(count: int, seed: int) -> Samples:
    """Return samples with a reference clip, its codes and audio to learn; every fifth from the fourth on is text only."""
    return make_samples(count, seed, _sample)


def text_dataset(count: int, seed: int) -> Samples:
    """Return samples without any audio, so that a batch of them has features of shape (0, 16, 100)."""
    return make_samples(count, seed, lambda index, generator: _text_sample(generator))


def collate(samples: Sequence[Sample]) -> OriginalBatch:
    """Return the batch; what is of audio is joined along the frames, with the places where each segment starts."""
    clips = [sample["clip"] for sample in samples if sample["clip"] is not None]
    ins = [sample["codes_in"] for sample in samples if sample["codes_in"] is not None]
    outs = [sample["codes_out"] for sample in samples if sample["codes_out"] is not None]
    input_ids = [sample["input_ids"] for sample in samples]
    return OriginalBatch(
        input_ids=pad_rows(input_ids, tokenizer().pad_token_id),
        attention_mask=pad_rows([[1] * len(row) for row in input_ids], 0),
        audio_features=torch.stack([clip for clip, _ in clips]) if clips else torch.zeros(0, _MELS, _FRAMES),
        audio_feature_attention_mask=torch.stack([mask for _, mask in clips]) if clips else torch.zeros(0, _FRAMES, dtype=torch.long),
        audio_in_ids=_joined(ins),
        audio_in_ids_start=_starts(ins),
        audio_out_ids=_joined([codes for codes, _ in outs]),
        audio_out_ids_start=_starts([codes for codes, _ in outs]),
        label_ids=pad_rows([sample["label_ids"] for sample in samples], IGNORED),
        label_audio_ids=_joined([labels for _, labels in outs]),
    )


def _joined(segments: Sequence[Tensor]) -> Tensor:
    return torch.cat([torch.zeros(_BOOKS, 0, dtype=torch.long), *segments], dim=1)


def _starts(segments: Sequence[Tensor]) -> Tensor:
    lengths = torch.tensor([segment.shape[1] for segment in segments], dtype=torch.long)
    return lengths.cumsum(0) - lengths


CASE = Case(
    name="original",
    build=build,
    dataset=dataset,
    collate=collate,
    tokenizer=tokenizer,
    vocabulary=_CONFIG.vocab_size,
    shift=1,
    heads=("model.audio_decoder_proj.text_lm_head", "model.audio_decoder_proj.audio_lm_head"),
    encoder="model.audio_tower",
    projector="model.audio_encoder_proj",
    attention={"encoder": layer_names("model.audio_tower", 2), "joint": layer_names("model", _CONFIG.num_hidden_layers)},
    dual_layers=("model.layers.1",),
    audio_token="<|AUDIO|>",
    trainer_class=OriginalTrainer,
)
