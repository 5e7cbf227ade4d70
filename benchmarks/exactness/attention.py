"""Attention rows of every kernel against the weights of an eager copy of the model: kernel × mask × model."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import flex_attention
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    LlamaConfig,
    MistralConfig,
    PretrainedConfig,
    Qwen2AudioConfig,
    Qwen2AudioForConditionalGeneration,
    WhisperConfig,
    WhisperForConditionalGeneration,
)
from transformers.integrations import flex_attention as flex_integration

import flash_stand_in
from probe.capture.kernels import run_kernel
from probe.capture.tap import AttentionTap
from probe.foreign.attention_kernels import watched_kernels
from probe.measure.blocks import RowSource
from probe.measure.rows import choose_all_valid
from probe.sites.discovery import discover

ROWS = 64
SAMPLES = 2
KERNELS = {"eager": "eager", "sdpa": "sdpa", "flash (stand-in)": "flash_attention_2", "flex (not compiled)": "flex_attention"}
Batch = dict[str, Tensor]


@dataclass(frozen=True)
class AttentionRow:
    """The layers of one kind in one forward. ``difference`` is ``None`` where the model cannot run so; ``note`` says why."""

    model: str
    layers: str
    kernel: str
    mask: str
    shape: tuple[int, ...] = ()
    rows: int = 0
    difference: float | None = None
    note: str = ""


@dataclass(frozen=True)
class Subject:
    """A model to look at, and its batches by the name of their mask."""

    name: str
    build: Callable[[], nn.Module]
    batches: Callable[[], dict[str, Batch]]


@dataclass
class Seen:
    """What one layer's attention was: the rows that the probe gets, and which rows."""

    sources: int = 0
    p_BHRK: Tensor | None = None
    index_BR: Tensor | None = None
    problems: list[str] = field(default_factory=list)


def attention_rows() -> Iterator[AttentionRow]:
    """Run every model with every kernel and mask, and yield the largest difference by kind of layer."""
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        flash_stand_in.install(patch)
        patch.setattr(flex_integration, "compile_friendly_flex_attention", _flex)
        for subject in _subjects():
            for mask, batch in subject.batches().items():
                for label, kernel in KERNELS.items():
                    yield from _compared(subject, mask, batch, label, kernel)


def _flex(query: Tensor, key: Tensor, value: Tensor, training: bool = False, **options: Any) -> Any:
    """Run torch's own flex attention as it is: compiling it takes minutes on a CPU, and changes no argument."""
    return flex_attention(query, key, value, **options)


def _compared(subject: Subject, mask: str, batch: Batch, label: str, kernel: str) -> Iterator[AttentionRow]:
    torch.manual_seed(1)
    model = flash_stand_in.with_implementation(subject.build().eval(), kernel)
    eager = flash_stand_in.with_implementation(subject.build().eval(), "eager")
    eager.load_state_dict(model.state_dict())
    kinds = {site.name: site.kind or "" for site in discover(model).sites.of("attention")}
    try:
        seen = _rows_seen(model, kinds, batch)
    except Exception as error:  # of the model or the kernel: what it cannot do is said, not hidden
        yield AttentionRow(subject.name, "all", label, mask, note=f"the model cannot run so: {str(error).splitlines()[0][:80]}")
        return
    weights = _eager_weights(eager, kinds, batch)
    for kind in dict.fromkeys(kinds.values()):
        names = [name for name, other in kinds.items() if other == kind and name in weights]
        real_BS = (
            None
            if kind == "encoder"
            else next((batch[name] for name in batch if name in ("attention_mask", "decoder_attention_mask")), None)
        )
        yield _row(subject.name, kind, label, mask, {name: (seen[name], weights[name]) for name in names}, real_BS)


def _row(model: str, kind: str, label: str, mask: str, layers: dict[str, tuple[Seen, Tensor]], real_BS: Tensor | None) -> AttentionRow:
    worst, shape, rows = 0.0, (), 0
    for seen, weights_BHSK in layers.values():
        if seen.p_BHRK is None or seen.index_BR is None:
            return AttentionRow(model, kind, label, mask, note="; ".join(seen.problems) or "not seen")
        shape, index = tuple(weights_BHSK.shape), seen.index_BR[:, None, :, None]
        wanted = weights_BHSK.gather(2, index.expand(-1, shape[1], -1, shape[3])).float()
        # Kernels differ in what they compute at padding: it says nothing, and nobody is to look at it.
        real = torch.ones_like(wanted, dtype=torch.bool)
        if real_BS is not None:
            real &= real_BS.gather(1, seen.index_BR).bool()[:, None, :, None]
        worst = max(worst, float((wanted - seen.p_BHRK)[real].abs().max()))
        rows = seen.index_BR.numel()
    return AttentionRow(model, kind, label, mask, shape, rows, worst)


def _rows_seen(model: nn.Module, layers: dict[str, str], batch: Batch) -> dict[str, Seen]:
    """Return what the probe's own tap and kernel seam hand over in one forward."""
    seen = {name: Seen() for name in layers}
    taps: list[AttentionTap] = []
    handles = []
    for name, found in seen.items():
        module = model.get_submodule(name)
        handles.append(module.register_forward_pre_hook(lambda *_, found=found: taps.append(_entered(found))))
        handles.append(module.register_forward_hook(lambda *_: taps.pop().__exit__(None, None, None), always_call=True))
    try:
        with torch.no_grad(), watched_kernels([model.get_submodule(name) for name in layers], model, run_kernel):
            model(**batch, use_cache=False)  # with a cache, eager attention does not tell packed sequences apart
    finally:
        for handle in handles:
            handle.remove()
    return seen


