"""A model of the kind this project grew out of: a wrapper round a Whisper-like encoder and a decoder that expands its sequence.

Our own code for tests; it imitates what is hard about such models, not their numbers.

Shapes: B samples, L tokens, S expanded positions, D width, V text vocabulary, K codebooks, C ids a codebook, A audio-out frames.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PretrainedConfig, PreTrainedModel
from transformers.utils import ModelOutput

from models.original_expansion import IGNORED, AudioIn, AudioTokens, Expanded, expand
from models.original_layers import AudioTower, DecoderLayer

HEADS, DROPOUT = 4, 0.1


class OriginalConfig(PretrainedConfig):
    """The sizes, and the names by which such configs call their audio tokens."""

    model_type = "original_audio"

    def __init__(self, vocab_size: int = 288, audio_in_token_idx: int = 260, audio_out_token_idx: int = 261, **kwargs: Any) -> None:
        self.vocab_size = vocab_size
        self.audio_in_token_idx = audio_in_token_idx
        self.audio_out_token_idx = audio_out_token_idx
        self.hidden_size = 32
        self.num_hidden_layers = 2
        self.num_attention_heads = HEADS
        self.audio_dual_ffn_layers = [1]
        self.num_mel_bins = 16
        self.mel_frames = 100
        self.encoder_width = 24
        self.audio_num_codebooks = 3
        self.audio_codebook_size = 32
        self.audio_stream_bos_id = 32
        self.audio_stream_eos_id = 33
        super().__init__(**kwargs)


@dataclass
class OriginalOutput(ModelOutput):
    """What the model returns: losses, logits (B, S, V), audio logits (A, K, C), and the expanded sequence (B, S) with its masks."""

    loss: Tensor | None = None
    llm_loss: Tensor | None = None
    logits: Tensor | None = None
    audio_logits: Tensor | None = None
    expanded_input_ids: Tensor | None = None
    expanded_labels: Tensor | None = None
    audio_in_mask: Tensor | None = None
    audio_in_discrete_codes_mask: Tensor | None = None
    audio_out_mask: Tensor | None = None
    attention_mask: Tensor | None = None


class AudioProjector(nn.Module):
    """From the encoder's width to the decoder's."""

    def __init__(self, encoder_width: int, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(encoder_width, width)

    def forward(self, audio_features: Tensor) -> Tensor:
        """Return (N, T, D)."""
        return self.linear(audio_features)


class DecoderProjector(nn.Module):
    """The two LM heads. The audio head is called twice, and only its last result counts."""

    def __init__(self, config: OriginalConfig) -> None:
        super().__init__()
        self.codebooks = config.audio_num_codebooks
        self.text_lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.audio_lm_head = nn.Linear(config.hidden_size, self.codebooks * (config.audio_codebook_size + 2), bias=False)

    def forward(self, unnormed: Tensor, hidden_states: Tensor, audio_out_mask: Tensor) -> tuple[Tensor, Tensor]:
        """Return text logits (B, S, V) and audio logits (A, K, C)."""
        logits = self.text_lm_head(hidden_states)
        self.audio_lm_head(unnormed[audio_out_mask])  # of the right shape, of other values, and thrown away
        audio_logits = self.audio_lm_head(hidden_states[audio_out_mask])
        return logits, audio_logits.unflatten(-1, (self.codebooks, -1))


class OriginalModel(PreTrainedModel):
    """Encoder, decoder with separate feed-forwards for audio-out in some layers, two heads."""

    config_class = OriginalConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True

    def __init__(self, config: OriginalConfig) -> None:
        super().__init__(config)
        width = config.hidden_size
        self.embed_tokens = nn.Embedding(config.vocab_size, width)
        self.audio_tower = AudioTower(config.num_mel_bins, config.mel_frames, config.encoder_width, HEADS, 2, DROPOUT)
        self.audio_encoder_proj = AudioProjector(config.encoder_width, width)
        self.audio_codebook_embeddings = nn.Embedding(config.audio_num_codebooks * (config.audio_codebook_size + 2), width)
        self.layers = nn.ModuleList(
            DecoderLayer(width, HEADS, DROPOUT, dual=layer in config.audio_dual_ffn_layers) for layer in range(config.num_hidden_layers)
        )
        self.norm = nn.LayerNorm(width)
        self.audio_decoder_proj = DecoderProjector(config)
        self.gradient_checkpointing = False
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, (nn.Linear, nn.Embedding, nn.Conv1d)):
            nn.init.normal_(module.weight, std=0.1)

    def get_input_embeddings(self) -> nn.Module:
        """Return the text embedding."""
        return self.embed_tokens

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        audio_features: Tensor,
        audio_feature_attention_mask: Tensor,
        audio_in_ids: Tensor,
        audio_in_ids_start: Tensor,
        audio_out_ids: Tensor,
        audio_out_ids_start: Tensor,
        label_ids: Tensor | None = None,
        label_audio_ids: Tensor | None = None,
    ) -> OriginalOutput:
        """Run the model.

        Args:
            input_ids: (B, L), one ``<|AUDIO|>`` for each clip and one ``<|AUDIO_OUT|>`` for each segment of audio out.
            attention_mask: (B, L).
            audio_features: (clips, mels, frames); no clip is (0, mels, frames).
            audio_feature_attention_mask: (clips, frames).
            audio_in_ids: Codes of the clips one after the other, (K, frames).
            audio_in_ids_start: Where each clip's codes begin, (clips,).
            audio_out_ids: Codes of the audio-out segments one after the other, (K, A).
            audio_out_ids_start: Where each segment begins, (segments,).
            label_ids: (B, L).
            label_audio_ids: (K, A).
        """
        frames = self._encode(audio_features, audio_feature_attention_mask)
        codes_in = self._embed_codes(audio_in_ids, audio_in_ids_start)
        expanded = expand(
            AudioTokens(self.config.audio_in_token_idx, self.config.audio_out_token_idx, pad=self.config.pad_token_id or 0),
            input_ids=input_ids,
            attention_mask=attention_mask,
            labels=torch.full_like(input_ids, IGNORED) if label_ids is None else label_ids,
            text_embeds=self.embed_tokens(input_ids),
            audio_in=[AudioIn(*pair) for pair in zip(frames, codes_in, strict=True)],
            audio_out=self._embed_codes(audio_out_ids, audio_out_ids_start),
        )
        unnormed = self._decode(expanded)
        logits, audio_logits = self.audio_decoder_proj(unnormed, self.norm(unnormed), expanded.audio_out_mask)
        llm_loss = None if label_ids is None else _cross_entropy(logits[:, :-1].flatten(0, 1), expanded.labels[:, 1:].flatten())
        loss = llm_loss
        if llm_loss is not None and label_audio_ids is not None:
            loss = llm_loss + _audio_loss(audio_logits, label_audio_ids)
        return OriginalOutput(
            loss=loss,
            llm_loss=llm_loss,
            logits=logits,
            audio_logits=audio_logits,
            expanded_input_ids=expanded.input_ids,
            expanded_labels=None if label_ids is None else expanded.labels,
            audio_in_mask=expanded.audio_in_mask,
            audio_in_discrete_codes_mask=expanded.audio_in_discrete_codes_mask,
            audio_out_mask=expanded.audio_out_mask,
            attention_mask=expanded.attention_mask,
        )

    def _encode(self, audio_features: Tensor, audio_feature_attention_mask: Tensor) -> list[Tensor]:
        """Return the valid encoder frames of every clip, each (frames, D). The encoder runs on no clip, too."""
        encoded = self.audio_encoder_proj(self.audio_tower(audio_features, audio_feature_attention_mask))
        _, lengths = self.audio_tower.lengths(audio_feature_attention_mask.sum(-1))
        return [clip[:length] for clip, length in zip(encoded, lengths.tolist(), strict=True)]

    def _embed_codes(self, ids: Tensor, starts: Tensor) -> list[Tensor]:
        """Return the sum of the codebooks' embeddings of every segment, each (frames, D)."""
        if len(starts) == 0:
            return []
        offsets = torch.arange(ids.shape[0], device=ids.device) * (self.config.audio_codebook_size + 2)
        embedded = self.audio_codebook_embeddings(ids + offsets[:, None]).sum(0)
        return list(embedded.tensor_split(starts[1:].tolist()))

    def _decode(self, expanded: Expanded) -> Tensor:
        size = expanded.input_ids.shape[1]
        causal = torch.ones(size, size, dtype=torch.bool, device=expanded.input_ids.device).tril()
        mask = causal[None, None] & expanded.attention_mask[:, None, None].bool()
        hidden_states = expanded.inputs_embeds
        for layer in self.layers:
            if self.gradient_checkpointing and self.training:
                # Reentrant checkpointing takes no keyword arguments, hence the partial.
                run = partial(layer.__call__, audio_out_mask=expanded.audio_out_mask)
                hidden_states = self._gradient_checkpointing_func(run, hidden_states, mask)
            else:
                hidden_states = layer(hidden_states, mask, audio_out_mask=expanded.audio_out_mask)
        return hidden_states


