"""The Whisper case: encoder-decoder with layerdrop and SpecAugment, fed as the usual fine-tuning recipe feeds it."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedTokenizerFast, Seq2SeqTrainer, Seq2SeqTrainingArguments, WhisperConfig, WhisperForConditionalGeneration

from models.case import Case, layer_names
from models.samples import IGNORED, Sample, Samples, clip_features, integer, make_samples, pad_rows, words
from models.tokens import byte_tokenizer, encode

VOCABULARY, MELS, FRAMES, LAYERS = 288, 16, 100, 2
SPECIAL = ("<|endoftext|>", "<|startoftranscript|>", "<|en|>", "<|transcribe|>", "<|notimestamps|>")
_UNSUPPORTED = (
    {"checkpointing_reentrant": "4.57 hands encoder states by keyword past the checkpoint, and backward goes through them twice"}
    if transformers.__version__.startswith("4.57.")
    else {}
)


@cache
def tokenizer() -> PreTrainedTokenizerFast:
    """Return the tokenizer; as in Whisper, one token begins texts, ends them and pads."""
    return byte_tokenizer(SPECIAL, pad=SPECIAL[0], bos=SPECIAL[0], eos=SPECIAL[0])


def build(seed: int) -> WhisperForConditionalGeneration:
    """Return the model with every kind of dropout that Whisper has."""
    end, start = (tokenizer().convert_tokens_to_ids(token) for token in SPECIAL[:2])
    config = WhisperConfig(
        vocab_size=VOCABULARY,
        num_mel_bins=MELS,
        d_model=32,
        encoder_layers=LAYERS,
        decoder_layers=LAYERS,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=64,
        decoder_ffn_dim=64,
        max_source_positions=FRAMES // 2,
        max_target_positions=64,
        dropout=0.1,
        attention_dropout=0.1,
        activation_dropout=0.1,
        encoder_layerdrop=0.2,
        decoder_layerdrop=0.2,
        apply_spec_augment=True,
        mask_time_prob=0.2,
        mask_time_length=10,
        mask_feature_prob=0.2,
        mask_feature_length=4,
        pad_token_id=end,
        bos_token_id=end,
        eos_token_id=end,
        decoder_start_token_id=start,
        begin_suppress_tokens=None,
    )
    torch.manual_seed(seed)
    return WhisperForConditionalGeneration(config)


def _sample(index: int, generator: torch.Generator) -> Sample:
    text = words(generator, 6 + 5 * (index % 2), 12 + 5 * (index % 2))
    return {
        "input_features": clip_features(generator, MELS, FRAMES, integer(generator, 60, 90)),
        "labels": encode(tokenizer(), "".join(SPECIAL[2:]) + text + SPECIAL[0]),
    }


def dataset(count: int, seed: int) -> Samples:
    """Return clips of 60 to 90 frames, padded to 100, with texts of 6 to 17 characters."""
    return make_samples(count, seed, _sample)


def collate(samples: Sequence[Sample]) -> dict[str, Tensor]:
    """Return ``input_features`` (B, 16, 100) and ``labels`` (B, S); the model itself puts the start token before them."""
    return {
        "input_features": torch.stack([sample["input_features"] for sample in samples]),
        "labels": pad_rows([sample["labels"] for sample in samples], IGNORED),
    }


CASE = Case(
    name="whisper",
    build=build,
    dataset=dataset,
    collate=collate,
    tokenizer=tokenizer,
    vocabulary=VOCABULARY,
    shift=0,
    heads=("proj_out",),
    encoder="model.encoder",
    attention={
        "encoder": layer_names("model.encoder", LAYERS),
        "decoder": layer_names("model.decoder", LAYERS),
        "cross": layer_names("model.decoder", LAYERS, "encoder_attn"),
    },
    trainer_class=Seq2SeqTrainer,
    arguments_class=Seq2SeqTrainingArguments,
    unsupported=_UNSUPPORTED,
)
