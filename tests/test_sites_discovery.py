"""Discovery: every role of every model, through every wrapper, one site a module, and a reason for each role without one."""

from __future__ import annotations

import copy
import pickle
from collections import Counter
from types import SimpleNamespace

import peft
import pytest
import torch
import transformers
from torch import nn

import models
from models.case import Case
from probe.errors import ProbeTypeError, SiteError
from probe.sites.discovery import Discovery, discover


def names(found: Discovery, role: str) -> list[str]:
    return [site.name for site in found.sites if site.role == role]


def roles(found: Discovery) -> set[tuple[object, ...]]:
    return {(site.name, site.role, site.kind, site.modality, site.codebooks) for site in found.sites}


@pytest.mark.parametrize("case", models.available_cases(), ids=lambda case: case.name)
def test_every_role_of_every_model(case: Case) -> None:
    """Encoder, projector, heads and feed-forward branches are those that the builders of the models name."""
    model = case.build(0)
    found = discover(model)
    assert names(found, "model") == [""]
    assert names(found, "audio_encoder") == [name for name in [case.encoder] if name]
    assert names(found, "projector") == [name for name in [case.projector] if name]
    assert sorted(names(found, "lm_head")) == sorted(case.heads)
    branches = {(f"{layer}.{key}", modality) for layer in case.dual_layers for key, modality in (("mlp", "text"), ("audio_mlp", "audio"))}
    assert {(site.name, site.modality) for site in found.sites.of("feed_forward")} == branches


@pytest.mark.parametrize("case", models.available_cases(), ids=lambda case: case.name)
def test_modules_are_those_of_the_names(case: Case) -> None:
    """Each site's module is the one that PyTorch knows by that name; no module has two sites; absent roles have a reason."""
    model = case.build(0)
    found = discover(model)
    assert {name: model.get_submodule(name) for name in found.modules} == dict(found.modules)
    assert [site.name for site in found.sites] == list(found.modules)
    assert max(Counter(map(id, found.modules.values())).values()) == 1
    for role in ("audio_encoder", "projector", "attention", "lm_head", "feed_forward"):
        assert bool(names(found, role)) != bool(found.sites.missing.get(role)), role


@pytest.mark.parametrize("case", models.available_cases(), ids=lambda case: case.name)
def test_discovery_leaves_nothing_behind(case: Case) -> None:
    """No hook, no attribute, no buffer is added to any module."""

    def state(model: nn.Module) -> list[tuple[str, list[str], int]]:
        hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks")
        return [(name, sorted(vars(module)), sum(len(getattr(module, hook)) for hook in hooks)) for name, module in model.named_modules()]

    model = case.build(0)
    before = state(model)
    discover(model)
    assert state(model) == before


class Wrapper(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.inner = model
        self.extra = nn.Linear(4, 4)


@pytest.mark.parametrize("case", models.available_cases(), ids=lambda case: case.name)
def test_a_wrapper_only_adds_its_prefix(case: Case) -> None:
    """Round any model a user's module changes the names by its prefix and nothing else."""
    plain, wrapped = discover(case.build(0)), discover(Wrapper(case.build(0)))
    expected = {(f"inner.{name}" if name else "", *rest) for name, *rest in roles(plain)}
    assert roles(wrapped) == expected
    assert wrapped.sites.missing == plain.sites.missing


@pytest.mark.parametrize("case", models.available_cases(), ids=lambda case: case.name)
def test_lora_changes_no_site(case: Case) -> None:
    """With LoRA on projections and a saved copy of a head the sites are the same; the head's module is the copy."""
    head = case.heads[-1].rpartition(".")[2]
    model = case.build(0)
    plain, original = discover(model), model.get_submodule(case.heads[-1])
    lora = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], modules_to_save=[head])
    if case.name == "original":  # PEFT wants a model with a config: it goes round the one inside the wrapper
        model.model = peft.get_peft_model(model.model, lora)
    else:
        model = peft.get_peft_model(model, lora)
    tuned = discover(model)
    assert roles(tuned) == roles(plain)
    assert tuned.modules[case.heads[-1]] is not original
    assert tuned.modules[case.heads[-1]].weight.shape == original.weight.shape
    assert tuned.modules[case.heads[-1]].weight.requires_grad
    assert not original.weight.requires_grad


