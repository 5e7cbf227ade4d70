"""Rules about what LM heads predict: one codebook that learns nothing, and predictions that are always the same token."""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import median

from probe.findings.rule import History, Rule, Symptom
from probe.findings.rules.streaks import spanning
from probe.records import Accuracy, Head, StepRecord

RECORDS = 3

UNIFORM = 1e-6
"""How near the entropy must be to the logarithm of the vocabulary, relative: logits of a spread s lower it by s²/2, and those of a fresh
head spread by 0.1 or so."""

STUCK_SHARE, OTHERS_SHARE = 0.99, 0.9
"""Share of one and the same prediction in the codebook that is stuck, and in the others at most."""

LEARNT, LEARNT_MUCH = 0.95, 0.8
"""Loss by log V of the other codebooks, below which they have learnt something, or much."""

COLLAPSED_SHARE, ACCURACY = 0.95, 0.5
"""Share of one and the same prediction, and the accuracy from which on it may be the right one."""

STEPS = 20
"""Steps over which predictions must have been the same: a high learning rate overshoots for a few."""

SURE = 1.0
"""Nats by which the loss exceeds the entropy of the predictions: a model that knows what it does not know has both alike (they are equal in
expectation where it is calibrated)."""

VARIED_SHARE = 0.5
"""Share of the most frequent prediction below which predictions count as varied."""

LABELLED = 16
"""Labelled positions of a step that shares and means take."""

LATE_STEPS, LATE_RECORDS = 1000, 8
"""Steps after the warm-up by which a model trained from scratch predicts more than its most frequent token."""


def codebook_dead(history: History) -> list[Symptom] | None:
    """Judge each codebook of an audio head against the others of that head."""
    heads = [head for head in history.last.heads if len(head.codebooks) > 1]
    if not any(each.loss is not None for head in heads for each in head.codebooks):
        return None
    found = []
    for head in heads:
        for k in range(len(head.codebooks)):
            seen = [book for record in history.records if (book := _book(record, head.site, k)) is not None]
            uniform, labelled = seen[-RECORDS:], [book for book in seen if book.this.labelled >= LABELLED][-RECORDS:]
            for rows, judge in ((uniform, _uniform), (labelled, _no_better)):
                told = [judge(book) for book in rows]
                if len(told) == RECORDS and all(told):
                    found.append(_codebook(head, k, rows[-1].this, told[-1]))
                    break
    return found


def prediction_collapsed(history: History) -> list[Symptom] | None:
    """Judge every head that counts what it predicts most often."""
    sites = [head.site for head in history.last.heads if _counted(history.last, head.site) is not None]
    if not sites:
        return None
    found = []
    for site in sites:
        why = _sure_and_wrong(history, site) or _knew_more(history, site) or _late(history, site)
        if why:
            now = _counted(history.last, site)
            assert now is not None
            message = f"one token makes up {now.top_token_share or 0:.0%} of the predictions (bound: {COLLAPSED_SHARE:.0%}), {why}"
            evidence = {
                "top_token_share": now.top_token_share or 0.0,
                "token_accuracy": now.token_accuracy or 0.0,
                "bound": COLLAPSED_SHARE,
            }
            found.append(Symptom(message, site, evidence))
    return found


@dataclass(frozen=True, slots=True)
class _Book:
    """One codebook of a record, the others of its head that have a loss, and log V, the loss of a guess."""

    this: Accuracy
    others: tuple[Accuracy, ...]
    guess: float


def _book(record: StepRecord, site: str, k: int) -> _Book | None:
    """Return a codebook; ``None`` where it has no loss, or is the only one that has."""
    head = next((head for head in record.heads if head.site == site), None)
    if head is None or k >= len(head.codebooks) or not head.shape or head.codebooks[k].loss is None:
        return None
    width, books = head.shape[-1], len(head.codebooks)
    # (..., K, V), or (..., K * V). As many rows as codebooks by chance are taken for the former: that misses a step at worst.
    vocabulary = width if len(head.shape) > 1 and head.shape[-2] == books else width // books
    others = tuple(each for index, each in enumerate(head.codebooks) if index != k and each.loss is not None)
    return _Book(head.codebooks[k], others, math.log(vocabulary)) if vocabulary > 1 and others else None


def _uniform(book: _Book) -> str:
    """Return what is to be said if all tokens are equally likely to a codebook and not to all others; else ""."""
    bound = book.guess * (1 - UNIFORM)
    flat, others = book.this.entropy, [each.entropy for each in book.others if each.entropy is not None]
    return (
        "all its tokens are equally likely to it, to six digits"
        if flat is not None and flat >= bound and others and min(others) < bound
        else ""
    )


def _no_better(book: _Book) -> str:
    """Return what is to be said if a codebook is no better than a guess and the others are; else ""."""
    this, reached = book.this, median(each.loss for each in book.others if each.loss is not None)
    if this.loss is None or this.loss < book.guess * (1 - UNIFORM):
        return ""
    no_better = f"its loss {this.loss:.3f} is no better than a guess ({book.guess:.3f})"
    if reached <= LEARNT_MUCH * book.guess:
        return f"{no_better}, and half of the others are at {reached:.3f} and below"
    shares = [each.top_token_share for each in book.others if each.top_token_share is not None]
    stuck = this.top_token_share is not None and this.top_token_share >= STUCK_SHARE
    if stuck and reached <= LEARNT * book.guess and shares and median(shares) < OTHERS_SHARE:
        return f"{no_better}, and {this.top_token_share:.0%} of its predictions are one token"
    return ""