def _entered(found: Seen) -> AttentionTap:
    def see(source: RowSource) -> None:
        samples, heads, queries, keys = source.shape
        choice = choose_all_valid(samples, queries, ROWS, source.device)
        found.index_BR, found.sources = choice.index_BR, found.sources + 1
        found.p_BHRK = torch.empty((samples, heads, choice.index_BR.shape[1], keys))
        for block in source.blocks(choice.index_BR):
            found.p_BHRK[block.samples, block.heads, block.rows] = block.p[..., :keys]

    tap = AttentionTap(see, lambda error: found.problems.append(str(error)))
    tap.__enter__()
    return tap


def _eager_weights(model: nn.Module, layers: dict[str, str], batch: Batch) -> dict[str, Tensor]:
    weights: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[..., None]:
        return lambda module, args, output: weights.update({name: output[1].detach()})

    handles = [model.get_submodule(name).register_forward_hook(keep(name)) for name in layers]
    with torch.no_grad():
        model(**batch, output_attentions=True, use_cache=False)
    for handle in handles:
        handle.remove()
    return weights


def _text(lengths: tuple[int, ...], *, left: bool, vocabulary: int) -> Batch:
    longest = max(lengths)
    place = torch.arange(longest)
    real = torch.stack([(place >= longest - n) if left else (place < n) for n in lengths])
    return {"input_ids": torch.randint(3, vocabulary, (len(lengths), longest)), "attention_mask": real.long()}


def _text_batches(length: int, vocabulary: int) -> dict[str, Batch]:
    torch.manual_seed(0)
    short = (length, length - length // 3)
    return {
        "none": _text((length, length), left=False, vocabulary=vocabulary),
        "padding right": _text(short, left=False, vocabulary=vocabulary),
        "padding left": _text(short, left=True, vocabulary=vocabulary),
    }


def _packed(length: int, vocabulary: int) -> Batch:
    """One row of three sequences, told by their positions."""
    thirds = (length // 2, length // 3, length - length // 2 - length // 3)
    positions = torch.cat([torch.arange(n) for n in thirds])[None]
    return {"input_ids": torch.randint(3, vocabulary, (1, length)), "position_ids": positions}


def _causal(config: type[PretrainedConfig], **more: object) -> Callable[[], nn.Module]:
    sizes = {"vocab_size": 500, "hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 2, "max_position_embeddings": 1024}
    return lambda: AutoModelForCausalLM.from_config(config(**{**sizes, **more}))


def _whisper() -> nn.Module:
    return WhisperForConditionalGeneration(
        WhisperConfig(
            vocab_size=500, d_model=192, encoder_layers=2, decoder_layers=2, encoder_attention_heads=6, decoder_attention_heads=6,
            encoder_ffn_dim=192, decoder_ffn_dim=192, pad_token_id=0, bos_token_id=0, eos_token_id=0, decoder_start_token_id=1,
        )
    )  # fmt: skip


def _whisper_batches() -> dict[str, Batch]:
    torch.manual_seed(0)
    tokens = _text((64, 48), left=False, vocabulary=500)
    features = torch.randn(SAMPLES, 80, 3000)
    plain = {"input_features": features, "decoder_input_ids": tokens["input_ids"]}
    return {"none": plain, "padding right": {**plain, "decoder_attention_mask": tokens["attention_mask"]}}


def _qwen2_audio() -> nn.Module:
    text = {"model_type": "qwen2", "vocab_size": 500, "hidden_size": 128, "intermediate_size": 128, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 8, "num_key_value_heads": 4, "max_position_embeddings": 1024}
    audio = {"model_type": "qwen2_audio_encoder", "d_model": 128, "encoder_layers": 2, "encoder_attention_heads": 8}
    sizes = {"encoder_ffn_dim": 128, "max_source_positions": 200}
    config = Qwen2AudioConfig(text_config={**text, **heads}, audio_config={**audio, **sizes}, audio_token_index=2)
    return Qwen2AudioForConditionalGeneration(config)


def _qwen2_audio_batches() -> dict[str, Batch]:
    torch.manual_seed(0)
    tokens = _text((190, 150), left=True, vocabulary=500)
    tokens["input_ids"][:, 60:160] = 2  # 100 frames a clip: 400 of the features, halved twice
    features = {"input_features": torch.randn(SAMPLES, 128, 400), "feature_attention_mask": torch.ones(SAMPLES, 400, dtype=torch.long)}
    return {"padding left": {**tokens, **features}}


def _subjects() -> list[Subject]:
    grouped = {"num_attention_heads": 8, "num_key_value_heads": 2}
    attends = {**grouped, "head_dim": 32}

    def packed_too() -> dict[str, Batch]:
        return {**_text_batches(384, 500), "packed": _packed(384, 500)}

    return [
        Subject("Whisper", _whisper, _whisper_batches),
        Subject("Llama (grouped heads)", _causal(LlamaConfig, **grouped), packed_too),
        Subject("Mistral (window of 64)", _causal(MistralConfig, sliding_window=64, **grouped), lambda: _text_batches(384, 500)),
        Subject("Gemma 2 (softcap, window of 64)", _causal(Gemma2Config, sliding_window=64, **attends), lambda: _text_batches(384, 500)),
        Subject("Qwen2-Audio", _qwen2_audio, _qwen2_audio_batches),
    ]
