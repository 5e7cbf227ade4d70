"""Models of real shapes with random weights and a batch for each: Whisper by size, a wide-vocabulary Llama, Qwen2-Audio's layout."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2AudioConfig,
    Qwen2AudioEncoderConfig,
    Qwen2AudioForConditionalGeneration,
    Qwen2Config,
    WhisperConfig,
    WhisperForConditionalGeneration,
)

WHISPER_VOCABULARY = 51_865
FRAMES, MELS = 3000, 80
AUDIO_TOKEN = 1


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


@dataclass(frozen=True)
class Workload:
    """A model and its batch; ``make`` gives them anew, with the same weights every time."""

    name: str
    make: Callable[[], tuple[nn.Module, dict[str, Tensor]]]


def whisper_config(size: str, *, layers: int | None = None) -> WhisperConfig:
    """Return the shape of a released Whisper, with fewer layers if asked."""
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
        vocab_size=WHISPER_VOCABULARY,
    )


def whisper(size: str, *, clips: int, tokens: int = 64, layers: int | None = None) -> Workload:
    """Return a Whisper with clips of 30 s and the real vocabulary."""

    def make() -> tuple[nn.Module, dict[str, Tensor]]:
        torch.manual_seed(0)
        model = WhisperForConditionalGeneration(whisper_config(size, layers=layers))
        batch = {"input_features": torch.randn(clips, MELS, FRAMES), "labels": torch.randint(0, 50_000, (clips, tokens))}
        return model, batch

    some = "" if layers is None else f", {layers}+{layers} of its layers"
    return Workload(f"Whisper {size}'s shape{some}, {clips} x 30 s", make)


def llama(*, vocabulary: int, rows: int, tokens: int, width: int = 512, layers: int = 2) -> Workload:
    """Return a Llama-like model of any vocabulary."""

    def make() -> tuple[nn.Module, dict[str, Tensor]]:
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=vocabulary,
            hidden_size=width,
            intermediate_size=4 * width,
            num_hidden_layers=layers,
            num_attention_heads=max(1, width // 64),
            num_key_value_heads=max(1, width // 128),
        )
        ids = torch.randint(0, min(vocabulary, 32_000), (rows, tokens))
        return LlamaForCausalLM(config), {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}

    return Workload(f"Llama, {layers} layers of {width}, vocabulary {vocabulary:,}, {rows} x {tokens} tokens", make)


def qwen2_audio(*, clips: int, tokens: int = 64, layers: int = 2) -> Workload:
    """Return Qwen2-Audio's layout and vocabulary at half its encoder's and a quarter of its language model's width, with few layers.

    A clip of 30 s is 750 placeholders among the tokens.
    """

    def make() -> tuple[nn.Module, dict[str, Tensor]]:
        torch.manual_seed(0)
        audio = Qwen2AudioEncoderConfig(d_model=640, encoder_layers=layers, encoder_attention_heads=10, encoder_ffn_dim=2560)
        text = Qwen2Config(
            vocab_size=156_032,
            hidden_size=1024,
            intermediate_size=2752,
            num_hidden_layers=layers,
            num_attention_heads=16,
            num_key_value_heads=16,
        )
        config = Qwen2AudioConfig(audio_config=audio, text_config=text, audio_token_index=AUDIO_TOKEN, pad_token_id=0, ignore_index=-100)
        ids = torch.randint(10, 50_000, (clips, 750 + tokens))
        ids[:, 8:758] = AUDIO_TOKEN
        labels = ids.masked_fill(ids == AUDIO_TOKEN, -100)
        batch = {
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids),
            "labels": labels,
            "input_features": torch.randn(clips, 128, FRAMES),
            "feature_attention_mask": torch.ones(clips, FRAMES, dtype=torch.long),
        }
        return Qwen2AudioForConditionalGeneration(config), batch

    return Workload(f"Qwen2-Audio's layout, {layers}+{layers} layers, vocabulary 156,032, {clips} x 30 s", make)