def _codebook(head: Head, k: int, this: Accuracy, why: str) -> Symptom:
    numbers = {"codebook": float(k), "loss": this.loss, "entropy": this.entropy, "top_token_share": this.top_token_share}
    evidence = {name: number for name, number in numbers.items() if number is not None}
    return Symptom(f"codebook {k}: {why}, in {RECORDS} sampled steps in a row", f"{head.site}, codebook {k}", evidence)


def _counted(record: StepRecord, site: str) -> Accuracy | None:
    """Return a head's accuracy where it counts the most frequent prediction of enough positions."""
    head = next((head for head in record.heads if head.site == site), None)
    accuracy = None if head is None else head.accuracy
    if accuracy is None or accuracy.top_token_share is None or accuracy.token_accuracy is None or accuracy.labelled < LABELLED:
        return None
    return accuracy


def _one_token(accuracy: Accuracy | None) -> bool:
    if accuracy is None:
        return False
    return (accuracy.top_token_share or 0.0) > COLLAPSED_SHARE and (accuracy.token_accuracy or 0.0) < ACCURACY


def _stretch(history: History, site: str, *, steps: int, records: int) -> list[Accuracy]:
    """Return the accuracies of the newest records over that many steps, if all of them predict one token; else nothing."""
    rows = [_counted(record, site) for record in spanning(history, steps=steps, records=records)]
    return [row for row in rows if row is not None] if rows and all(_one_token(row) for row in rows) else []


def _sure_and_wrong(history: History, site: str) -> str:
    rows = _stretch(history, site, steps=STEPS, records=RECORDS)
    gaps = [row.loss - row.entropy for row in rows if row.loss is not None and row.entropy is not None]
    if not rows or len(gaps) < len(rows) or min(gaps) <= SURE:
        return ""
    return f"for {STEPS} steps and more, and its loss is {gaps[-1]:.2f} nats above its own uncertainty (bound: {SURE:g})"


def _knew_more(history: History, site: str) -> str:
    rows = _stretch(history, site, steps=STEPS, records=RECORDS)
    if not rows:
        return ""
    now = max(row.token_accuracy or 0.0 for row in rows)
    earlier = [_counted(record, site) for record in history.records[: -len(rows)]]
    better = [row.token_accuracy or 0.0 for row in earlier if row is not None and (row.top_token_share or 1.0) < VARIED_SHARE]
    if not better or now >= max(better) / 2:
        return ""
    return f"for {STEPS} steps and more; earlier its predictions were varied, and {max(better):.0%} of them right (now {now:.0%})"


def _late(history: History, site: str) -> str:
    rows = _stretch(history, site, steps=LATE_STEPS, records=LATE_RECORDS)
    warmup = (history.setup.warmup_steps or 0) if history.setup is not None else 0
    return f"for {LATE_STEPS:,} steps and more" if rows and history.last.step >= warmup + LATE_STEPS else ""


RULES = (
    Rule(
        code="codebook-dead",
        severity="warning",
        meaning="One codebook of the audio head learns nothing while the others do. The codec adds that codebook's noise to every frame.",
        advice="Compare the codebook's labels and head rows with those of its neighbours: offset in a joint vocabulary (k * "
        "codebook_size), delay pattern, a loss weight of 0, a slice of the head that was not loaded from the checkpoint.",
        threshold="In 3 sampled steps in a row: its predicted distribution is uniform to six digits (no random head's is), and not "
        "that of all others; or, with at least 16 labels, its loss stays at log V and above, as of a guess, while half of the others "
        "are below 0.8 log V; or that while 99 % of its predictions are one token, those of the others are not (median below 90 %), "
        "and half of them are below 0.95 log V. Residual codebooks are harder the later they come, but each beats a guess as soon as "
        "it knows which codes are frequent.",
        check=codebook_dead,
    ),
    Rule(
        code="prediction-collapsed",
        severity="warning",
        meaning="The head predicts one and the same token nearly everywhere, and it is mostly the wrong one.",
        advice="Look at the shown predictions. If the model could do better before: lower the learning rate, and look at prompt and "
        "labels of the batches since then. If it never could: does the head get the decoder's last hidden state, does a bias or a "
        "constant outweigh the logits, do the inputs reach the decoder at all?",
        threshold="More than 95 % of the predictions (of at least 16 a step) are one token and less than half are right, over 20 steps "
        "and at least 3 sampled ones. A model trained from scratch does that for a while, knowing that it guesses: so only if its loss "
        "is more than 1 nat above the entropy of its predictions (of a calibrated model both are equal), or if its predictions were "
        "varied before and at least twice as often right, or if it lasts for 1,000 steps after the warm-up.",
        check=prediction_collapsed,
    ),
)