def test_lora_on_the_head_keeps_the_head() -> None:
    """A LoRA layer in the head's place is the head."""
    model = models.CASES["llama"].build(0)
    found = discover(peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["lm_head"])))
    assert names(found, "lm_head") == ["lm_head"]
    assert found.modules["lm_head"] is model.lm_head
    assert isinstance(model.lm_head, peft.tuners.lora.LoraLayer)


def test_a_layer_that_fsdp2_renamed_is_found() -> None:
    """A class renamed on the fly does not hide the sites."""
    model = models.CASES["llama"].build(0)
    plain = roles(discover(model))
    for module in (model, *model.model.layers, *(layer.self_attn for layer in model.model.layers)):
        module.__class__ = type(f"FSDP{type(module).__name__}", (type(module),), {})
    assert roles(discover(model)) == plain


class Feed(nn.Module):
    def __init__(self, *names: str) -> None:
        super().__init__()
        for name in names:
            self.add_module(name, nn.Linear(4, 4))


class HandWritten(nn.Module):
    """A Whisper-like tower, a projector, dual feed-forward layers and two heads, of PyTorch's own classes only."""

    def __init__(self, config: object = None) -> None:
        super().__init__()
        if config is not None:
            self.config = config
        self.tower = nn.Module()
        self.tower.conv1, self.tower.conv2 = nn.Conv1d(8, 4, 3, padding=1), nn.Conv1d(4, 4, 3, padding=1)
        self.tower.layers = nn.ModuleList([Feed("q_proj", "k_proj")])
        self.audio_projection = nn.Linear(4, 4)
        self.blocks = nn.ModuleList([Feed("mlp"), Feed("mlp", "audio_mlp")])
        self.heads_of_audio = nn.ModuleDict({"text_lm_head": nn.Linear(4, 30), "audio_lm_head": nn.Linear(4, 3 * 12)})


@pytest.mark.parametrize(("config", "codebooks"), [(None, 1), (SimpleNamespace(audio_num_codebooks=3, audio_codebook_size=10), 3)])
def test_a_model_without_any_base_class(config: object, codebooks: int) -> None:
    """Structure finds the tower and the branches, names the projector and the heads; the parent's name says nothing of modality."""
    found = discover(HandWritten(config))
    assert names(found, "audio_encoder") == ["tower"]
    assert names(found, "projector") == ["audio_projection"]
    assert names(found, "attention") == ["tower.layers.0"]
    assert names(found, "feed_forward") == ["blocks.1.mlp", "blocks.1.audio_mlp"]
    heads = {site.name: (site.modality, site.codebooks) for site in found.sites.of("lm_head")}
    assert heads == {"heads_of_audio.text_lm_head": ("text", 0), "heads_of_audio.audio_lm_head": ("audio", codebooks)}


class Headed(nn.Module):
    """A model whose ``get_output_embeddings`` does as it is told."""

    def __init__(self, answer: str, rows: int = 40) -> None:
        super().__init__()
        self.config = SimpleNamespace(num_codebooks=4, codebook_size=10)
        self.embed_tokens = nn.Embedding(50, 4)
        self.out = nn.Linear(4, rows)
        self.answer = answer

    def get_output_embeddings(self) -> object:
        if self.answer == "raises":
            raise NotImplementedError
        return {"own": self.out, "none": None, "stranger": nn.Linear(4, 4), "embedding": self.embed_tokens, "number": 3}[self.answer]


@pytest.mark.parametrize("answer", ["raises", "none", "stranger", "embedding", "number"])
def test_output_embeddings_that_are_no_head(answer: str) -> None:
    """No method's answer breaks discovery: nothing, an error, a module of another model, an embedding of tokens."""
    found = discover(Headed(answer))
    assert names(found, "lm_head") == []
    assert "get_output_embeddings()" in found.sites.missing["lm_head"]


