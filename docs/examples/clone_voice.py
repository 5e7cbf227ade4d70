"""An ordinary script that trains a small voice cloner with the Hugging Face Trainer, with one line added: ``probe.attach``.

    python clone_voice.py

The model hears a reference (one second of a speaker), reads what another utterance of that speaker is to say, and predicts the audio
tokens of that utterance. Nothing is downloaded: the speakers are synthetic (``voices.py``), the audio tokens come from a codec that is
fitted to them (``voice_codec.py``), the model is a Whisper encoder, a projector and a Llama, small and with random weights.

Shapes: B batch, T feature frames, R reference frames, S tokens, D width, K codebooks, V entries of a codebook.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import Dataset
from transformers import (
    LlamaConfig,
    LlamaModel,
    PretrainedConfig,
    PreTrainedModel,
    Trainer,
    TrainingArguments,
    WhisperConfig,
    WhisperFeatureExtractor,
    set_seed,
)
from transformers.modeling_outputs import CausalLMOutput
from transformers.models.whisper.modeling_whisper import WhisperEncoder

import probe
from voice_codec import fit_codec
from voices import BEATS, SAMPLE_RATE, SOUNDS, Utterance, random_reading, random_sounds, random_voice, say

IGNORED = -100
AUDIO_IN = len(SOUNDS)
AUDIO_OUT = AUDIO_IN + 1
VOCABULARY = AUDIO_OUT + 1
CODEBOOKS, ENTRIES = 2, 32
MEL_BINS, FRAMES = 80, 100


class VoiceClonerConfig(PretrainedConfig):
    """Sizes, and which tokens stand for the reference and for the audio to predict."""

    model_type = "voice_cloner"

    def __init__(self, width: int = 96, encoder_width: int = 64, layers: int = 2, **kwargs: Any) -> None:
        self.width = width
        self.encoder_width = encoder_width
        self.layers = layers
        self.vocab_size = VOCABULARY
        self.num_codebooks = CODEBOOKS
        self.codebook_size = ENTRIES
        self.audio_in_token_idx = AUDIO_IN
        self.audio_out_token_idx = AUDIO_OUT
        super().__init__(**kwargs)


class Projector(nn.Module):
    """From frames of the encoder to tokens of the decoder: so many frames side by side become one token."""

    def __init__(self, encoder_width: int, width: int, frames: int) -> None:
        super().__init__()
        self.frames = frames
        self.linear = nn.Linear(encoder_width * frames, width)

    def forward(self, encoded_BTD: Tensor) -> Tensor:
        """Return (B, R, D)."""
        samples, frames, width = encoded_BTD.shape
        return self.linear(encoded_BTD.reshape(samples, frames // self.frames, self.frames * width))


class VoiceCloner(PreTrainedModel):
    """Whisper encoder, projector, Llama over reference, text and audio tokens, and a head for all codebooks."""

    config_class = VoiceClonerConfig
    main_input_name = "input_ids"

    def __init__(self, config: VoiceClonerConfig) -> None:
        super().__init__(config)
        self.audio_tower = WhisperEncoder(
            WhisperConfig(
                d_model=config.encoder_width,
                encoder_layers=2,
                encoder_attention_heads=4,
                encoder_ffn_dim=4 * config.encoder_width,
                num_mel_bins=MEL_BINS,
                max_source_positions=FRAMES // 2,
            )
        )
        self.projector = Projector(config.encoder_width, config.width, FRAMES // 2 // BEATS)
        self.language_model = LlamaModel(
            LlamaConfig(
                vocab_size=config.vocab_size,
                hidden_size=config.width,
                intermediate_size=3 * config.width,
                num_hidden_layers=config.layers,
                num_attention_heads=4,
                num_key_value_heads=4,
                max_position_embeddings=64,
                pad_token_id=None,
            )
        )
        self.audio_embeddings = nn.Embedding(config.num_codebooks * config.codebook_size, config.width)
        self.audio_lm_head = nn.Linear(config.width, config.num_codebooks * config.codebook_size, bias=False)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """Return the embedding of the text tokens."""
        return self.language_model.embed_tokens

    def reference(self, input_features: Tensor) -> Tensor:
        """Return what the decoder is told of the reference, (B, R, D)."""
        return self.projector(self.audio_tower(input_features).last_hidden_state)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        input_features: Tensor | None = None,
        audio_codes: Tensor | None = None,
        audio_labels: Tensor | None = None,
    ) -> CausalLMOutput:
        """Predict the audio tokens.

        Args:
            input_ids: (B, S) tokens; ``AUDIO_IN`` stands for a frame of the reference, ``AUDIO_OUT`` for one of the target.
            attention_mask: (B, S), 0 at padding.
            input_features: (B, 80, T) log-mel features of the reference.
            audio_codes: (B, S, K) audio tokens, where ``input_ids`` has ``AUDIO_OUT``.
            audio_labels: (B, S, K) the same as labels, -100 everywhere else.
        """
        embeds_BSD = self.get_input_embeddings()(input_ids)
        if input_features is not None:
            reference_BRD = self.reference(input_features).to(embeds_BSD.dtype)
            embeds_BSD = embeds_BSD.masked_scatter((input_ids == AUDIO_IN).unsqueeze(-1), reference_BRD)
        if audio_codes is not None:
            offsets_K = ENTRIES * torch.arange(CODEBOOKS, device=audio_codes.device)
            codes_BSD = self.audio_embeddings(audio_codes + offsets_K).sum(2).to(embeds_BSD.dtype)
            embeds_BSD = torch.where((input_ids == AUDIO_OUT).unsqueeze(-1), embeds_BSD + codes_BSD, embeds_BSD)
        hidden_BSD = self.language_model(inputs_embeds=embeds_BSD, attention_mask=attention_mask, use_cache=False).last_hidden_state
        logits_BSKV = self.audio_lm_head(hidden_BSD).unflatten(-1, (CODEBOOKS, ENTRIES))
        loss = None
        if audio_labels is not None:
            loss = F.cross_entropy(logits_BSKV[:, :-1].float().flatten(0, 2), audio_labels[:, 1:].flatten(), ignore_index=IGNORED)
        return CausalLMOutput(loss=loss, logits=logits_BSKV)


@dataclass(frozen=True)
class Clip:
    """An utterance of a speaker: log-mel features (80, T) and audio tokens (F, K)."""

    speaker: int
    utterance: Utterance
    features: Tensor
    codes: Tensor


def spoken_clips(*, speakers: int, texts: int, seed: int) -> tuple[Clip, ...]:
    """Return so many texts read by each of so many speakers, speaker by speaker, and tokens of a codec fitted to all of them."""
    rng = np.random.default_rng(seed)
    extractor = WhisperFeatureExtractor(chunk_length=1, feature_size=MEL_BINS)
    sentences, voices = [random_sounds(rng) for _ in range(texts)], [random_voice(rng) for _ in range(speakers)]
    said = [(speaker, random_reading(sounds, rng)) for speaker in range(speakers) for sounds in sentences]
    waves = [say(utterance, voices[speaker], rng) for speaker, utterance in said]
    features = [extractor(wave, sampling_rate=SAMPLE_RATE, return_tensors="np").input_features[0] for wave in waves]
    codec = fit_codec(features, codebooks=CODEBOOKS, entries=ENTRIES, stride=FRAMES // BEATS)
    return tuple(
        Clip(speaker, utterance, torch.from_numpy(mel_MT), torch.from_numpy(codec.encode(mel_MT)))
        for (speaker, utterance), mel_MT in zip(said, features, strict=True)
    )


class CloningDataset(Dataset[tuple[Clip, Clip]]):
    """Pairs of reference and target: each clip as target, with each other clip of its speaker as reference."""

    def __init__(self, clips: Sequence[Clip]) -> None:
        self.clips = clips
        self.pairs = [
            (reference, target)
            for target in clips
            for reference in clips
            if reference.speaker == target.speaker and reference is not target
        ]

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> tuple[Clip, Clip]:
        return self.pairs[index]


@dataclass(frozen=True)
class CloningCollator:
    """Lays reference, text and audio tokens behind one another; all samples are equally long."""

    def __call__(self, pairs: Sequence[tuple[Clip, Clip]]) -> dict[str, Tensor]:
        text_BS = torch.tensor([[SOUNDS.index(sound) for sound in target.utterance.sounds] for _, target in pairs])
        samples = len(pairs)
        ids_BS = torch.cat([torch.full((samples, BEATS), AUDIO_IN), text_BS, torch.full((samples, BEATS), AUDIO_OUT)], dim=1)
        labels_BSK = torch.full((*ids_BS.shape, CODEBOOKS), IGNORED)
        labels_BSK[:, -BEATS:] = torch.stack([target.codes for _, target in pairs])
        return {
            "input_ids": ids_BS,
            "attention_mask": torch.ones_like(ids_BS),
            "input_features": torch.stack([reference.features for reference, _ in pairs]),
            "audio_codes": labels_BSK.clamp(min=0),
            "audio_labels": labels_BSK,
        }


def small_cloner(seed: int) -> VoiceCloner:
    """Build the model, of about 0.4 million weights, with the weights that the seed gives."""
    set_seed(seed)
    return VoiceCloner(VoiceClonerConfig())


def cloning_trainer(
    model: PreTrainedModel, clips: Dataset[Any], collator: CloningCollator, *, output_dir: Path, steps: int, seed: int, **arguments: Any
) -> Trainer:
    """Return an unmodified Trainer; ``arguments`` are of ``TrainingArguments`` and go before those that are set here."""
    chosen: dict[str, Any] = {
        "per_device_train_batch_size": 16,
        "learning_rate": 2e-3,
        "warmup_steps": min(30, steps // 4),
        "logging_steps": 50,
        "save_strategy": "no",
        "report_to": "none",
        "remove_unused_columns": False,  # the dataset has no columns, it has pairs of clips
        "dataloader_pin_memory": torch.cuda.is_available(),
        **arguments,
    }
    settings = TrainingArguments(output_dir=str(output_dir), max_steps=steps, seed=seed, **chosen)
    return Trainer(model=model, args=settings, train_dataset=clips, data_collator=collator)


def main() -> None:
    """Read the arguments, have the speakers speak, train."""
    args = parse_arguments()
    clips = spoken_clips(speakers=args.speakers, texts=args.texts, seed=args.seed)
    model = small_cloner(args.seed)
    print(f"Data: {len(clips)} clips of {args.speakers} synthetic speakers. Model: {model.num_parameters() / 1e6:.1f} million weights.")

    probe.attach(model, every=args.every)  # <-- the one line added

    trainer = cloning_trainer(model, CloningDataset(clips), CloningCollator(), output_dir=args.output_dir, steps=args.steps, seed=args.seed)
    trainer.train()


def parse_arguments() -> argparse.Namespace:
    """Return what the command line asks for."""
    parser = argparse.ArgumentParser(description="Train a small voice cloner on synthetic speakers, watched by probe.")
    parser.add_argument("--output-dir", type=Path, default=Path("cloner-output"), help="where the Trainer writes (default: cloner-output)")
    parser.add_argument("--speakers", type=int, default=48, help="how many speakers (default: 48)")
    parser.add_argument("--texts", type=int, default=12, help="how many texts each of them reads (default: 12)")
    parser.add_argument("--steps", type=int, default=800, help="optimizer steps (default: 800)")
    parser.add_argument("--every", type=int, default=40, help="look at step 1 and every so many steps (default: 40)")
    parser.add_argument("--seed", type=int, default=0, help="seed of everything (default: 0)")
    return parser.parse_args()


if __name__ == "__main__":
    main()
