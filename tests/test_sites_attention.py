"""Attention layers: exactly the modules in which a softmax over keys really runs, and what each attends over."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

import models
from models.case import Case
from probe.sites.attention import owns_projections
from probe.sites.discovery import discover

SCORES = (torch.softmax, F.softmax, Tensor.softmax, F.scaled_dot_product_attention)


class InnermostAtSoftmax(TorchFunctionMode):
    """Notes which module is innermost whenever attention probabilities are computed."""

    def __init__(self, stack: list[str]) -> None:
        super().__init__()
        self.stack, self.seen = stack, set[str]()

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function in SCORES:
            self.seen.add(self.stack[-1])
        return function(*args, **(kwargs or {}))


@contextmanager
def attention_that_runs(model: nn.Module) -> Iterator[set[str]]:
    """Collect the names of the modules in which attention is computed during the block, independently of any rule."""
    stack: list[str] = []
    handles = []
    for name, module in model.named_modules():
        handles.append(module.register_forward_pre_hook(lambda module, args, name=name: stack.append(name)))
        handles.append(module.register_forward_hook(lambda module, args, output: stack.__delitem__(-1)))
    with InnermostAtSoftmax(stack) as mode:
        yield mode.seen
    for handle in handles:
        handle.remove()


def found(model: nn.Module) -> dict[str, str]:
    return {site.name: str(site.kind) for site in discover(model).sites.of("attention")}


@pytest.mark.parametrize("case", models.available_cases(), ids=lambda case: case.name)
def test_found_layers_are_those_that_run(case: Case) -> None:
    """In a forward pass of every model the modules that compute attention are exactly the sites, no more, no less."""
    model = case.build(0).eval()
    samples = case.dataset(2, 0)
    batch = case.collate([samples[0], samples[1]])
    with torch.no_grad(), attention_that_runs(model) as ran:
        model(**{name: batch[name] for name in batch.keys()})  # noqa: SIM118 (one of the batches is no mapping)
    assert ran == found(model).keys()
    assert len(ran) == sum(map(len, case.attention.values()))


@pytest.mark.parametrize("case", models.available_cases(), ids=lambda case: case.name)
def test_kinds(case: Case) -> None:
    """Every layer of every model has the kind that the builders of the models say."""
    assert found(case.build(0)) == {name: kind for kind, names in case.attention.items() for name in names}


def _small(config: type, **sizes: Any) -> Any:
    return config(pad_token_id=0, bos_token_id=1, eos_token_id=2, vocab_size=40, attn_implementation="eager", **sizes)


def _whisper() -> nn.Module:
    return transformers.WhisperForConditionalGeneration(
        _small(
            transformers.WhisperConfig,
            **dict.fromkeys(("d_model", "encoder_ffn_dim", "decoder_ffn_dim", "num_mel_bins", "max_target_positions"), 8),
            **dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), 2),
            encoder_layers=3,
            decoder_layers=2,
            max_source_positions=10,
            decoder_start_token_id=1,
            begin_suppress_tokens=None,
        )
    )


def _bart() -> nn.Module:
    return transformers.BartForConditionalGeneration(
        _small(
            transformers.BartConfig,
            **dict.fromkeys(("d_model", "encoder_ffn_dim", "decoder_ffn_dim", "max_position_embeddings"), 16),
            **dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), 2),
            encoder_layers=2,
            decoder_layers=3,
            decoder_start_token_id=1,
            forced_eos_token_id=None,
        )
    )


def _t5() -> nn.Module:
    sizes = {"d_model": 8, "d_kv": 4, "d_ff": 8, "num_layers": 2, "num_decoder_layers": 3, "num_heads": 2, "decoder_start_token_id": 0}
    return transformers.T5ForConditionalGeneration(_small(transformers.T5Config, **sizes))


def _gpt2(**more: Any) -> nn.Module:
    return transformers.GPT2LMHeadModel(_small(transformers.GPT2Config, n_embd=8, n_layer=3, n_head=2, n_positions=16, **more))


def _llama() -> nn.Module:
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 3, "num_attention_heads": 2, "num_key_value_heads": 1}
    return transformers.LlamaForCausalLM(_small(transformers.LlamaConfig, **sizes))


def _bert() -> nn.Module:
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": 16}
    return transformers.BertForMaskedLM(_small(transformers.BertConfig, **sizes))


BUILDERS: dict[str, Callable[[], nn.Module]] = {
    "whisper": _whisper,
    "bart": _bart,
    "t5": _t5,
    "gpt2": _gpt2,
    "llama": _llama,
    "bert": _bert,
}


def _inputs(name: str) -> dict[str, Tensor]:
    ids = torch.randint(3, 40, (2, 6), generator=torch.Generator().manual_seed(len(name)))
    if name == "whisper":
        return {"input_features": torch.randn(2, 8, 20, generator=torch.Generator().manual_seed(1)), "labels": ids}
    return {"input_ids": ids, "labels": ids}


@pytest.mark.parametrize("name", BUILDERS)
def test_as_many_layers_as_eager_attentions(name: str) -> None:
    """With output_attentions and eager attention the model returns one tensor for every site, kind by kind."""
    model = BUILDERS[name]().eval()
    with torch.no_grad(), attention_that_runs(model) as ran:
        output = model(**_inputs(name), output_attentions=True)
    returned = {
        "encoder": len(output.get("encoder_attentions") or ()),
        "decoder": len(output.get("decoder_attentions") or output.get("attentions") or ()),
        "cross": len(output.get("cross_attentions") or ()),
    }
    kinds = found(model)
    assert Counter(kinds.values()) == Counter({kind: count for kind, count in returned.items() if count})
    assert kinds.keys() == ran


def test_gpt2_with_cross_attention() -> None:
    """Cross-attention added to a decoder-only class is told from self-attention; T5-like names are not needed."""
    kinds = Counter(found(_gpt2(add_cross_attention=True)).values())
    assert kinds == {"decoder": 3, "cross": 3}


class HandWrittenAttention(nn.Module):
    """Attention without a base class; ``joined`` decides how the projections are kept."""

    def __init__(self, names: tuple[str, ...]) -> None:
        super().__init__()
        for name in names:
            self.add_module(name, nn.Linear(4, 12 if len(names) == 1 else 4))


@pytest.mark.parametrize(
    "names",
    [
        ("q_proj", "k_proj", "v_proj"),
        ("qkv_proj",),
        ("c_attn",),
        ("query_key_value",),
        ("q", "k", "v"),
        ("query", "key", "value"),
        ("to_q", "to_kv"),
    ],
)
def test_projections_are_recognised(names: tuple[str, ...]) -> None:
    """Projections kept apart or joined, under the names in use."""
    assert owns_projections(HandWrittenAttention(names))


def test_values_or_queries_alone_are_no_attention() -> None:
    """One projection of the pair is not enough."""
    assert not owns_projections(HandWrittenAttention(("q_proj", "v_proj")))
    assert not owns_projections(nn.Linear(2, 2))


class FancySdpaAttention(nn.Module):
    """Known by its class name only."""

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden


class Block(nn.Module):
    """A layer with an attention module round one that owns projections, and one known by name only."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.Module()
        self.attention.core_attention = FancySdpaAttention()
        self.attention.query_key_value = nn.Linear(4, 12)
        self.other = FancySdpaAttention()
        self.torch_own = nn.MultiheadAttention(4, 2)