class OriginalWrapper(nn.Module):
    """The plain module that the trainer sees; its signature names no argument."""

    def __init__(self, model: OriginalModel) -> None:
        super().__init__()
        self.model = model
        self.config = model.config

    def forward(self, **kwargs: Any) -> OriginalOutput:
        """Pass everything on."""
        return self.model(**kwargs)

    def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """Switch checkpointing on (transformers 4; 5.20 also says of how many layers)."""
        self.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=gradient_checkpointing_kwargs)

    def activation_checkpointing_enable(self, activation_checkpointing_kwargs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """Switch checkpointing on (transformers 5)."""
        self.model.activation_checkpointing_enable(activation_checkpointing_kwargs=activation_checkpointing_kwargs, **kwargs)


def _cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean over labelled rows, 0 if there is none."""
    return F.cross_entropy(logits.float(), labels, ignore_index=IGNORED, reduction="sum") / (labels != IGNORED).sum().clamp(min=1)


def _audio_loss(audio_logits: Tensor, label_audio_ids: Tensor) -> Tensor:
    """Mean over codebooks of the cross-entropy, shifted by one along the frames of all segments (a segment's first has no label)."""
    losses = [_cross_entropy(audio_logits[:-1, book], labels[1:]) for book, labels in enumerate(label_audio_ids)]
    return torch.stack(losses).mean()
