"""A crude audio codec: log-mel frames as discrete tokens of several codebooks, each of which quantises what the one before left over.

Residual vector quantisation, as in SoundStream and EnCodec, on the features themselves; there is no way back to a waveform.

Shapes: C clips, M mel bins, T feature frames, F token frames, K codebooks, N vectors, V entries of a codebook.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class VoiceCodec:
    """The codebooks.

    Attributes:
        entries_KVM: float64.
        stride: Feature frames that a token stands for; their mean is what is quantised.
    """

    entries_KVM: Floats
    stride: int

    def encode(self, features_MT: NDArray[np.float32]) -> NDArray[np.int64]:
        """Return the tokens of a clip, (F, K)."""
        left_FM = _pooled(features_MT, self.stride)
        tokens = []
        for entries_VM in self.entries_KVM:
            nearest_F = _nearest(left_FM, entries_VM)
            left_FM = left_FM - entries_VM[nearest_F]
            tokens.append(nearest_F)
        return np.stack(tokens, axis=1)


def fit_codec(clips: Sequence[NDArray[np.float32]], *, codebooks: int, entries: int, stride: int, seed: int = 0) -> VoiceCodec:
    """Fit the codebooks to clips of features (M, T), one after another, by k-means.

    Args:
        clips: At least ``entries`` token frames together.
        codebooks: K.
        entries: V.
        stride: Feature frames that a token stands for.
        seed: Of what the centres start from.
    """
    rng = np.random.default_rng(seed)
    left_NM = np.concatenate([_pooled(clip, stride) for clip in clips])
    books = []
    for _ in range(codebooks):
        books.append(_k_means(left_NM, entries, rng))
        left_NM = left_NM - books[-1][_nearest(left_NM, books[-1])]
    return VoiceCodec(np.stack(books), stride)


def _pooled(features_MT: NDArray[np.float32], stride: int) -> Floats:
    """Return the mean of every ``stride`` frames, (F, M)."""
    bins, frames = features_MT.shape
    return features_MT.astype(np.float64).reshape(bins, frames // stride, stride).mean(-1).T


def _k_means(vectors_NM: Floats, centres: int, rng: np.random.Generator, rounds: int = 25) -> Floats:
    """Return centres (V, M) after so many rounds of Lloyd's algorithm; a centre that lost all its vectors starts anew at a random one."""
    centres_VM = vectors_NM[rng.choice(len(vectors_NM), centres, replace=False)]
    for _ in range(rounds):
        nearest_N = _nearest(vectors_NM, centres_VM)
        counts_V = np.bincount(nearest_N, minlength=centres)
        sums_VM = np.zeros_like(centres_VM)
        np.add.at(sums_VM, nearest_N, vectors_NM)
        restart_VM = vectors_NM[rng.integers(len(vectors_NM), size=centres)]
        centres_VM = np.where(counts_V[:, None] > 0, sums_VM / np.maximum(counts_V, 1)[:, None], restart_VM)
    return centres_VM


def _nearest(vectors_NM: Floats, centres_VM: Floats) -> NDArray[np.int64]:
    """Return the index of the nearest centre of each vector, (N,)."""
    distance_NV = (centres_VM**2).sum(1) - 2.0 * vectors_NM @ centres_VM.T
    return distance_NV.argmin(1)
