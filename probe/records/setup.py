"""What is known of a run before its first step, from model, tokenizer and training arguments."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Setup:
    """Facts of one ``train()`` call that do not change while it runs. ``None``: not known.

    Attributes:
        model_class: Class name of the core model.
        encoder_decoder: Decoder and encoder are joined by cross-attention.
        vocabulary: Rows of the input embedding.
        tokenizer_size: Highest id of the tokenizer, plus 1.
        added_tokens: Tokens that were added to the tokenizer beyond its base vocabulary.
        embedding_trains: The input embedding (or an adapter of it) requires a gradient.
        ties_head: The config says that head and input embedding share their weight.
        head_is_tied: They do.
        mel_bins: Mel bins that the audio encoder takes.
        codebooks: Codebooks of discrete audio; 0 without.
        dropout: Largest dropout probability that the config names.
        adapters: Adapter layers (LoRA and its like).
        max_steps: Steps that this training will take.
        warmup_steps: Of these, steps of warm-up.
        accumulation: Micro-batches a step.
        max_grad_norm: Where gradients are clipped; 0 where they are not.
        ranks: Processes.
    """

    model_class: str = ""
    encoder_decoder: bool = False
    vocabulary: int | None = None
    tokenizer_size: int | None = None
    added_tokens: int | None = None
    embedding_trains: bool | None = None
    ties_head: bool | None = None
    head_is_tied: bool | None = None
    mel_bins: int | None = None
    codebooks: int = 0
    dropout: float | None = None
    adapters: int = 0
    max_steps: int | None = None
    warmup_steps: int | None = None
    accumulation: int = 1
    max_grad_norm: float | None = None
    ranks: int = 1