@pytest.mark.parametrize(("rows", "head"), [(40, ("audio", 4)), (50, ("text", 0)), (41, ("text", 0))])
def test_a_head_as_wide_as_all_codebooks_is_of_audio(rows: int, head: tuple[str, int]) -> None:
    """A head whose name tells nothing is one of audio codes when it is codebooks times their size wide."""
    (site,) = discover(Headed("own", rows)).sites.of("lm_head")
    assert (site.modality, site.codebooks) == head


def test_a_head_as_wide_as_the_vocabulary_is_of_text() -> None:
    """Where all codebooks together happen to be as many as words, the width tells nothing and the head is one of text."""
    model = Headed("own", 40)
    model.embed_tokens = nn.Embedding(40, 4)
    (site,) = discover(model).sites.of("lm_head")
    assert (site.modality, site.codebooks) == ("text", 0)


@pytest.mark.parametrize(("sibling", "found"), [("decoder", ["proj_out"]), ("model", ["proj_out"]), ("blocks", [])])
def test_proj_out_is_a_head_beside_the_model_that_feeds_it(sibling: str, found: list[str]) -> None:
    """Whisper's head has a name that diffusion blocks use too: it counts only beside ``model`` or ``decoder``."""
    model = Feed("proj_out", sibling)
    assert names(discover(model), "lm_head") == found


def test_heads_with_parts() -> None:
    """A sequence of layers is a head; of a head of a class of its own only what the model itself returns is."""
    model = Headed("own")
    model.text_lm_head = nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 50))
    model.lm_head = Feed("dense", "decoder")
    assert names(discover(model), "lm_head") == ["out", "text_lm_head"]


def wav2vec2() -> transformers.Wav2Vec2Config:
    return transformers.Wav2Vec2Config(
        vocab_size=20,
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=8,
        conv_dim=(8,),
        conv_stride=(2,),
        conv_kernel=(3,),
        num_feat_extract_layers=1,
        num_conv_pos_embeddings=4,
        num_conv_pos_embedding_groups=2,
    )


def test_an_encoder_inside_an_encoder_is_not_counted() -> None:
    """A pretrained encoder that is part of a tower belongs to the tower."""
    model = HandWritten()
    model.tower.semantic = transformers.Wav2Vec2Model(wav2vec2())
    assert names(discover(model), "audio_encoder") == ["tower"]
    model.speaker = transformers.Wav2Vec2Model(wav2vec2())
    assert names(discover(model), "audio_encoder") == ["tower", "speaker"]


def test_a_codec_is_not_an_encoder() -> None:
    """A model that quantizes turns audio into codes: it is named in the reason, and its own attention is not joint."""
    model = nn.Module()
    model.codec = transformers.MimiModel(
        transformers.MimiConfig(
            num_filters=4,
            hidden_size=8,
            upsampling_ratios=[2],
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=2,
            head_dim=4,
            intermediate_size=8,
            codebook_size=8,
            codebook_dim=4,
            vector_quantization_hidden_dimension=4,
            num_quantizers=2,
            num_semantic_quantizers=1,
            upsample_groups=8,
        )
    )
    model.llm = models.CASES["llama"].build(0)
    found = discover(model)
    assert names(found, "audio_encoder") == []
    assert "codec is an audio codec" in found.sites.missing["audio_encoder"]
    kinds = {site.name.split(".")[0]: site.kind for site in found.sites.of("attention")}
    assert kinds == {"codec": "encoder", "llm": "decoder"}


def test_ctc_heads_are_named_with_their_reason() -> None:
    """A CTC head is no site; it is reported under a key of its own and as the reason that there is no LM head."""
    found = discover(transformers.Wav2Vec2ForCTC(wav2vec2()))
    assert names(found, "lm_head") == []
    assert names(found, "audio_encoder") == ["wav2vec2"]
    assert "lm_head" in found.sites.missing["ctc_head"]
    assert "CTC" in found.sites.missing["lm_head"]


