from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from probe.records import AttentionKind, Site
from probe.sites.audio_masks import audio_masks, cover_everything, cover_of, mask_takers, names_audio_mask
from probe.sites.names import module_names

OF_TOKENS = (
    "audio_token_mask audio_out_mask audio_in_mask audio_in_discrete_codes_mask audio_discrete_codes_mask speech_mask audio_mask "
    "input_audio_mask special_audio_mask mask_audio_tokens"
)
OF_SOMETHING_ELSE = (
    "audio_attention_mask audio_input_ids_mask audio_feature_attention_mask audio_mel_mask audio_features_mask audio_codes_mask "
    "audio_prompt_latents_mask audio_latents_mask attention_mask image_mask audio_ids mask speech_labels_mask audio_mask_from_encoder "
    "audio_frame_mask cache_audio_discrete_codes_mask audio_padding_mask"
)


@pytest.mark.parametrize("name", OF_TOKENS.split())
def test_masks_of_tokens_by_name(name: str) -> None:
    """Names under which models and collators hand round masks of the tokens that are audio."""
    assert names_audio_mask(name)


@pytest.mark.parametrize("name", OF_SOMETHING_ELSE.split())
def test_masks_of_something_else_by_name(name: str) -> None:
    """Masks over frames, features, codes, latents and labels are not over tokens, whatever their shape may be."""
    assert not names_audio_mask(name)


def test_only_masks_of_the_tokens_shape_count() -> None:
    """Bool and integer (B, S) tensors of one shape; no floats, no other shapes, no lists."""
    mask = torch.ones(2, 5, dtype=torch.bool)
    given = {
        "audio_token_mask": mask,
        "audio_out_mask": mask.long(),
        "speech_mask": mask.float(),
        "audio_in_mask": torch.ones(2, 4, dtype=torch.bool),
        "audio_mask": torch.ones(2, 1, 5, dtype=torch.bool),
        "special_audio_mask": [[1]],
        "hidden_states": torch.zeros(2, 5),
    }
    assert list(audio_masks(given, (2, 5))) == ["audio_token_mask", "audio_out_mask"]
    assert list(audio_masks(given)) == ["audio_token_mask", "audio_out_mask"]
    assert list(audio_masks(given, (2, 4))) == ["audio_in_mask"]
    assert not audio_masks({"audio_mask": given["audio_mask"]})


def test_what_masks_cover() -> None:
    """A mask of one side is the whole only where there is no other side; one of given codes alone never is."""
    covers = {"audio_in_mask": "given", "audio_out_mask": "predicted", "audio_token_mask": "all", "input_audio_mask": "all"}
    assert {name: cover_of(name) for name in covers} == covers
    assert cover_of("audio_prompt_mask") == "given"
    assert cover_everything(["audio_token_mask"], audio_is_given=True)
    assert cover_everything(["audio_in_mask", "audio_out_mask"], audio_is_given=True)
    assert cover_everything(["audio_out_mask"], audio_is_given=False)
    assert not cover_everything(["audio_out_mask"], audio_is_given=True)
    assert not cover_everything(["audio_in_discrete_codes_mask", "audio_out_mask"], audio_is_given=True)
    assert not cover_everything(["audio_in_mask"], audio_is_given=True)
    assert not cover_everything([], audio_is_given=False)


class Attention(nn.Module):
    """Takes no mask of audio."""

    def forward(self, hidden_states: Tensor, attention_mask: Tensor) -> Tensor:
        return hidden_states


class Telling(Attention):
    """Is told itself."""

    def forward(self, hidden_states: Tensor, attention_mask: Tensor, speech_mask: Tensor | None = None) -> Tensor:
        return hidden_states


class Layer(nn.Module):
    """Is told which token is audio, two levels above the attention."""

    def __init__(self, attention: nn.Module) -> None:
        super().__init__()
        self.inner = nn.ModuleDict({"self_attn": attention})

    def forward(self, hidden_states: Tensor, *, audio_token_mask: Tensor) -> Tensor:
        return hidden_states


class Stack(nn.Module):
    """Takes a mask itself, and hands it to its layers."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, audio_mask: Tensor) -> None:
        """Do nothing."""


def attention_site(name: str, kind: AttentionKind = "joint") -> Site:
    return Site(name, "attention", "test", kind=kind)


def test_who_is_given_a_mask() -> None:
    """The innermost module round (or at) each joint attention layer whose forward names such a mask; never the root."""
    model = Stack(Layer(Attention()), Layer(Telling()), Attention())
    sites = [attention_site(f"layers.{layer}.inner.self_attn") for layer in (0, 1)]
    names = module_names(model)
    assert mask_takers(names, sites) == ("layers.0", "layers.1.inner.self_attn")
    assert mask_takers(names, [attention_site("layers.2")]) == ()
    assert mask_takers(names, [attention_site("layers.0.inner.self_attn", "encoder"), Site("layers.0", "custom", "test")]) == ()
    outer = nn.ModuleDict({"decoder": model})
    assert mask_takers(module_names(outer), [attention_site("decoder.layers.2")]) == ("decoder",)