def test_nested_attention_counts_once() -> None:
    """The module that owns the projections counts, not its helper; torch's own attention and a class name are found."""
    assert found(Block()).keys() == {"attention", "other", "torch_own"}


class Layer(nn.Module):
    def __init__(self, *names: str) -> None:
        super().__init__()
        for name in names:
            self.add_module(name, HandWrittenAttention(("q_proj", "k_proj")))


class Tower(nn.Module):
    """A Whisper-like encoder without a base class."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv1d(8, 4, 3), nn.Conv1d(4, 4, 3)
        self.layers = nn.ModuleList([Layer("self_attn")])


class Joined(nn.Module):
    def __init__(self, *decoder: str, config: Any = None, tower: bool = True) -> None:
        super().__init__()
        if config is not None:
            self.config = config
        if tower:
            self.audio_tower = Tower()
        self.layers = nn.ModuleList([Layer(*decoder)])


def test_audio_in_the_sequence_makes_attention_joint() -> None:
    """An audio encoder, placeholders or codebooks put audio among the tokens of a decoder-only model; nothing of it does not."""
    assert found(Joined("self_attn")) == {"audio_tower.layers.0.self_attn": "encoder", "layers.0.self_attn": "joint"}
    assert found(Joined("self_attn", tower=False)) == {"layers.0.self_attn": "decoder"}
    assert found(Joined("self_attn", tower=False, config=SimpleNamespace(audio_token_id=3))) == {"layers.0.self_attn": "joint"}
    assert found(Joined("self_attn", tower=False, config=SimpleNamespace(num_codebooks=3))) == {"layers.0.self_attn": "joint"}


def test_a_decoder_that_reads_the_encoder_by_cross_attention_is_not_joint() -> None:
    """Without any config: cross-attention to the encoder means that audio is not among the tokens."""
    assert found(Joined("self_attn", "encoder_attn")) == {
        "audio_tower.layers.0.self_attn": "encoder",
        "layers.0.self_attn": "decoder",
        "layers.0.encoder_attn": "cross",
    }


def test_is_cross_attention_is_believed() -> None:
    """A module that says it is cross-attention is, whatever its name."""
    model = Joined("attn", "attn2")
    model.layers[0].attn2.is_cross_attention = True
    assert found(model)["layers.0.attn2"] == "cross"


class ReadCrossAttention(HandWrittenAttention):
    """Cross-attention by its class name."""


def test_a_class_named_cross_attention_is_believed() -> None:
    """The class name tells cross-attention where the attribute's name does not."""
    model = Joined("attn")
    model.layers[0].reader = ReadCrossAttention(("q_proj", "k_proj"))
    assert found(model)["layers.0.reader"] == "cross"
    assert found(model)["layers.0.attn"] == "decoder"


