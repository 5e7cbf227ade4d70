"""The layout of a model's sums, counted from the observers that would watch it, on the ``meta`` device where it takes no memory."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    Qwen2AudioConfig,
    Qwen2AudioEncoderConfig,
    Qwen2AudioForConditionalGeneration,
    Qwen2Config,
    WhisperConfig,
    WhisperForConditionalGeneration,
)

from probe.capture.observer import main_tensor
from probe.merge.layout import Layout
from probe.observation import Observation
from probe.settings import Options

ELEMENT_BYTES = 8  # float64


def observation_of(model: nn.Module) -> Observation:
    """Return the observation that ``attach`` with its defaults would begin; no hook is registered."""
    return Observation(model, Options(), attached=model, around=model, processors=[], say=print)


@dataclass(frozen=True)
class Columns:
    """What one model's step is packed into.

    Attributes:
        model: What it is.
        parameters: Of the model.
        sites: Sites that are watched.
        tensors: Parameter tensors.
        cells: Groups of columns.
        sums: Columns of the first all-reduce (sums and counts).
        maxima: Columns of the second.
    """

    model: str
    parameters: int
    sites: int
    tensors: int
    cells: int
    sums: int
    maxima: int

    @property
    def sum_bytes(self) -> int:
        """Bytes of the first all-reduce on each rank."""
        return self.sums * ELEMENT_BYTES

    @property
    def maximum_bytes(self) -> int:
        """Bytes of the second."""
        return self.maxima * ELEMENT_BYTES


def columns(name: str, model: nn.Module) -> Columns:
    """Count the columns of a model."""
    observation = observation_of(model)
    layout: Layout = observation._layout
    parameters = list(model.parameters())
    return Columns(
        name,
        sum(p.numel() for p in parameters),
        len(observation.discovery.sites.sites),
        len(parameters),
        len(layout.cells),
        layout.sums + layout.counts,
        layout.maxima,
    )


def whisper_large() -> nn.Module:
    """Return Whisper large-v3's shape, on the meta device."""
    config = WhisperConfig(
        d_model=1280, encoder_layers=32, decoder_layers=32, encoder_attention_heads=20, decoder_attention_heads=20,
        encoder_ffn_dim=5120, decoder_ffn_dim=5120, vocab_size=51_866, num_mel_bins=128,
    )  # fmt: skip
    with torch.device("meta"):
        return WhisperForConditionalGeneration(config)


def wide() -> nn.Module:
    """Return a language model of 70B: 80 layers of width 8,192, 64 heads on 8 key heads, vocabulary 128,256; on the meta device."""
    config = LlamaConfig(
        hidden_size=8192, intermediate_size=28_672, num_hidden_layers=80, num_attention_heads=64, num_key_value_heads=8,
        vocab_size=128_256, tie_word_embeddings=False,
    )  # fmt: skip
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def wide_with_whisper() -> nn.Module:
    """Return the same width behind Whisper-large's encoder, in Qwen2-Audio's layout; on the meta device."""
    audio = Qwen2AudioEncoderConfig(d_model=1280, encoder_layers=32, encoder_attention_heads=20, encoder_ffn_dim=5120, num_mel_bins=128)
    text = Qwen2Config(
        hidden_size=8192, intermediate_size=28_672, num_hidden_layers=80, num_attention_heads=64, num_key_value_heads=8,
        vocab_size=128_256, tie_word_embeddings=False,
    )  # fmt: skip
    with torch.device("meta"):
        return Qwen2AudioForConditionalGeneration(Qwen2AudioConfig(audio_config=audio, text_config=text, audio_token_index=128_000))


MODELS = {
    "Whisper large": whisper_large,
    "70B language model (80 layers, width 8,192, vocabulary 128,256)": wide,
    "the same behind Whisper large's encoder": wide_with_whisper,
}


@dataclass(frozen=True)
class Watched:
    """What one micro-batch of a rank gives the probe to read.

    Attributes:
        output_bytes: The outputs of all sites but the root, in bf16: what statistics read once.
        logits: Elements of the heads' logits.
        attention_calls: Calls of attention layers.
        forward_flops: Operations of the forward, multiplications and additions apart.
    """

    output_bytes: int
    logits: int
    attention_calls: int
    forward_flops: float


def watched(model: nn.Module, batch: dict[str, Tensor]) -> Watched:
    """Run a forward on the meta device, which has shapes and no data, and count what the sites return."""
    observation = observation_of(model)
    found = {"elements": 0, "logits": 0, "attention": 0}

    def count(role: str, output: object) -> None:
        tensor = main_tensor(output)
        elements = 0 if tensor is None else tensor.numel()
        found["elements"] += elements
        found["logits"] += elements if role == "lm_head" else 0
        found["attention"] += role == "attention"

    for site in observation.discovery.sites.sites:
        if site.role != "model":
            module = observation.discovery.modules[site.name]
            module.register_forward_hook(lambda _, __, output, role=site.role: count(role, output))
    with FlopCounterMode(display=False) as counter:
        model(**batch)
    return Watched(found["elements"] * torch.bfloat16.itemsize, found["logits"], found["attention"], counter.get_total_flops())


def text_batch(tokens: int) -> dict[str, Tensor]:
    """Return one sequence for the language model, on the meta device."""
    return {"input_ids": torch.zeros((1, tokens), dtype=torch.long, device="meta")}


def audio_batch(clips: int, tokens: int) -> dict[str, Tensor]:
    """Return clips of 30 s with their text for Whisper large, on the meta device."""
    ids = torch.zeros((clips, tokens), dtype=torch.long, device="meta")
    return {"input_features": torch.zeros((clips, 128, 3000), device="meta"), "decoder_input_ids": ids}