def test_reasons_say_what_was_looked_for() -> None:
    """Of a text model: no mel front end and no audio part in the config, hence no projector; of Whisper: cross-attention."""
    text = discover(models.CASES["llama"].build(0)).sites.missing
    assert text["audio_encoder"] == "no module with a mel front end (conv1 and conv2), and the config has no audio part"
    assert text["projector"] == "no audio encoder whose output a projector could take"
    whisper = discover(models.CASES["whisper"].build(0)).sites.missing
    assert whisper["projector"] == "encoder-decoder: cross-attention reads the encoder directly"
    bare = discover(nn.Linear(2, 2)).sites.missing
    assert bare.keys() == {"audio_encoder", "projector", "attention", "lm_head", "feed_forward"}


@pytest.mark.parametrize("tuned", [False, True], ids=["plain", "peft"])
def test_an_encoder_on_its_own_is_the_model(tuned: bool) -> None:
    """When the encoder itself is trained it is the root; the reason points there."""
    encoder = models.CASES["whisper"].build(0).model.encoder
    found = discover(peft.get_peft_model(encoder, peft.LoraConfig(r=2, target_modules=["q_proj"])) if tuned else encoder)
    assert found.facts.model_class == "WhisperEncoder"
    assert names(found, "audio_encoder") == []
    assert "itself" in found.sites.missing["audio_encoder"]
    assert {site.kind for site in found.sites.of("attention")} == {"encoder"}


def test_an_image_projector_is_not_taken_for_one_of_audio() -> None:
    """Without an audio encoder a module of a projector's name is none; beside an audio one, the audio one is taken."""
    model = models.CASES["llama"].build(0)
    model.multi_modal_projector = nn.Linear(4, 4)
    assert names(discover(model), "projector") == []
    joined = HandWritten()
    joined.multi_modal_projector = nn.Linear(4, 4)
    assert names(discover(joined), "projector") == ["audio_projection"]


def test_site_map_is_read_by_role_name_and_number() -> None:
    """``of``, ``[]``, iteration and length agree; a wrong name is answered with the nearest."""
    sites = discover(models.CASES["whisper"].build(0)).sites
    assert [site.name for site in sites.of("audio_encoder")] == ["model.encoder"]
    assert sites["model.encoder"] is sites.of("audio_encoder")[0]
    assert len(sites) == len(list(sites)) == len(sites.sites)
    with pytest.raises(SiteError, match=r"'model\.encodre'.*'model\.encoder'"):
        sites["model.encodre"]


def test_site_map_prints_as_a_table_and_holds_no_module() -> None:
    """The table has a line a site and a line a missing role; a map can be copied and pickled."""
    sites = discover(models.CASES["whisper"].build(0)).sites
    lines = str(sites).splitlines()
    assert repr(sites) == str(sites)
    assert lines[0].split() == ["role", "name", "kind", "found", "by"]
    assert len(lines) == 1 + len(sites) + len(sites.missing)
    row = next(line for line in lines if "encoder_attn" in line)
    assert row.split()[:3] == ["attention", "model.decoder.layers.0.encoder_attn", "cross"]
    assert any(line.startswith("not found: projector: encoder-decoder") for line in lines)
    assert pickle.loads(pickle.dumps(sites)) == copy.deepcopy(sites) == sites


def test_what_is_not_a_module_is_refused() -> None:
    """The error says what came instead."""
    with pytest.raises(ProbeTypeError, match="str"):
        discover("model")  # type: ignore[arg-type]


def test_no_tensor_is_touched() -> None:
    """Discovery works on a model without data (meta device)."""
    config = transformers.WhisperConfig(encoder_layers=1, decoder_layers=1, d_model=8, encoder_attention_heads=2, decoder_attention_heads=2)
    with torch.device("meta"):
        model = transformers.WhisperForConditionalGeneration(config)
    assert names(discover(model), "audio_encoder") == ["model.encoder"]
