"""What kind of model a history is of: from the run's facts, or where there are none (no Trainer) from what was seen of it."""

from __future__ import annotations

from probe.findings.rule import History


def is_encoder_decoder(history: History) -> bool:
    """Say whether decoder and encoder are joined by cross-attention."""
    if history.setup is not None:
        return history.setup.encoder_decoder
    return any(layer.kind == "cross" for layer in history.last.attention)


def predicts_audio(history: History) -> bool:
    """Say whether the model writes audio tokens."""
    codebooks = history.setup is not None and history.setup.codebooks > 0
    return codebooks or any(head.modality == "audio" for head in history.last.heads)
