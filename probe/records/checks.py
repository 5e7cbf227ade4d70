"""What a step's batch was checked for: labels against ids, audio features against their extractor, rows against each other."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class LabelChecks:
    """The text labels of one step against its token ids, over all micro-batches and ranks. Every number counts label positions.

    ``labelled``: positions that are not -100. Of these: ``on_padding`` lie where the attention mask is 0; ``padding_runs`` repeat the
    padding id right after a padding id; ``on_placeholders`` lie at audio placeholders of ``input_ids``; ``outside_vocabulary`` are not
    below the rows of the input embedding. ``compared`` are those that could be laid over token ids (decoder-only: ``input_ids``;
    encoder-decoder: ``decoder_input_ids``, where the next id is the meant one), and ``same``, ``next``, ``previous`` are those of them
    that equal the id at the same position, the one after it, the one before it. ``common_prefix``: the most labelled tokens that open
    every row of a micro-batch alike (of micro-batches with at least two rows that are not all equal), ``None`` without such.
    """

    labelled: int
    on_padding: int | None = None
    padding_runs: int | None = None
    on_placeholders: int | None = None
    outside_vocabulary: int | None = None
    compared: int = 0
    same: int = 0
    next: int = 0
    previous: int = 0
    common_prefix: int | None = None


@dataclass(frozen=True, slots=True)
class AudioChecks:
    """The audio features of one step, over all micro-batches and ranks. Counts are of clips unless said otherwise.

    ``kind``: "log-mel" features (B, mel, T) or a "waveform" (B, samples). ``nonfinite``: with a NaN or Inf; ``constant``: one value
    everywhere; ``silent``: nothing but the floor (log-mel), or below -70 dBFS (waveform); ``clipped``: waveforms with more than a
    thousandth of their samples at their extreme; ``off_scale``: values that the extractor of this model cannot give (``None`` where its
    range is unknown); ``band_limited``: sounding clips whose upper mel bins never leave the floor, as of upsampled audio. ``minimum``
    and ``maximum`` are over all finite values. ``duplicated``: clips that equal another clip of their micro-batch. ``mel_bins`` of the
    features; what the encoder takes is in ``Setup.mel_bins``.
    ``placeholders``: audio placeholders in ``input_ids`` (tokens); ``frames``: rows that encoder or projector gave to fill them with,
    padding included; ``valid_frames``: those that the feature mask leaves, where there is one.
    """

    kind: str
    clips: int
    nonfinite: int = 0
    constant: int = 0
    silent: int = 0
    clipped: int | None = None
    off_scale: int | None = None
    band_limited: int | None = None
    minimum: float | None = None
    maximum: float | None = None
    mel_bins: int | None = None
    placeholders: int | None = None
    frames: int | None = None
    valid_frames: int | None = None
    duplicated: int | None = None


@dataclass(frozen=True, slots=True)
class BatchChecks:
    """What the batches of one step were checked for.

    ``rows``: samples; ``duplicated_rows``: those that equal another row of their micro-batch in every input. ``fingerprint``: a number
    (a whole one below 2**53) made of all inputs of this rank's first micro-batch; equal batches have equal fingerprints.
    ``ids_outside_tokenizer``: ids that no token of the tokenizer has, though the embedding has a row for them. ``added_ids``: ids of
    tokens that were added to the tokenizer. ``audio_labels``: audio labels that count for the loss, all codebooks together.
    ``reference_compared``: samples whose reference codes could be compared with their target codes, ``reference_matches``: those in
    which at least 99 % agree.
    """

    rows: int
    duplicated_rows: int = 0
    fingerprint: int | None = None
    ids_outside_tokenizer: int | None = None
    added_ids: int | None = None
    labels: LabelChecks | None = None
    audio: AudioChecks | None = None
    audio_labels: int | None = None
    reference_compared: int | None = None
    reference_matches: int | None = None
