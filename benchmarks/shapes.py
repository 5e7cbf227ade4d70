"""Configurations of real widths, for models with random weights: Whisper by size, Llama, Qwen2-Audio."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from transformers import LlamaConfig, Qwen2AudioConfig, Qwen2AudioEncoderConfig, Qwen2Config, WhisperConfig

FRAMES = 3000
"""Frames of a clip of 30 s."""
AUDIO_TOKENS = 750
"""Places of such a clip among Qwen2-Audio's tokens: a convolution of stride 2, and a pooling by 2."""
LABELS = 50_000
"""Whisper's ids below which all are text."""


@dataclass(frozen=True)
class WhisperShape:
    """Width, layers of encoder and decoder, heads and width of the feed-forward part."""

    width: int
    layers: int
    heads: int
    inner: int


# Source: the config.json files of openai/whisper-tiny, -base, -small on the Hugging Face hub.
WHISPER = {
    "tiny": WhisperShape(384, 4, 6, 1536),
    "base": WhisperShape(512, 6, 8, 2048),
    "small": WhisperShape(768, 12, 12, 3072),
}


def whisper_config(size: str, *, layers: int | None = None, attention: str = "sdpa") -> WhisperConfig:
    """Return the shape of a released Whisper with its vocabulary, with fewer layers if asked."""
    shape = WHISPER[size]
    count = shape.layers if layers is None else layers
    return WhisperConfig(
        d_model=shape.width,
        encoder_layers=count,
        decoder_layers=count,
        encoder_attention_heads=shape.heads,
        decoder_attention_heads=shape.heads,
        encoder_ffn_dim=shape.inner,
        decoder_ffn_dim=shape.inner,
        vocab_size=51_865,
        attn_implementation=attention,
    )


def llama_config(*, vocabulary: int, width: int, layers: int, attention: str = "sdpa") -> LlamaConfig:
    """Return a Llama with heads of 64 and a key for every two of them."""
    return LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=max(1, width // 64),
        num_key_value_heads=max(1, width // 128),
        attn_implementation=attention,
    )


def qwen2_audio_config(
    *, vocabulary: int, hears: int, width: int, layers: int, audio_token: int, attention: str = "sdpa"
) -> Qwen2AudioConfig:
    """Return Qwen2-Audio's layout: an encoder of width ``hears``, a language model of ``width``, the same number of layers in both."""
    chosen: dict[str, Any] = {"attn_implementation": attention}
    audio = Qwen2AudioEncoderConfig(
        d_model=hears, encoder_layers=layers, encoder_attention_heads=hears // 64, encoder_ffn_dim=4 * hears, **chosen
    )
    text = Qwen2Config(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=width * 43 // 16,  # 11,008 of 4,096, as in the released model
        num_hidden_layers=layers,
        num_attention_heads=16,
        num_key_value_heads=16,
        **chosen,
    )
    return Qwen2AudioConfig(
        audio_config=audio, text_config=text, audio_token_index=audio_token, pad_token_id=0, ignore_index=-100, **chosen
    )
