"""Audio clips in a batch of features: how many frames carry sound, and whether a clip is constant."""

from __future__ import annotations

import torch
from torch import Tensor

COLUMNS = ("frames", "sounding", "constant")


def describe_clips(features: Tensor) -> Tensor:
    """Describe each clip of a batch.

    A frame of log-mel features is silent padding when it is constant over the mel bins: that is what Whisper's feature extractor
    makes of the zeros it appends (every bin at the clip's floor). ``sounding`` is the number of frames up to the last one that is
    not. A clip is ``constant`` when all its values are equal.

    Args:
        features: (B, mel, T) log-mel features, or (B, samples) waveforms (then a frame is a sample, silent when it equals the clip's
            last one).

    Returns:
        float64 (B, 3), one row a clip, columns as in ``COLUMNS``. Memory: two numbers a frame. Does not wait for the device.
    """
    frames = features.shape[-1]
    if features.numel() == 0:
        empty = torch.zeros(features.shape[0], len(COLUMNS), dtype=torch.float64, device=features.device)
        empty[:, 0] = frames
        return empty
    if features.dim() == 2:
        low, high = features.amin(-1), features.amax(-1)
        loud_BT = features != features[:, -1:]
    else:
        over = tuple(range(1, features.dim() - 1))
        low_BT, high_BT = features.amin(over), features.amax(over)  # several times as fast as aminmax along a dimension
        loud_BT = low_BT != high_BT
        low, high = low_BT.amin(-1), high_BT.amax(-1)
    position_T = torch.arange(1, frames + 1, device=features.device)
    sounding = torch.where(loud_BT, position_T, 0).amax(-1)
    return torch.stack([torch.full_like(sounding, frames), sounding, low == high], dim=1).double()
