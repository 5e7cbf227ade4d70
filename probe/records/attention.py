"""What the layers attended to in one step, and which feed-forward branch tokens took."""

from __future__ import annotations

from dataclasses import dataclass

from probe.records.sites import AttentionKind


@dataclass(frozen=True, slots=True)
class HeadwiseAttention:
    """Per attention head of one layer, on this rank: one value a head, in order; empty where it was not measured. As in ``Attention``."""

    entropy: tuple[float, ...] = ()
    entropy_nats: tuple[float, ...] = ()
    top: tuple[float, ...] = ()
    effective_keys: tuple[float, ...] = ()
    first_token: tuple[float, ...] = ()
    padding: tuple[float, ...] = ()
    sink: tuple[float, ...] = ()
    band: tuple[float, ...] = ()
    distance: tuple[float, ...] = ()
    monotonicity: tuple[float, ...] = ()
    coverage: tuple[float, ...] = ()
    text_to_text: tuple[float, ...] = ()
    text_to_audio: tuple[float, ...] = ()
    text_to_reference: tuple[float, ...] = ()
    audio_to_text: tuple[float, ...] = ()
    audio_to_audio: tuple[float, ...] = ()
    audio_to_reference: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True)
class Attention:
    """One attention layer in one step, from its probabilities before dropout, for sampled query rows.

    ``how`` says where the probabilities came from ("materialised softmax", "recomputed from q and k"). ``rows`` is the number of
    (query, sample) pairs looked at; means are weighted by what each row stands for. ``entropy`` is relative to the logarithm of the
    number of visible keys (0 … 1). ``top`` is the largest probability of a row, ``effective_keys`` its 1 / Σp². ``first_token``,
    ``padding``, ``sink`` (a learned sink that is no key), ``band`` (the diagonal band) and the ``…_to_…`` values are probability masses;
    audio includes the reference. ``distance`` is the mean number of keys between query and key in self-attention. ``monotonicity``
    (-1 … 1) and ``coverage`` (0 … 1) are of text rows over audio keys. Definitions: :mod:`probe.catalogue`.
    """

    site: str
    kind: AttentionKind
    how: str
    calls: int
    heads: int = 0
    keys: int = 0
    rows: int = 0
    entropy: float | None = None
    entropy_nats: float | None = None
    top: float | None = None
    effective_keys: float | None = None
    first_token: float | None = None
    padding: float | None = None
    sink: float | None = None
    band: float | None = None
    distance: float | None = None
    monotonicity: float | None = None
    coverage: float | None = None
    text_to_text: float | None = None
    text_to_audio: float | None = None
    text_to_reference: float | None = None
    audio_to_text: float | None = None
    audio_to_audio: float | None = None
    audio_to_reference: float | None = None
    per_head: HeadwiseAttention | None = None


@dataclass(frozen=True, slots=True)
class Branches:
    """One decoder layer with separate feed-forward branches for text and audio: how many tokens each received."""

    layer: str
    text_tokens: int
    audio_tokens: int
