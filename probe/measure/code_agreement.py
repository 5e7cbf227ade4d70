"""Reference codes against target codes: whether a sample is given, as its reference, the very audio that it is to predict.

Nothing waits for the device. Temporaries: some ten int64 tensors of N, and the codes once.

Shapes: N frames, K codebooks, B samples.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

COLUMNS = ("compared", "matches")
_AGREE = 0.99


@dataclass(frozen=True, slots=True)
class CodeFrames:
    """Frames of discrete audio codes, segment by segment.

    Attributes:
        codes_NK: The codes, integers.
        segment_N: int64: the segment (a stretch of audio) of each frame, 0 … N - 1; a segment's frames lie side by side.
        sample_N: int64: the sample of each frame, 0 … B - 1, the same for all of a segment.
        labelled_N: bool: the frame has a label in at least one codebook.
        valid_N: bool: the frame is one, not what fills up a row.
        samples: B.
    """

    codes_NK: Tensor
    segment_N: Tensor
    sample_N: Tensor
    labelled_N: Tensor
    valid_N: Tensor
    samples: int


def reference_agreement(frames: CodeFrames) -> Tensor:
    """Count the samples whose reference could be compared with their target, and those whose codes agree.

    A segment without any label is a reference, one with labels a target. Compared are samples with one of each, frame by frame from the
    beginning of both to the end of the shorter, if that is more frames than codebooks (in a delay pattern the first K frames begin alike
    in all clips). They match when at least 99 % of these codes are equal. So a reference that is cut out of the target from its start
    on is found; one from the middle is not.

    Returns:
        float64 (2,), ``COLUMNS``.
    """
    count, books = frames.codes_NK.shape
    place_N = torch.arange(count, device=frames.codes_NK.device)
    segment_N = torch.where(frames.valid_N, frames.segment_N, count)  # what is no frame goes to a segment past the end
    lengths_G = _added(segment_N, torch.ones_like(segment_N), count + 1)
    starts_G = torch.full_like(lengths_G, count).scatter_reduce_(0, segment_N, place_N, "amin")
    targets_G = torch.zeros_like(lengths_G).scatter_reduce_(0, segment_N, frames.labelled_N.long(), "amax") != 0
    exists_G = lengths_G > 0
    exists_G[count] = False
    sample_G = torch.full_like(lengths_G, frames.samples).scatter_(0, segment_N, frames.sample_N)
    sample_G = torch.where(exists_G, sample_G, frames.samples)

    references_B = _added(sample_G, (exists_G & ~targets_G).long(), frames.samples + 1)
    pairs_B = (references_B == 1) & (_added(sample_G, (exists_G & targets_G).long(), frames.samples + 1) == 1)
    number_G = torch.arange(count + 1, device=place_N.device)
    reference_B = torch.zeros_like(references_B).scatter_reduce_(0, sample_G, torch.where(exists_G & ~targets_G, number_G, 0), "amax")

    sample_N = sample_G.gather(0, segment_N)
    reference_N = reference_B.gather(0, sample_N)
    offset_N = place_N - starts_G.gather(0, segment_N)
    in_both_N = targets_G.gather(0, segment_N) & pairs_B.gather(0, sample_N) & (offset_N < lengths_G.gather(0, reference_N))
    partner_N = (starts_G.gather(0, reference_N) + offset_N).clamp(max=count - 1)
    equal_N = (frames.codes_NK == frames.codes_NK.index_select(0, partner_N)).sum(1)

    shared_B = _added(sample_N, in_both_N.long(), frames.samples + 1)[:-1]
    agreed_B = _added(sample_N, torch.where(in_both_N, equal_N, 0), frames.samples + 1)[:-1]
    compared_B = shared_B > books
    return torch.stack([compared_B.sum(), (compared_B & (agreed_B >= _AGREE * books * shared_B)).sum()]).double()


def _added(slots: Tensor, values: Tensor, size: int) -> Tensor:
    """Return the sum of the values of each slot, int64 (size,)."""
    return torch.zeros(size, dtype=torch.int64, device=slots.device).scatter_add_(0, slots, values)
