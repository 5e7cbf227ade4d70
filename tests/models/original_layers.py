"""The layers of the original-style model: a Whisper-like encoder with attention by hand, and decoder layers with two feed-forwards.

Shapes: N clips, T audio frames, B samples, S expanded positions, H heads, D width, F width of one head.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class EncoderAttention(nn.Module):
    """Self-attention over frames, written out: scores, softmax, dropout, sum."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads, self.dropout, self.scaling = heads, dropout, (width // heads) ** -0.5
        self.q_proj = nn.Linear(width, width)
        self.k_proj = nn.Linear(width, width, bias=False)
        self.v_proj = nn.Linear(width, width)
        self.out_proj = nn.Linear(width, width)

    def forward(self, hidden_states: Tensor, attention_mask: Tensor) -> Tensor:
        """Attend over (N, T, D); ``attention_mask`` (N, 1, 1, T) bool, true where a key is real."""
        q_NHTF, k_NHTF, v_NHTF = (
            proj(hidden_states).unflatten(-1, (self.heads, -1)).transpose(1, 2) for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        scores = torch.matmul(q_NHTF * self.scaling, k_NHTF.transpose(-1, -2))
        scores = scores.masked_fill(~attention_mask, torch.finfo(scores.dtype).min)
        weights = F.dropout(F.softmax(scores, dim=-1), p=self.dropout, training=self.training)
        return self.out_proj(torch.matmul(weights, v_NHTF).transpose(1, 2).flatten(-2))


class EncoderLayer(nn.Module):
    """Pre-norm attention and feed-forward, with dropout."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.self_attn = EncoderAttention(width, heads, dropout)
        self.self_attn_layer_norm = nn.LayerNorm(width)
        self.fc1 = nn.Linear(width, 2 * width)
        self.fc2 = nn.Linear(2 * width, width)
        self.final_layer_norm = nn.LayerNorm(width)
        self.dropout = dropout

    def forward(self, hidden_states: Tensor, attention_mask: Tensor) -> Tensor:
        """Return (N, T, D)."""
        attended = self.self_attn(self.self_attn_layer_norm(hidden_states), attention_mask=attention_mask)
        hidden_states = hidden_states + F.dropout(attended, p=self.dropout, training=self.training)
        fed = self.fc2(F.gelu(self.fc1(self.final_layer_norm(hidden_states))))
        return hidden_states + F.dropout(fed, p=self.dropout, training=self.training)


class AudioTower(nn.Module):
    """Whisper-like encoder: two convolutions, layers that training may skip, pooling by two."""

    def __init__(self, mels: int, frames: int, width: int, heads: int, layers: int, dropout: float) -> None:
        super().__init__()
        self.conv1 = nn.Conv1d(mels, width, kernel_size=3, padding=1)
        self.conv2 = nn.Conv1d(width, width, kernel_size=3, stride=2, padding=1)
        self.embed_positions = nn.Embedding(frames // 2, width)
        self.embed_positions.requires_grad_(False)
        self.layers = nn.ModuleList(EncoderLayer(width, heads, dropout) for _ in range(layers))
        self.avg_pooler = nn.AvgPool1d(2, stride=2)
        self.layer_norm = nn.LayerNorm(width)
        self.dropout, self.layerdrop = dropout, 0.2
        self.gradient_checkpointing = False

    @staticmethod
    def lengths(valid_frames: Tensor) -> tuple[Tensor, Tensor]:
        """Return the frames after the convolutions and after pooling of clips with so many valid mel frames."""
        after_conv = (valid_frames - 1) // 2 + 1
        return after_conv, (after_conv - 2) // 2 + 1

    def forward(self, audio_features: Tensor, audio_feature_attention_mask: Tensor) -> Tensor:
        """Encode log-mel features (N, mels, frames), N may be 0, to (N, frames / 4, D)."""
        hidden_states = F.gelu(self.conv2(F.gelu(self.conv1(audio_features)))).transpose(1, 2)
        hidden_states = hidden_states + self.embed_positions.weight
        hidden_states = F.dropout(hidden_states, p=self.dropout, training=self.training)
        after_conv, _ = self.lengths(audio_feature_attention_mask.sum(-1))
        positions = torch.arange(hidden_states.shape[1], device=hidden_states.device)
        mask = (positions[None] < after_conv[:, None])[:, None, None]
        for layer in self.layers:
            if self.training and float(torch.rand([])) < self.layerdrop:
                continue
            if self.gradient_checkpointing and self.training:
                hidden_states = self._gradient_checkpointing_func(layer.__call__, hidden_states, mask)
            else:
                hidden_states = layer(hidden_states, mask)
        return self.layer_norm(self.avg_pooler(hidden_states.transpose(1, 2)).transpose(1, 2))


class DecoderAttention(nn.Module):
    """Causal attention with rotary positions and grouped keys that calls PyTorch's kernel itself."""

    def __init__(self, width: int, heads: int, groups: int, dropout: float) -> None:
        super().__init__()
        self.heads, self.groups, self.dropout = heads, groups, dropout
        self.q_proj = nn.Linear(width, width, bias=False)
        self.k_proj = nn.Linear(width, width * groups // heads, bias=False)
        self.v_proj = nn.Linear(width, width * groups // heads, bias=False)
        self.o_proj = nn.Linear(width, width, bias=False)

    def forward(self, hidden_states: Tensor, attention_mask: Tensor) -> Tensor:
        """Attend over (B, S, D); ``attention_mask`` (B, 1, S, S) bool, true where a key may be seen."""
        q_BHSF = _rotate(self.q_proj(hidden_states).unflatten(-1, (self.heads, -1)).transpose(1, 2))
        k_BHSF = _rotate(self.k_proj(hidden_states).unflatten(-1, (self.groups, -1)).transpose(1, 2))
        v_BHSF = self.v_proj(hidden_states).unflatten(-1, (self.groups, -1)).transpose(1, 2)
        repeats = self.heads // self.groups
        attended = F.scaled_dot_product_attention(
            q_BHSF,
            k_BHSF.repeat_interleave(repeats, 1),
            v_BHSF.repeat_interleave(repeats, 1),
            attn_mask=attention_mask,
            dropout_p=self.dropout if self.training else 0.0,
        )
        return self.o_proj(attended.transpose(1, 2).flatten(-2))


class FeedForward(nn.Module):
    """Gated feed-forward with dropout."""

    def __init__(self, width: int, dropout: float) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(width, 2 * width, bias=False)
        self.up_proj = nn.Linear(width, 2 * width, bias=False)
        self.down_proj = nn.Linear(2 * width, width, bias=False)
        self.dropout = dropout

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Return the shape that came."""
        fed = self.down_proj(F.silu(self.gate_proj(hidden_states)) * self.up_proj(hidden_states))
        return F.dropout(fed, p=self.dropout, training=self.training)


class DecoderLayer(nn.Module):
    """Attention over all positions, then ``mlp``; with ``dual``, audio-out positions go through ``audio_mlp`` and norms of their own."""

    def __init__(self, width: int, heads: int, dropout: float, *, dual: bool) -> None:
        super().__init__()
        self.dual = dual
        self.self_attn = DecoderAttention(width, heads, heads // 2, dropout)
        self.mlp = FeedForward(width, dropout)
        self.input_layernorm = nn.LayerNorm(width)
        self.post_attention_layernorm = nn.LayerNorm(width)
        if dual:
            self.audio_mlp = FeedForward(width, dropout)
            self.audio_input_layernorm = nn.LayerNorm(width)
            self.audio_post_attention_layernorm = nn.LayerNorm(width)

    def forward(self, hidden_states: Tensor, attention_mask: Tensor, *, audio_out_mask: Tensor) -> Tensor:
        """Return (B, S, D); ``audio_out_mask`` (B, S) bool."""
        normed = self.input_layernorm(hidden_states)
        if self.dual:
            normed = torch.where(audio_out_mask[..., None], self.audio_input_layernorm(hidden_states), normed)
        hidden_states = hidden_states + self.self_attn(normed, attention_mask=attention_mask)
        if not self.dual:
            return hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))
        update = torch.zeros_like(hidden_states)
        text = self.mlp(self.post_attention_layernorm(hidden_states[~audio_out_mask]))
        audio = self.audio_mlp(self.audio_post_attention_layernorm(hidden_states[audio_out_mask]))
        update[~audio_out_mask] = text.to(update.dtype)
        update[audio_out_mask] = audio.to(update.dtype)
        return hidden_states + update


def _rotate(x_BHSF: Tensor) -> Tensor:
    """Turn pairs of components by an angle that grows with the position. Source: RoFormer, arXiv:2104.09864, eq. 34."""
    half = x_BHSF.shape[-1] // 2
    frequencies = 10000.0 ** (-torch.arange(half, device=x_BHSF.device) / half)
    angles = torch.arange(x_BHSF.shape[-2], device=x_BHSF.device)[:, None] * frequencies
    first, second = x_BHSF[..., :half], x_BHSF[..., half:]
    cos, sin = angles.cos().to(x_BHSF.dtype), angles.sin().to(x_BHSF.dtype)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
