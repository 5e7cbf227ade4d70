"""The part of the outputs that shows tokens: predicted beside target, sample by sample, and what a head predicts most."""

from __future__ import annotations

from probe.records import Head, HeadSample
from probe.sections.blocks import Block, Comparison, Fact, Facts, TokenPair
from probe.sections.numbers import passage, share
from probe.sections.reasons import Reasons

_ENDS = 10
_SHOWN_SAMPLES = 4
_CHARACTERS = 480
# From this share of the positions on, one prediction for all is worth a look; of fewer positions it says nothing.
_COLLAPSED, _LEAST = 0.5, 20


def tokens(head: Head, name: str, reasons: Reasons) -> list[Block]:
    """Return the blocks of one head; where it scored nothing, the reason."""
    keys = (f"head:{head.site}", f"lm_head:{head.site}", f"lm_head/{head.site}", f"head/{head.site}")
    if head.accuracy is None or not head.accuracy.labelled:
        why = reasons.missing(*keys, f"probe/{head.modality}/loss", f"probe/{head.modality}/token_accuracy", f"probe/{head.modality}")
        return [Facts((Fact(name, why, "missing"),))]
    blocks: list[Block] = [Facts((Fact("Numbers", f"{name}: {head.evaluated}"),))] if head.evaluated else []
    top = _most_frequent(head, name)
    if top is not None:
        blocks.append(Facts((top,)))
    if head.shown and head.shown[0].target_pieces:
        blocks += [_text(head, name, sample) for sample in head.shown[:_SHOWN_SAMPLES] if sample.target_pieces]
    elif head.shown:
        blocks += _ids(head, name, head.shown[0])
    elif reasons.known(*keys):
        blocks.append(Facts((Fact(f"{name} tokens", reasons.missing(*keys), "missing"),)))
    return blocks


def _most_frequent(head: Head, name: str) -> Fact | None:
    accuracy = head.accuracy
    if accuracy is None or accuracy.top_token_share is None or head.codebooks:
        return None
    token = f"token {accuracy.top_token}" if accuracy.top_token is not None else "one token"
    what = token if head.top_token_text is None else f"{head.top_token_text!r}"
    odd = accuracy.top_token_share >= _COLLAPSED and accuracy.labelled >= _LEAST
    said = f"{name} predicts {what} at {share(accuracy.top_token_share)} of its labelled positions"
    return Fact("Most frequent", said, "warning" if odd else "plain")


def _text(head: Head, name: str, sample: HeadSample) -> Comparison:
    pairs = tuple(
        TokenPair(position, target, predicted, ours == theirs)
        for position, (target, predicted, theirs, ours) in enumerate(
            zip(sample.target_pieces, sample.predicted_pieces, sample.target, sample.predicted)
        )
    )
    right, total = sum(ours == theirs for ours, theirs in zip(sample.predicted, sample.target)), len(sample.target)
    said = [f"{right} of {total:,} {head.modality} tokens right"]
    if sample.word_error_rate is not None:
        said.append(f"word error rate {share(sample.word_error_rate)} (teacher-forced)")
    if len(pairs) < total:
        said.append(f"the first {len(pairs)} tokens")
    return Comparison(f"{name}, sample {sample.index}: {', '.join(said)}", pairs, joined=True)


def _ids(head: Head, name: str, sample: HeadSample) -> list[Block]:
    pairs = tuple(
        TokenPair(position, str(target), str(predicted), target == predicted)
        for position, (target, predicted) in enumerate(zip(sample.target, sample.predicted))
    )
    shown = pairs if len(pairs) <= 2 * _ENDS else (*pairs[:_ENDS], *pairs[-_ENDS:])
    which = f"all {len(pairs)}" if len(shown) == len(pairs) else f"first and last {_ENDS} of {len(pairs):,}"
    texts = [
        Fact(label, passage(text, _CHARACTERS))
        for label, text in (("Target text", sample.target_text), ("Predicted text", sample.predicted_text))
        if text is not None
    ]
    comparison = Comparison(f"{name}: {head.modality} tokens of sample {sample.index}, {which} labelled", shown)
    return [comparison, *([Facts(tuple(texts))] if texts else [])]
