"""A byte-level tokenizer made on the spot: the 256 bytes, then the special tokens that a model asks for. No merges, no download."""

from __future__ import annotations

from collections.abc import Sequence

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast


def byte_tokenizer(special: Sequence[str], *, pad: str, bos: str, eos: str) -> PreTrainedTokenizerFast:
    """Return a tokenizer whose ids 0 to 255 are bytes and whose ids from 256 on are ``special``, in order.

    Args:
        special: The special tokens; ``pad``, ``bos`` and ``eos`` are among them.
        pad: The padding token.
        bos: The token that begins a text.
        eos: The token that ends a text.
    """
    bytes_in_order = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={character: index for index, character in enumerate(bytes_in_order)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=pad, bos_token=bos, eos_token=eos, clean_up_tokenization_spaces=False
    )


def encode(tokenizer: PreTrainedTokenizerFast, text: str) -> list[int]:
    """Return the ids of ``text``, special tokens in it recognised, none added."""
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])
