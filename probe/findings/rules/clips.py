"""Rules about what the audio clips hold: nothing, silence, NaN, the wrong scale, a narrow band.

A single clip may be odd by nature (a recording without speech), and a batch may be of one clip. So all but NaN is judged over the clips of
several sampled steps together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from probe.findings.rule import History, Rule, Symptom
from probe.records import AudioChecks, Severity, StepRecord

POOLED_RECORDS, POOLED_CLIPS = 2, 4
"""Clips are pooled over the newest sampled steps with audio: at least 2, and more until they hold 4 clips. If a twentieth of the clips of a
good data set are silent, four in a row are so about once in 160,000 times."""

SOME = 0.25
"""Share of odd clips from which on it is no exception; and it takes two of them."""

HALF = 0.5


@dataclass(frozen=True, slots=True)
class _Pool:
    """The clips of some records, counted together; ``clipped``, ``off_scale`` and ``band_limited`` are ``None`` where one of them is."""

    clips: int
    constant: int
    silent: int
    clipped: int | None
    off_scale: int | None
    band_limited: int | None
    sounding: int


def audio_constant(history: History) -> list[Symptom] | None:
    """Judge clips of one value everywhere."""
    pool = _pooled(history)
    if pool is None:
        return None
    words = "clips hold one value everywhere"
    return [] if isinstance(pool, str) else _shared(pool.constant, pool, words, "constant", warn_from=SOME)


def audio_silent(history: History) -> list[Symptom] | None:
    """Judge clips that hold nothing but silence, those of one value aside."""
    pool = _pooled(history)
    if pool is None:
        return None
    if isinstance(pool, str) or pool.constant >= pool.clips:
        return []
    silent = pool.clips if pool.silent >= pool.clips else max(0, pool.silent - pool.constant)
    return _shared(silent, pool, "clips are silent", "silent", warn_from=HALF)


def audio_clipped(history: History) -> list[Symptom] | None:
    """Judge waveforms that stand at their extreme."""
    pool = _pooled(history)
    if pool is None or _audio(history.last, "clipped") is None:
        return None
    if isinstance(pool, str) or pool.clipped is None:
        return []
    words = "clips have more than a thousandth of their samples at their extreme"
    return _shared(pool.clipped, pool, words, "clipped", warn_from=HALF, worst="warning")


def audio_wrong_scale(history: History) -> list[Symptom] | None:
    """Judge values that the model's feature extractor cannot give."""
    pool = _pooled(history)
    if pool is None or _audio(history.last, "off_scale") is None:
        return None
    if isinstance(pool, str) or pool.off_scale is None:
        return []
    checks = _checks(history.last)
    seen = "" if checks is None or checks.minimum is None else f" (this step's values: {checks.minimum:.4g} … {checks.maximum:.4g})"
    return _shared(
        pool.off_scale, pool, f"clips hold values that the model's feature extractor cannot give{seen}", "off_scale", warn_from=SOME
    )


def audio_band_limited(history: History) -> list[Symptom] | None:
    """Judge sounding clips without anything in the upper mel bins."""
    pool = _pooled(history)
    if pool is None or _audio(history.last, "band_limited") is None:
        return None
    if isinstance(pool, str) or pool.band_limited is None:
        return []
    if pool.sounding < POOLED_CLIPS or pool.band_limited < pool.sounding:
        return []
    message = (
        f"nothing above 4 kHz in all {pool.sounding:,} sounding clips of the newest sampled steps (bound: all of at least {POOLED_CLIPS})"
    )
    return [Symptom(message, evidence={"band_limited": float(pool.band_limited), "sounding": float(pool.sounding)})]


def audio_not_finite(history: History) -> list[Symptom] | None:
    """Judge NaN and Inf among the features of the last step."""
    checks = _checks(history.last)
    if checks is None:
        return None
    if not checks.nonfinite:
        return []
    message = f"{checks.nonfinite:,} of {checks.clips:,} clips hold NaN or Inf (there should be none)"
    return [Symptom(message, evidence={"nonfinite": float(checks.nonfinite), "clips": float(checks.clips)})]


def _shared(odd: int, pool: _Pool, words: str, name: str, *, warn_from: float, worst: Severity = "critical") -> list[Symptom]:
    """Return a symptom if all clips are odd, or a share of ``warn_from`` and at least two."""
    if odd >= pool.clips:
        severity: Severity = worst
    elif odd >= 2 and odd / pool.clips >= warn_from:
        severity = "warning"
    else:
        return []
    message = f"{odd:,} of the newest {pool.clips:,} {words} (bound: {warn_from:.0%})"
    return [Symptom(message, evidence={name: float(odd), "clips": float(pool.clips), "bound": warn_from}, severity=severity)]


