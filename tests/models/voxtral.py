"""The Voxtral case: a Whisper encoder over chunks of fixed length, four frames to a token, in front of a Llama language model."""

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

VOCABULARY, MELS, FRAMES, LAYERS, WIDTH = 288, 16, 96, 2, 32
TOKENS_A_CHUNK = FRAMES // 8
SPECIAL = ("<pad>", "<s>", "</s>", "[INST]", "[/INST]", "[AUDIO]", "[BEGIN_AUDIO]")
_PREFIX = "model." if transformers_major() >= 5 else ""
_LANGUAGE_MODEL = "model.language_model" if transformers_major() >= 5 else "language_model.model"


@cache
def tokenizer() -> PreTrainedTokenizerFast:
    """Return the tokenizer."""
    return byte_tokenizer(SPECIAL, pad="<pad>", bos="<s>", eos="</s>")


def build(seed: int) -> nn.Module:
    """Return the model; the released encoder has no layerdrop, so there is none here."""
    audio = {
        "num_mel_bins": MELS,
        "hidden_size": WIDTH,
        "intermediate_size": 4 * WIDTH,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 4,
        "max_source_positions": FRAMES // 2,
        "attention_dropout": 0.1,
        "dropout": 0.1,
    }
    text = {
        "vocab_size": VOCABULARY,
        "hidden_size": 48,
        "intermediate_size": 96,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 12,
        "attention_dropout": 0.1,
        "max_position_embeddings": 256,
    }
    token = tokenizer().convert_tokens_to_ids("[AUDIO]")
    config = transformers.VoxtralConfig(
        audio_config=transformers.VoxtralEncoderConfig(**audio), text_config=transformers.LlamaConfig(**text), audio_token_id=token
    )
    torch.manual_seed(seed)
    model = transformers.VoxtralForConditionalGeneration(config)
    (model.model if _PREFIX else model).audio_tower.dropout = 0.1  # 4.57 leaves it at 0 whatever the config says
    return model


def _sample(index: int, generator: torch.Generator) -> Sample:
    valid = [FRAMES, integer(generator, 30, 80)] if index % 3 == 2 else [integer(generator, 50, 90)]
    placeholders = "[BEGIN_AUDIO]" + "[AUDIO]" * (TOKENS_A_CHUNK * len(valid))
    prompt = encode(tokenizer(), f"<s>[INST]{placeholders}{words(generator, 3, 8)}[/INST]")
    target = encode(tokenizer(), f"{words(generator, 6 + 5 * (index % 2), 12 + 5 * (index % 2))}</s>")
    features = torch.stack([clip_features(generator, MELS, FRAMES, n) for n in valid])
    return {**prompt_and_target(prompt, target), "input_features": features}


def dataset(count: int, seed: int) -> Samples:
    """Return samples of one chunk of 96 frames each, every third of two, with 12 audio tokens a chunk."""
    return make_samples(count, seed, _sample)


def collate(samples: Sequence[Sample]) -> dict[str, Tensor]:
    """Return padded ids, mask and labels (B, S), and the chunks of all samples one after the other (chunks, 16, 96)."""
    return {
        **text_batch(samples, tokenizer().pad_token_id),
        "input_features": torch.cat([sample["input_features"] for sample in samples]),
    }


CASE = Case(
    name="voxtral",
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
    needs="VoxtralForConditionalGeneration",
    audio_token="[AUDIO]",
    unsupported={} if _PREFIX else {"bf16": "4.57 scatters bf16 audio into float32 text embeddings and fails"},
)
