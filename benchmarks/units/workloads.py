"""Models with random weights and a batch for each: Whisper by size, a wide-vocabulary Llama, Qwen2-Audio's layout."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import LlamaForCausalLM, Qwen2AudioForConditionalGeneration, WhisperForConditionalGeneration

from benchmarks.shapes import AUDIO_TOKENS, FRAMES, LABELS, llama_config, qwen2_audio_config, whisper_config

AUDIO_TOKEN = 1


@dataclass(frozen=True)
class Workload:
    """A model and its batch; ``make`` gives them anew, with the same weights every time."""

    name: str
    make: Callable[[], tuple[nn.Module, dict[str, Tensor]]]


def whisper(size: str, *, clips: int, tokens: int = 64, layers: int | None = None) -> Workload:
    """Return a Whisper with clips of 30 s and the real vocabulary."""

    def make() -> tuple[nn.Module, dict[str, Tensor]]:
        torch.manual_seed(0)
        model = WhisperForConditionalGeneration(whisper_config(size, layers=layers))
        features = torch.randn(clips, model.config.num_mel_bins, FRAMES)
        batch = {"input_features": features, "labels": torch.randint(0, LABELS, (clips, tokens))}
        return model, batch

    some = "" if layers is None else f", {layers}+{layers} of its layers"
    return Workload(f"Whisper {size}'s shape{some}, {clips} x 30 s", make)


def llama(*, vocabulary: int, rows: int, tokens: int, width: int = 512, layers: int = 2) -> Workload:
    """Return a Llama-like model of any vocabulary."""

    def make() -> tuple[nn.Module, dict[str, Tensor]]:
        torch.manual_seed(0)
        config = llama_config(vocabulary=vocabulary, width=width, layers=layers)
        ids = torch.randint(0, min(vocabulary, 32_000), (rows, tokens))
        return LlamaForCausalLM(config), {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}

    return Workload(f"Llama, {layers} layers of {width}, vocabulary {vocabulary:,}, {rows} x {tokens} tokens", make)


def qwen2_audio(*, clips: int, tokens: int = 64, layers: int = 2) -> Workload:
    """Return Qwen2-Audio's layout and vocabulary at half its encoder's and a quarter of its language model's width, with few layers.

    A clip of 30 s is 750 placeholders among the tokens.
    """

    def make() -> tuple[nn.Module, dict[str, Tensor]]:
        torch.manual_seed(0)
        config = qwen2_audio_config(vocabulary=156_032, hears=640, width=1024, layers=layers, audio_token=AUDIO_TOKEN)
        ids = torch.randint(10, LABELS, (clips, AUDIO_TOKENS + tokens))
        ids[:, 8 : 8 + AUDIO_TOKENS] = AUDIO_TOKEN
        labels = ids.masked_fill(ids == AUDIO_TOKEN, -100)
        batch = {
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids),
            "labels": labels,
            "input_features": torch.randn(clips, config.audio_config.num_mel_bins, FRAMES),
            "feature_attention_mask": torch.ones(clips, FRAMES, dtype=torch.long),
        }
        return Qwen2AudioForConditionalGeneration(config), batch

    return Workload(f"Qwen2-Audio's layout, {layers}+{layers} layers, vocabulary 156,032, {clips} x 30 s", make)
