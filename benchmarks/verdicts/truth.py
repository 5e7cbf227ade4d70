"""What the reference really does for a trained cloner: its loss with the reference changed by hand, on clips drawn for this.

Shapes: B samples, S tokens, K codebooks, V entries.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from clone_voice import IGNORED, CloningCollator, CloningDataset, VoiceCloner

SAMPLES = 128
"""At most."""
SILENCE = -1.5
"""What Whisper's feature extractor gives for a clip of zeros."""


@dataclass(frozen=True, slots=True)
class Truth:
    """Extra nats a token with the reference changed, and the standard error over samples; ``None`` without a reference."""

    swap: float
    swap_error: float
    silence: float
    reverse: float


def measure(model: VoiceCloner, data: CloningDataset, collator: CloningCollator, *, seed: int) -> Truth | None:
    """Return what the reference does, in float64 from full logits; the model is left in evaluation mode."""
    samples = min(SAMPLES, len(data))
    drawn = np.random.default_rng([seed, 11]).choice(len(data), samples, replace=False)
    batch = collator([data[index] for index in drawn])
    features = batch.pop("input_features", None)
    if features is None:
        return None
    model.eval()
    own_B = _loss(model, batch, features)
    swap_B = _loss(model, batch, torch.cat([features[1:], features[:1]])) - own_B
    silence_B = _loss(model, batch, torch.full_like(features, SILENCE)) - own_B
    reverse_B = _loss(model, batch, features.flip(-1)) - own_B
    error = swap_B.std().item() / samples**0.5
    return Truth(swap_B.mean().item(), error, silence_B.mean().item(), reverse_B.mean().item())


def _loss(model: VoiceCloner, batch: dict[str, Tensor], features: Tensor) -> Tensor:
    """Return the loss of each sample, (B,) float64, nats a token; all samples have equally many."""
    labels_BSK = batch["audio_labels"][:, 1:]
    with torch.no_grad():
        logits_BSKV = model(**batch, input_features=features).logits[:, :-1].double()
    loss_BSK = F.cross_entropy(logits_BSKV.flatten(0, 2), labels_BSK.flatten(), ignore_index=IGNORED, reduction="none").view(
        labels_BSK.shape
    )
    return loss_BSK.sum((1, 2)) / (labels_BSK != IGNORED).sum((1, 2))
