"""The models that are trained for the benchmark: random weights of real widths, and data made in memory from a seed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import LlamaForCausalLM, Qwen2AudioForConditionalGeneration, WhisperForConditionalGeneration

from benchmarks.shapes import AUDIO_TOKENS, FRAMES, LABELS, llama_config, qwen2_audio_config, whisper_config

Sample = dict[str, Tensor]
DISTINCT = 8
_ENDLESS = 1 << 20
_TEXT = 64
_VOCABULARY, _SHORT_VOCABULARY = 32_000, 8_000
_AUDIO_TOKEN = _VOCABULARY - 1
_BATCH = ("idle", "sampled", "passes", "returned", "by-hand")
"""What a model is measured with a second time, in a batch: enough to see how the cost grows with it."""


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
        pairs: Pairs at least: of idle and of sampled steps, and of every other contender.
        short: Whether its steps are so short that hundreds of pairs are to be had.
        small: Whether it is of the size that the targets speak of.
        audio: Whether it hears audio, so that counterfactual passes have something to change.
        only: The contenders that it is measured with; all where none are named.
    """

    name: str
    title: str
    build: Callable[[str], nn.Module]
    sample: Callable[[torch.Generator], Sample]
    batch: tuple[int, int]
    share: float
    pairs: tuple[int, int]
    short: bool = False
    small: bool = False
    audio: bool = True
    only: tuple[str, ...] = ()

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


def whisper(size: str) -> Callable[[str], nn.Module]:
    """Return what builds a Whisper of a released size."""
    return lambda attention: WhisperForConditionalGeneration(whisper_config(size, attention=attention))


def whisper_sample(generator: torch.Generator) -> Sample:
    """Return the log-mel features (80, 3000) of one clip, and 64 labels."""
    features = torch.randn(80, FRAMES, generator=generator)
    return {"input_features": features, "labels": torch.randint(0, LABELS, (_TEXT,), generator=generator)}


def qwen2_audio(attention: str) -> nn.Module:
    """Return a Qwen2-Audio with the released encoder's width and half the language model's, and two layers in each."""
    config = qwen2_audio_config(vocabulary=_VOCABULARY, hears=1280, width=2048, layers=2, audio_token=_AUDIO_TOKEN, attention=attention)
    return Qwen2AudioForConditionalGeneration(config)


def qwen2_audio_sample(generator: torch.Generator) -> Sample:
    """Return one clip (128, 3000), its 750 placeholders and 64 tokens of text (814,), which alone are labelled."""
    text = torch.randint(1, _AUDIO_TOKEN, (_TEXT,), generator=generator)
    ids = torch.cat([torch.full((AUDIO_TOKENS,), _AUDIO_TOKEN), text])
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "labels": torch.cat([torch.full((AUDIO_TOKENS,), -100), text]),
        "input_features": torch.randn(128, FRAMES, generator=generator),
        "feature_attention_mask": torch.ones(FRAMES, dtype=torch.long),
    }


def llama(*, vocabulary: int, width: int, layers: int) -> Callable[[str], nn.Module]:
    """Return what builds a Llama."""
    return lambda attention: LlamaForCausalLM(llama_config(vocabulary=vocabulary, width=width, layers=layers, attention=attention))


def text_sample(generator: torch.Generator, *, vocabulary: int, tokens: int) -> Sample:
    """Return tokens, all of them labelled."""
    ids = torch.randint(0, vocabulary, (tokens,), generator=generator)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}


SUBJECTS = (
    Subject("tiny", "Whisper, tiny's shape", whisper("tiny"), whisper_sample, (1, 16), 0.25, (24, 6)),
    Subject("tiny-8", "Whisper, tiny's shape, 8 clips", whisper("tiny"), whisper_sample, (8, 64), 0.1, (6, 2), only=_BATCH),
    Subject("base", "Whisper, base's shape", whisper("base"), whisper_sample, (1, 16), 0.08, (16, 4)),
    Subject("small", "Whisper, small's shape", whisper("small"), whisper_sample, (1, 8), 0.15, (24, 3), small=True),
    Subject("qwen2_audio", "Qwen2-Audio's layout, 2 + 2 layers", qwen2_audio, qwen2_audio_sample, (1, 4), 0.11, (8, 3)),
    Subject(
        name="llama",
        title="Llama, 4 layers of 768",
        build=llama(vocabulary=_VOCABULARY, width=768, layers=4),
        sample=partial(text_sample, vocabulary=_VOCABULARY, tokens=512),
        batch=(1, 16),
        share=0.15,
        pairs=(24, 6),
        audio=False,
    ),
    Subject(
        name="short",
        title="Llama, 2 layers of 512, short steps",
        build=llama(vocabulary=_SHORT_VOCABULARY, width=512, layers=2),
        sample=partial(text_sample, vocabulary=_SHORT_VOCABULARY, tokens=128),
        batch=(1, 1),
        share=0.26,
        pairs=(2000, 12),
        short=True,
        audio=False,
    ),
)
