"""The models that are trained for the benchmark: random weights of real widths, and data made in memory from a seed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset
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

from benchmarks.overhead.pace import Pace

Sample = dict[str, Tensor]
DISTINCT = 8
_ENDLESS = 1 << 20
_WHISPER_FRAMES, _TEXT = 3000, 64
_AUDIO_TOKENS = 750  # 3000 frames, a convolution of stride 2, and a pooling by 2
_VOCABULARY = 32000
_AUDIO_TOKEN = _VOCABULARY - 1


@dataclass(frozen=True)
class Subject:
    """A model to train.

    Attributes:
        name: Its key on the command line.
        title: How the page calls it.
        build: Makes it with an attention implementation; draws the weights from torch's global generator.
        sample: Makes one sample from a generator.
        batch: Samples a step on a CPU, and on a GPU.
        share: Its part of the time that the whole benchmark has.
        pace: How long its steps are.
        small: Whether it is of the size that the targets speak of.
        audio: Whether it hears audio, so that counterfactual passes have something to change.
    """

    name: str
    title: str
    build: Callable[[str], nn.Module]
    sample: Callable[[torch.Generator], Sample]
    batch: tuple[int, int]
    share: float
    pace: Pace = Pace.LONG
    small: bool = False
    audio: bool = True

    def batch_size(self, device: str) -> int:
        """Return the number of samples a step on ``"cpu"`` or ``"cuda"``."""
        return self.batch[device != "cpu"]

    def model(self, *, seed: int, attention: str = "sdpa") -> nn.Module:
        """Return the model with the weights of a seed, whatever the attention implementation."""
        torch.manual_seed(seed)
        return self.build(attention)


class Samples(Dataset[Sample]):
    """A few samples over and over, so that no epoch ends while steps are timed."""

    def __init__(self, subject: Subject, *, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self._samples = [subject.sample(generator) for _ in range(DISTINCT)]

    def __len__(self) -> int:
        return _ENDLESS

    def __getitem__(self, index: int) -> Sample:
        return self._samples[index % DISTINCT]


def collate(samples: list[Sample]) -> Sample:
    """Stack samples of equal shapes."""
    return {key: torch.stack([sample[key] for sample in samples]) for key in samples[0]}


def whisper(width: int, layers: int, heads: int) -> Callable[[str], nn.Module]:
    """Return what builds a Whisper of this size, with the released vocabulary and 30 s clips."""

    def build(attention: str) -> nn.Module:
        config = WhisperConfig(
            d_model=width,
            encoder_layers=layers,
            decoder_layers=layers,
            encoder_attention_heads=heads,
            decoder_attention_heads=heads,
            encoder_ffn_dim=4 * width,
            decoder_ffn_dim=4 * width,
            vocab_size=51865,
            attn_implementation=attention,
        )
        return WhisperForConditionalGeneration(config)

    return build


def whisper_sample(generator: torch.Generator) -> Sample:
    """Return the log-mel features (80, 3000) of one clip, and 64 labels."""
    features = torch.randn(80, _WHISPER_FRAMES, generator=generator)
    return {"input_features": features, "labels": torch.randint(0, 50000, (_TEXT,), generator=generator)}


def qwen2_audio(attention: str) -> nn.Module:
    """Return a Qwen2-Audio of the released widths with two layers in the encoder and two in the language model."""
    audio = Qwen2AudioEncoderConfig(
        d_model=1280, encoder_layers=2, encoder_attention_heads=20, encoder_ffn_dim=5120, attn_implementation=attention
    )
    text = Qwen2Config(
        vocab_size=_VOCABULARY,
        hidden_size=2048,
        intermediate_size=5504,
        num_hidden_layers=2,
        num_attention_heads=16,
        num_key_value_heads=16,
        attn_implementation=attention,
    )
    config = Qwen2AudioConfig(
        audio_config=audio, text_config=text, audio_token_index=_AUDIO_TOKEN, pad_token_id=0, attn_implementation=attention
    )
    return Qwen2AudioForConditionalGeneration(config)


def qwen2_audio_sample(generator: torch.Generator) -> Sample:
    """Return one clip (128, 3000), its 750 placeholders and 64 tokens of text (814,), which alone are labelled."""
    text = torch.randint(1, _AUDIO_TOKEN, (_TEXT,), generator=generator)
    ids = torch.cat([torch.full((_AUDIO_TOKENS,), _AUDIO_TOKEN), text])
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "labels": torch.cat([torch.full((_AUDIO_TOKENS,), -100), text]),
        "input_features": torch.randn(128, _WHISPER_FRAMES, generator=generator),
        "feature_attention_mask": torch.ones(_WHISPER_FRAMES, dtype=torch.long),
    }


def llama(attention: str) -> nn.Module:
    """Return a Llama of four layers of 768."""
    config = LlamaConfig(
        vocab_size=_VOCABULARY,
        hidden_size=768,
        intermediate_size=2048,
        num_hidden_layers=4,
        num_attention_heads=12,
        num_key_value_heads=4,
        attn_implementation=attention,
    )
    return LlamaForCausalLM(config)


def llama_sample(generator: torch.Generator) -> Sample:
    """Return 256 tokens, all of them labelled."""
    ids = torch.randint(0, _VOCABULARY, (256,), generator=generator)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}


SUBJECTS = (
    Subject("tiny", "Whisper, tiny's shape", whisper(384, 4, 6), whisper_sample, (1, 16), 0.25, Pace.MIDDLING),
    Subject("base", "Whisper, base's shape", whisper(512, 6, 8), whisper_sample, (1, 16), 0.08),
    Subject("small", "Whisper, small's shape", whisper(768, 12, 12), whisper_sample, (1, 8), 0.15, small=True),
    Subject("qwen2_audio", "Qwen2-Audio's widths, 2 + 2 layers", qwen2_audio, qwen2_audio_sample, (1, 4), 0.11),
    Subject("llama", "Llama, 4 layers of 768", llama, llama_sample, (1, 16), 0.41, Pace.SHORT, audio=False),
)
