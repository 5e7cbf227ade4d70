"""The Qwen2-Audio case: a Whisper-like encoder pooled to a quarter of the frames, in front of a Qwen2 language model."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import torch
import transformers
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast

from models.case import Case, layer_names, transformers_major
from models.samples import Sample, Samples, clip_features, integer, make_samples, prompt_and_target, text_batch, words
from models.tokens import byte_tokenizer, encode

VOCABULARY, MELS, FRAMES, LAYERS = 288, 16, 100, 2
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|AUDIO|>", "<|audio_bos|>", "<|audio_eos|>")
# 4.46 knows one placeholder a clip and makes room for the frames itself: its logits are longer than input_ids and labels.
EXPANDS = transformers.__version__.startswith("4.46.")
_PREFIX = "model." if transformers_major() >= 5 else ""
_LANGUAGE_MODEL = "model.language_model" if transformers_major() >= 5 else "language_model.model"


@cache
def tokenizer() -> PreTrainedTokenizerFast:
    """Return the tokenizer."""
    return byte_tokenizer(SPECIAL, pad="<|endoftext|>", bos="<|im_start|>", eos="<|im_end|>")


def build(seed: int) -> nn.Module:
    """Return the model; grouped-query attention in the language model."""
    audio = transformers.Qwen2AudioEncoderConfig(
        num_mel_bins=MELS,
        d_model=32,
        encoder_layers=LAYERS,
        encoder_attention_heads=4,
        encoder_ffn_dim=64,
        encoder_layerdrop=0.2,
        dropout=0.1,
        attention_dropout=0.1,
        activation_dropout=0.1,
        max_source_positions=FRAMES // 2,
    )
    text = transformers.Qwen2Config(
        vocab_size=VOCABULARY,
        hidden_size=48,
        intermediate_size=96,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        attention_dropout=0.1,
        max_position_embeddings=256,
    )
    ids = {token: tokenizer().convert_tokens_to_ids(token) for token in SPECIAL}
    config = transformers.Qwen2AudioConfig(
        audio_config=audio,
        text_config=text,
        audio_token_index=ids["<|AUDIO|>"],
        pad_token_id=ids["<|endoftext|>"],
        ignore_index=-100,  # released configs have it, and 4.46 reads it
    )
    torch.manual_seed(seed)
    return transformers.Qwen2AudioForConditionalGeneration(config)


def frames_after(valid: int) -> int:
    """Return how many encoder frames ``valid`` mel frames become: a convolution of stride 2, then pooling by 2."""
    return ((valid - 1) // 2 + 1 - 2) // 2 + 1


def _sample(index: int, generator: torch.Generator) -> Sample:
    valid = [integer(generator, 50, 90) for _ in range(2 if index % 3 == 2 else 1)]
    clips = "".join(f"<|audio_bos|>{'<|AUDIO|>' * (1 if EXPANDS else frames_after(n))}<|audio_eos|>" for n in valid)
    prompt = encode(tokenizer(), f"<|im_start|>user\n{clips}{words(generator, 3, 8)}<|im_end|>\n<|im_start|>assistant\n")
    target = encode(tokenizer(), f"{words(generator, 6 + 5 * (index % 2), 12 + 5 * (index % 2))}<|im_end|>")
    features = torch.stack([clip_features(generator, MELS, FRAMES, n) for n in valid])
    mask = torch.stack([(torch.arange(FRAMES) < n).long() for n in valid])
    return {**prompt_and_target(prompt, target), "input_features": features, "feature_attention_mask": mask}


def dataset(count: int, seed: int) -> Samples:
    """Return samples of one clip each, every third of two; clips of 50 to 90 frames, padded to 100."""
    return make_samples(count, seed, _sample)


def collate(samples: Sequence[Sample]) -> dict[str, Tensor]:
    """Return padded ids, mask and labels (B, S), and the clips of all samples one after the other (clips, 16, 100) with their mask."""
    return {
        **text_batch(samples, tokenizer().pad_token_id),
        "input_features": torch.cat([sample["input_features"] for sample in samples]),
        "feature_attention_mask": torch.cat([sample["feature_attention_mask"] for sample in samples]),
    }


CASE = Case(
    name="qwen2_audio",
    build=build,
    dataset=dataset,
    collate=collate,
    tokenizer=tokenizer,
    vocabulary=VOCABULARY,
    shift=1,
    heads=("lm_head" if _PREFIX else "language_model.lm_head",),
    encoder=f"{_PREFIX}audio_tower",
    projector=f"{_PREFIX}multi_modal_projector",
    attention={"encoder": layer_names(f"{_PREFIX}audio_tower", LAYERS), "joint": layer_names(_LANGUAGE_MODEL, LAYERS)},
    needs="Qwen2AudioForConditionalGeneration",
    audio_token="<|AUDIO|>",
    unsupported={"bf16": "4.46 writes bf16 audio into float32 text embeddings and fails"} if EXPANDS else {},
)