def _pooled(history: History) -> _Pool | str | None:
    """Pool the newest clips. ``None``: the last step brought no audio features; a string: too few clips so far."""
    last = _checks(history.last)
    if last is None or not last.clips:
        return None
    taken: list[AudioChecks] = []
    for record in reversed(history.records):
        checks = _checks(record)
        if checks is not None and checks.clips and checks.kind == last.kind:
            taken.append(checks)
        if len(taken) >= POOLED_RECORDS and sum(one.clips for one in taken) >= POOLED_CLIPS:
            return _pool(taken)
    return "too few clips"


def _pool(taken: Sequence[AudioChecks]) -> _Pool:
    def total(values: Sequence[int | None]) -> int | None:
        known = [value for value in values if value is not None]
        return sum(known) if len(known) == len(values) else None

    return _Pool(
        clips=sum(one.clips for one in taken),
        constant=sum(one.constant for one in taken),
        silent=sum(one.silent for one in taken),
        clipped=total([one.clipped for one in taken]),
        off_scale=total([one.off_scale for one in taken]),
        band_limited=total([one.band_limited for one in taken]),
        sounding=sum(one.clips - max(one.silent, one.constant) for one in taken),
    )


def _checks(record: StepRecord) -> AudioChecks | None:
    return None if record.checks is None else record.checks.audio


def _audio(record: StepRecord, name: str) -> int | None:
    checks = _checks(record)
    value = None if checks is None else getattr(checks, name)
    return None if value is None else int(value)


_POOLED = "over the clips of the newest 2 sampled steps with audio (more until there are 4 clips; a single clip may be so by nature)"

RULES = (
    Rule(
        code="audio-constant",
        severity="critical",
        meaning="Clips hold one and the same value everywhere, as of zeros that were never filled, or a recording that failed to load. "
        "Nothing can be learnt from them.",
        advice="Load one such file by hand and look at its samples. Look for a try/except in the dataset that returns zeros, for "
        "resampling an empty array, and for features that were allocated and not written.",
        threshold=f"Critical: all clips, warning: at least a quarter and at least two, {_POOLED}.",
        check=audio_constant,
    ),
    Rule(
        code="audio-silent",
        severity="critical",
        meaning="Clips hold nothing but silence (log-mel: nothing but the floor; waveform: below -70 dBFS).",
        advice="Listen to what the dataset returns. Look at which channel is read, at start and end of the cut (in samples, not in "
        "seconds), and at a volume that is divided by the maximum twice.",
        threshold=f"Critical: all clips, warning: at least half and at least two, {_POOLED}. Clips of one value everywhere aside.",
        check=audio_silent,
    ),
    Rule(
        code="audio-clipped",
        severity="warning",
        meaning="Waveforms stand at their extreme for noticeable stretches: they were recorded or amplified too loud, and are distorted.",
        advice="Lower the gain before the audio is written or converted to integers; divide int16 by 32768 before anything is clamped "
        "to [-1, 1].",
        threshold=f"At least half of the clips and at least two, {_POOLED}. A clip counts with more than a thousandth of its samples at "
        "its extreme: speech that is not clipped reaches it in a few samples.",
        check=audio_clipped,
    ),
    Rule(
        code="audio-not-finite",
        severity="critical",
        meaning="Audio features hold NaN or Inf. They spread through attention to the whole sample, and through the mean loss to every "
        "weight.",
        advice="Find the file (p.last.inputs names the tensor): np.isfinite(features).all() in the dataset. Usual causes are the "
        "logarithm of 0 without a floor, and a division by the standard deviation of a silent clip.",
        threshold="None: a single clip of the step.",
        check=audio_not_finite,
    ),
    Rule(
        code="audio-wrong-scale",
        severity="critical",
        meaning="Features have values that the model's own feature extractor cannot give, whatever the sound: the model sees something "
        "else than what it was trained on.",
        advice="Make features with the processor of the checkpoint (WhisperFeatureExtractor.from_pretrained(...)), from float samples "
        "in [-1, 1] (int16 divided by 32768). Leave out any normalisation of your own behind it.",
        threshold="A clip is off the scale by the arithmetic of its extractor (Whisper: (log10 + 4) / 4, cut off 2 below the clip's "
        f"peak). Critical: all clips, warning: at least a quarter and at least two, {_POOLED}.",
        check=audio_wrong_scale,
    ),
    Rule(
        code="audio-band-limited",
        severity="warning",
        meaning="No clip has anything above 4 kHz, as of audio that was recorded at 8 kHz (telephone) and resampled. Fricatives are "
        "lost, and a cloned voice will sound dull.",
        advice="Look at the sampling rate of the files themselves (soxi, librosa.get_samplerate). If the data is telephone speech, "
        "ignore this; else go back to the originals.",
        threshold="All sounding clips, at least 4 of them, of the newest 2 sampled steps with audio: nearly every clip of wide-band "
        "speech has a fricative.",
        check=audio_band_limited,
    ),
)
