"""What went into the model in one step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True)
class InputTensor:
    """One input of the model by name, as the first micro-batch of the step held it on this rank.

    ``minimum``, ``maximum`` and ``mean`` are over all elements; ``first_values`` is filled for integer tensors only. ``note`` says
    what is odd about the content ("empty", "constant", "3 non-finite values"), or is "".
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    device: str
    minimum: float | None = None
    maximum: float | None = None
    mean: float | None = None
    first_values: tuple[int, ...] = ()
    note: str = ""


@dataclass(frozen=True, slots=True)
class AudioSegment:
    """A run of audio in one sample.

    ``start`` and ``length`` count in ``unit``: "tokens" are placeholder positions in ``input_ids``, "frames" are frames of the audio
    features. ``seconds`` is filled where a feature extractor tells the frame rate. ``note`` says what is odd ("empty", "constant"),
    or is "".
    """

    sample: int
    start: int
    length: int
    unit: Literal["tokens", "frames"]
    seconds: float | None = None
    note: str = ""


@dataclass(frozen=True, slots=True)
class InputSample:
    """The token ids of one sample of the first micro-batch, and their text.

    ``text`` and ``label_text`` keep special tokens visible and name an id that the tokenizer does not know by its position. They are
    ``None`` without a tokenizer, or with ``keep_text=False`` (then the ids are left out too).
    """

    index: int
    ids: tuple[int, ...] = ()
    text: str | None = None
    label_ids: tuple[int, ...] = ()
    label_text: str | None = None


@dataclass(frozen=True, slots=True)
class Inputs:
    """What went into the model in one step.

    ``padding_share``: share of token positions that the attention mask hides. ``labels_masked_share``: share of label positions that
    are -100. ``ids_outside_vocabulary``: token ids below 0 or not below the rows of the input embedding. All three are over all
    micro-batches and ranks; the tables are of this rank's first micro-batch.
    """

    micro_batches: int
    samples: int
    tensors: tuple[InputTensor, ...] = ()
    shown: tuple[InputSample, ...] = ()
    audio: tuple[AudioSegment, ...] = ()
    padding_share: float | None = None
    labels_masked_share: float | None = None
    ids_outside_vocabulary: int | None = None
    audio_clips: int | None = None
    audio_clips_constant: int | None = None
