"""What a head predicted for a few samples, as text beside its target, and the word error rate of each."""

from __future__ import annotations

from collections.abc import Sequence

from probe.assemble.draft import Draft
from probe.assemble.words import NO_JIWER, can_compare_words, word_error_rate
from probe.records import Head, HeadSample, Site

SAMPLES_IN_PIECES = 4
PIECES = 64
WORDS = "probe/text/word_error_rate"
_IGNORED = -100


def samples(draft: Draft, site: Site) -> tuple[HeadSample, ...]:
    """Return the samples of this rank's first micro-batch that were kept; one without a labelled position is left out."""
    local = draft.host.local
    predicted, target = local.get(f"predicted:{site.name}"), local.get(f"target:{site.name}")
    if predicted is None or target is None:
        return ()
    found = []
    for index, row in enumerate(zip(predicted.tolist(), target.tolist())):
        pairs = [(int(p), int(t)) for p, t in zip(*row) if t != _IGNORED]
        if pairs:
            ours, theirs = tuple(p for p, _ in pairs), tuple(t for _, t in pairs)
            as_text = site.modality == "text"
            found.append(_as_text(draft, index, ours, theirs) if as_text else HeadSample(index, ours, theirs))
    return tuple(found)


def word_errors(draft: Draft, heads: Sequence[Head], why: str) -> None:
    """Enter the mean word error rate of the shown samples of text heads, or the reason why there is none."""
    shown = [sample for head in heads if head.modality == "text" for sample in head.shown]
    rates = [sample.word_error_rate for sample in shown if sample.word_error_rate is not None]
    if shown and not rates:
        no_text = draft.run.decoder.reason
        why = no_text or ("no shown sample has a word" if can_compare_words() else NO_JIWER)
    elif not shown:
        why = next((head.evaluated for head in heads if head.modality == "text" and head.evaluated), why)
        why = draft.reasons.get("inputs/text", why)
    draft.measure(WORDS, sum(rates) / len(rates) if rates else None, why)


def _as_text(draft: Draft, index: int, predicted: tuple[int, ...], target: tuple[int, ...]) -> HeadSample:
    decoder = draft.run.decoder
    ours, theirs = decoder.text(predicted), decoder.text(target)
    pieces: tuple[tuple[str, ...], tuple[str, ...]] = ((), ())
    if index < SAMPLES_IN_PIECES:
        # Teacher-forced: each prediction goes on from the targets before it.
        pieces = (decoder.pieces(predicted[:PIECES], after=target), decoder.pieces(target[:PIECES], after=target))
    words = decoder.plain(target), decoder.plain(predicted)
    rate = None
    if words[0] is not None and words[1] is not None and can_compare_words():
        rate = word_error_rate(words[0], words[1])
    return HeadSample(index, predicted, target, *pieces, ours, theirs, rate)
