"""A case for audio that goes in as samples, not as log-mel features: a tiny Moonshine."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import torch
import transformers
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerFast

from models.case import Case, layer_names
from models.samples import IGNORED, Sample, Samples, integer, make_samples, pad_rows, words
from models.tokens import byte_tokenizer, encode

VOCABULARY, LAYERS = 288, 2
SPECIAL = ("<unk>", "<s>", "</s>")


@cache
def tokenizer() -> PreTrainedTokenizerFast:
    """Return the tokenizer; as in Moonshine, the end of a text pads."""
    return byte_tokenizer(SPECIAL, pad="</s>", bos="<s>", eos="</s>")


def build(seed: int) -> nn.Module:
    """Return the model."""
    _, start, end = (tokenizer().convert_tokens_to_ids(token) for token in SPECIAL)
    config = transformers.MoonshineConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=64,
        encoder_num_hidden_layers=LAYERS,
        decoder_num_hidden_layers=LAYERS,
        encoder_num_attention_heads=4,
        decoder_num_attention_heads=4,
        attention_dropout=0.1,
        max_position_embeddings=128,
        bos_token_id=start,
        decoder_start_token_id=start,
        eos_token_id=end,
        pad_token_id=end,
    )
    torch.manual_seed(seed)
    return transformers.MoonshineForConditionalGeneration(config)


def _sample(index: int, generator: torch.Generator) -> Sample:
    wave = 0.1 * torch.randn(160 * integer(generator, 60, 90), generator=generator)
    return {"input_values": wave, "labels": encode(tokenizer(), words(generator, 6, 12) + "</s>")}


def dataset(count: int, seed: int) -> Samples:
    """Return clips of 0.6 to 0.9 seconds with texts."""
    return make_samples(count, seed, _sample)


def collate(samples: Sequence[Sample]) -> dict[str, Tensor]:
    """Return ``input_values`` (B, samples) with their mask, and ``labels`` (B, S)."""
    waves = [sample["input_values"] for sample in samples]
    return {
        "input_values": pad_sequence(waves, batch_first=True),
        "attention_mask": pad_rows([[1] * len(wave) for wave in waves], 0),
        "labels": pad_rows([sample["labels"] for sample in samples], IGNORED),
    }


CASE = Case(
    name="moonshine",
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
    needs="MoonshineForConditionalGeneration",
)
