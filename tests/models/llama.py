"""The Llama case: text only, padded batches, the prompt not learnt."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from models.case import Case, layer_names
from models.samples import Sample, Samples, make_samples, prompt_and_target, text_batch, words
from models.tokens import byte_tokenizer, encode

VOCABULARY, LAYERS = 288, 2
SPECIAL = ("<pad>", "<s>", "</s>")


@cache
def tokenizer() -> PreTrainedTokenizerFast:
    """Return the tokenizer."""
    return byte_tokenizer(SPECIAL, pad="<pad>", bos="<s>", eos="</s>")


def build(seed: int) -> LlamaForCausalLM:
    """Return the model; attention dropout is the only dropout that Llama has."""
    pad, bos, eos = (tokenizer().convert_tokens_to_ids(token) for token in SPECIAL)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        attention_dropout=0.1,
        max_position_embeddings=128,
        pad_token_id=pad,
        bos_token_id=bos,
        eos_token_id=eos,
    )
    torch.manual_seed(seed)
    return LlamaForCausalLM(config)


def _sample(index: int, generator: torch.Generator) -> Sample:
    prompt = encode(tokenizer(), f"<s>{words(generator, 4, 8)}: ")
    return prompt_and_target(prompt, encode(tokenizer(), f"{words(generator, 6 + 7 * (index % 2), 10 + 7 * (index % 2))}</s>"))


def dataset(count: int, seed: int) -> Samples:
    """Return samples of a prompt of 4 to 8 characters and a target of 6 to 17."""
    return make_samples(count, seed, _sample)


def collate(samples: Sequence[Sample]) -> dict[str, Tensor]:
    """Return padded ids, mask and labels (B, S)."""
    return text_batch(samples, tokenizer().pad_token_id)


CASE = Case(
    name="llama",
    build=build,
    dataset=dataset,
    collate=collate,
    tokenizer=tokenizer,
    vocabulary=VOCABULARY,
    shift=1,
    heads=("lm_head",),
    attention={"decoder": layer_names("model", LAYERS)},
)
