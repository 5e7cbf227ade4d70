"""The Higgs Audio v2 case: dual feed-forward decoder over text and audio codes, no encoder, a text head and an audio head."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import torch
import transformers
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast

from models.case import Case, layer_names
from models.samples import IGNORED, Sample, Samples, delayed_codes, integer, make_samples, pad_rows, text_batch, words
from models.tokens import byte_tokenizer, encode

VOCABULARY, LAYERS, CODEBOOKS, CODES = 288, 2, 4, 32
SPECIAL = ("<pad>", "<|begin_of_text|>", "<|eot_id|>", "<|audio_out_bos|>", "<|AUDIO_OUT|>", "<|audio_delay|>", "<|audio_eos|>")


@cache
def tokenizer() -> PreTrainedTokenizerFast:
    """Return the tokenizer."""
    return byte_tokenizer(SPECIAL, pad="<pad>", bos="<|begin_of_text|>", eos="<|eot_id|>")


def build(seed: int) -> nn.Module:
    """Return the model with its text head, which is there for training only."""
    ids = {token: tokenizer().convert_tokens_to_ids(token) for token in SPECIAL}
    config = transformers.HiggsAudioV2Config(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        attention_dropout=0.1,
        max_position_embeddings=256,
        num_codebooks=CODEBOOKS,
        codebook_size=CODES + 2,
        audio_stream_bos_id=CODES,
        audio_stream_eos_id=CODES + 1,
        audio_token_id=ids["<|AUDIO_OUT|>"],
        audio_delay_token_id=ids["<|audio_delay|>"],
        audio_bos_token_id=ids["<|audio_out_bos|>"],
        pad_token_id=ids["<pad>"],
        bos_token_id=ids["<|begin_of_text|>"],
        eos_token_id=ids["<|eot_id|>"],
    )
    torch.manual_seed(seed)
    return transformers.HiggsAudioV2ForConditionalGeneration(config, use_text_head=True)


def _segment(frames: int) -> str:
    return "<|audio_out_bos|>" + "<|AUDIO_OUT|>" * frames + "<|audio_delay|>" * (CODEBOOKS - 1) + "<|audio_eos|>"


def _sample(index: int, generator: torch.Generator) -> Sample:
    reference, target = integer(generator, 4, 6), integer(generator, 5 + 4 * (index % 2), 7 + 4 * (index % 2))
    prompt = encode(tokenizer(), f"<|begin_of_text|>{words(generator, 4, 8)}{_segment(reference)}{words(generator, 5, 9)}<|eot_id|>")
    answer = encode(tokenizer(), f"{words(generator, 2, 4)}{_segment(target)}<|eot_id|>")
    audio_tokens = {tokenizer().convert_tokens_to_ids(token) for token in ("<|AUDIO_OUT|>", "<|audio_delay|>")}
    reference_codes, _ = delayed_codes(generator, CODEBOOKS, CODES, reference)
    target_codes, target_labels = delayed_codes(generator, CODEBOOKS, CODES, target)
    return {
        "input_ids": prompt + answer,
        "labels": [IGNORED] * len(prompt) + [IGNORED if token in audio_tokens else token for token in answer],
        "audio_input_ids": torch.cat([reference_codes, target_codes]),
        "audio_labels": torch.cat([torch.full_like(reference_codes, IGNORED), target_labels]),
    }


def dataset(count: int, seed: int) -> Samples:
    """Return samples with a reference whose codes are not learnt, then a text and the audio to learn, in the delay pattern."""
    return make_samples(count, seed, _sample)


def collate(samples: Sequence[Sample]) -> dict[str, Tensor]:
    """Return padded ids, mask and labels (B, S), codes and audio labels (B, frames, 4) and which of those frames are real."""
    codes = [sample["audio_input_ids"] for sample in samples]
    return {
        **text_batch(samples, tokenizer().pad_token_id),
        "audio_input_ids": pad_rows(codes, CODES + 1),
        "audio_input_ids_mask": pad_rows([torch.ones(len(frames)) for frames in codes], 0).bool(),
        "audio_labels": pad_rows([sample["audio_labels"] for sample in samples], IGNORED),
    }


CASE = Case(
    name="higgs_audio_v2",
    build=build,
    dataset=dataset,
    collate=collate,
    tokenizer=tokenizer,
    vocabulary=VOCABULARY,
    shift=1,
    heads=("audio_lm_head", "text_lm_head"),
    attention={"joint": layer_names("model", LAYERS)},
    needs="HiggsAudioV2ForConditionalGeneration",
    dual_layers=tuple(f"model.layers.{layer}" for layer in range(LAYERS)),
    audio_token="<|AUDIO_OUT|>",
)