class Recorder:
    """The fields of transformers' OutputRecorder that matter."""

    def __init__(self, layer_name: str) -> None:
        self.target_class, self.layer_name, self.class_name = HandWrittenAttention, layer_name, None


class Mapped(transformers.PreTrainedModel):
    """A pretrained model whose own map is all that tells its cross-attention."""

    config_class = transformers.PretrainedConfig
    _can_record_outputs = {"attentions": Recorder("attn"), "cross_attentions": Recorder("reader")}  # noqa: RUF012

    def __init__(self) -> None:
        super().__init__(transformers.PretrainedConfig())
        self.layers = nn.ModuleList([Layer("attn", "reader")])


def test_the_models_own_map_tells_cross_attention() -> None:
    """What the model's map calls a cross-attention is one, also where a user's module stands round the model."""
    model = nn.Module()
    model.inner = Mapped()
    for prefix, each in (("", model.inner), ("inner.", model)):
        assert found(each) == {f"{prefix}layers.0.attn": "decoder", f"{prefix}layers.0.reader": "cross"}
        assert all("own map" in site.found_by for site in discover(each).sites.of("attention"))


def test_vision_is_not_joint() -> None:
    """An image tower beside an audio tower attends over images: its layers are those of an encoder, not of the joint sequence."""
    if not hasattr(transformers, "CLIPVisionModel"):
        pytest.skip("no CLIP")
    vision = transformers.CLIPVisionConfig(
        hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2, image_size=8, patch_size=4
    )
    model = Joined("self_attn")
    model.visual = transformers.CLIPVisionModel(vision)
    kinds = found(model)
    assert {kind for name, kind in kinds.items() if name.startswith("visual")} == {"encoder"}
    assert kinds["layers.0.self_attn"] == "joint"
