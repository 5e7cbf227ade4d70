"""Rules about what LM heads predict."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest

from judging import DECODER, in_order, judged, record, repeated, seen
from probe.records import Accuracy, Head, StepRecord

pytestmark = pytest.mark.pure  # of torch and probe alone: the same with every transformers

V = 64
UNIFORM = math.log(V)
FINE = Accuracy(40, 0.75 * UNIFORM, 0.3, entropy=2.5, top_token_share=0.4)
GUESS = Accuracy(40, UNIFORM + 0.01, 0.02, entropy=UNIFORM - 0.01, top_token_share=0.5)


def books(*codebooks: Accuracy, shape: tuple[int, ...] | None = None) -> StepRecord:
    shape = (2, 8, V * len(codebooks)) if shape is None else shape
    return record(heads=(Head("audio_lm_head", "audio", 1, shape=shape, codebooks=codebooks),))


def dead(*records: StepRecord) -> list[tuple[str, str]] | None:
    return seen("codebook-dead", *in_order(*records))


def test_a_uniform_codebook() -> None:
    """A distribution that is uniform to six digits, three times in a row; a fresh head's is not, and where all are, none is to blame."""
    flat = replace(GUESS, entropy=UNIFORM * (1 - 0.9e-6))
    bad = books(FINE, flat, FINE, FINE)
    assert dead(bad, bad, bad) == [("warning", "audio_lm_head, codebook 1")]
    assert dead(bad, bad) == []
    assert dead(bad, books(FINE, FINE, FINE, FINE), bad) == []
    assert dead(*[books(GUESS, replace(GUESS, entropy=UNIFORM * (1 - 1.1e-6)), GUESS, GUESS)] * 3) == []
    assert dead(*[books(flat, flat, flat, flat)] * 3) == []
    assert dead(*[books(GUESS, replace(flat, labelled=1), GUESS, GUESS)] * 3) == [("warning", "audio_lm_head, codebook 1")]
    assert dead(*[books(GUESS, flat, GUESS, GUESS)] * 3) == [("warning", "audio_lm_head, codebook 1")]
    two = [("warning", f"audio_lm_head, codebook {k}") for k in (1, 2)]
    assert dead(*[books(GUESS, flat, flat, replace(GUESS, entropy=None))] * 3) == two
    assert dead(record(), bad, bad, bad) == [("warning", "audio_lm_head, codebook 1")]
    assert dead(*[books(FINE, flat, shape=(9, 3))] * 3) == []
    (symptom,) = judged("codebook-dead", *in_order(bad, bad, bad)) or ()
    assert symptom.evidence["codebook"] == 1


def test_the_vocabulary_of_a_codebook() -> None:
    """It is the width of the logits, or of a codebook's share of it where they lie side by side."""
    flat = replace(GUESS, entropy=UNIFORM)
    assert dead(*[books(FINE, flat, FINE, shape=(9, 3, V))] * 3) == [("warning", "audio_lm_head, codebook 1")]
    assert dead(*[books(FINE, flat, FINE, shape=(9, 3 * V))] * 3) == [("warning", "audio_lm_head, codebook 1")]
    assert dead(*[books(FINE, flat, FINE, shape=(3 * V,))] * 3) == [("warning", "audio_lm_head, codebook 1")]
    assert dead(*[books(FINE, flat, FINE, shape=(9, 3, 3 * V))] * 3) == []
    assert dead(*[books(FINE, replace(FINE, entropy=0.99 * UNIFORM), FINE, shape=(9, 3, V))] * 3) == []
    assert dead(*[books(FINE, flat, FINE, shape=())] * 3) == []
    assert dead(*[books(FINE, flat, FINE, shape=(9, 3))] * 3) == []


def test_a_codebook_that_stays_a_guess() -> None:
    """No better than a guess, three times in a row, while half of the others are far below: 0.8 log V."""
    learnt = replace(FINE, loss=0.8 * UNIFORM)
    bad = books(learnt, GUESS, learnt, learnt)
    assert dead(bad, bad, bad) == [("warning", "audio_lm_head, codebook 1")]
    assert dead(*[books(learnt, GUESS)] * 3) == [("warning", "audio_lm_head, codebook 1")]
    assert dead(*[books(learnt, GUESS, Accuracy(0), learnt)] * 3) == [("warning", "audio_lm_head, codebook 1")]
    nearly = replace(FINE, loss=0.81 * UNIFORM)
    assert dead(*[books(nearly, GUESS, nearly, nearly)] * 3) == []
    assert dead(*[books(learnt, replace(GUESS, loss=0.999 * UNIFORM), learnt, learnt)] * 3) == []
    assert dead(*[books(learnt, GUESS, nearly, nearly)] * 3) == []
    assert dead(*[books(GUESS, GUESS, GUESS, GUESS)] * 3) == []


def test_a_mean_takes_some_labels() -> None:
    """A loss of fewer than 16 labels says nothing; such steps, and those in which the codebook has none, are passed over."""
    learnt = replace(FINE, loss=0.8 * UNIFORM)
    found = [("warning", "audio_lm_head, codebook 1")]
    bad, few, none = (books(learnt, each, learnt) for each in (replace(GUESS, labelled=16), replace(GUESS, labelled=15), Accuracy(0)))
    assert dead(bad, bad, bad) == found
    assert dead(few, few, few) == []
    assert dead(bad, few, bad, none, bad) == found
    assert dead(bad, bad, bad, none, few) == found
    assert dead(bad, bad, bad, books(learnt, replace(GUESS, loss=0.5 * UNIFORM), learnt)) == []


def test_a_codebook_stuck_on_one_token() -> None:
    """Where one token makes up 99 % it is enough that half of the others have learnt something, and are not stuck themselves."""
    some = replace(FINE, loss=0.95 * UNIFORM)
    stuck = replace(GUESS, top_token_share=0.99)
    assert dead(*[books(some, stuck, some, some)] * 3) == [("warning", "audio_lm_head, codebook 1")]
    assert dead(*[books(some, replace(stuck, top_token_share=0.98), some, some)] * 3) == []
    assert dead(*[books(some, replace(stuck, top_token_share=None), some, some)] * 3) == []
    assert dead(*[books(some, replace(stuck, loss=0.999 * UNIFORM), some, some)] * 3) == []  # it has learnt the frequent token
    less, same = replace(FINE, loss=0.96 * UNIFORM), replace(some, top_token_share=0.9)
    assert dead(*[books(less, stuck, less, less)] * 3) == []
    assert dead(*[books(same, stuck, same, same)] * 3) == []
    uncounted = replace(some, top_token_share=None)
    assert dead(*[books(uncounted, stuck, uncounted, uncounted)] * 3) == []


def test_codebooks_of_which_nothing_is_known() -> None:
    """A single codebook, no loss, or no head says nothing; one without labels is passed over."""
    assert dead(*[books(GUESS)] * 3) is None
    assert dead(*[books(Accuracy(0), Accuracy(0))] * 3) is None
    assert dead(*repeated(3)) is None
    flat = replace(GUESS, entropy=UNIFORM)
    assert dead(*[books(flat, Accuracy(0))] * 3) == []
    assert dead(*[books(FINE, Accuracy(0), FINE)] * 3) == []
    assert dead(*[books(FINE, replace(flat, loss=None), FINE)] * 3) == []
    assert dead(*[books(FINE, FINE, FINE, FINE)] * 3) == []
    grown = books(FINE, flat), books(FINE, FINE, flat), books(FINE, FINE, flat)
    assert dead(*grown) == []
    assert dead(*grown, grown[-1]) == [("warning", "audio_lm_head, codebook 2")]
    assert dead(*[books(GUESS, replace(GUESS, entropy=UNIFORM), replace(GUESS, entropy=None))] * 3) == [
        ("warning", "audio_lm_head, codebook 1")
    ]
    assert dead(*[books(replace(GUESS, entropy=None), replace(GUESS, entropy=UNIFORM))] * 3) == []


STUCK = Accuracy(40, 4.0, 0.1, entropy=1.0, top_token_share=0.96)
VARIED = Accuracy(40, 2.0, 0.4, entropy=2.0, top_token_share=0.3)
CALM = replace(STUCK, loss=3.0, entropy=2.9)


def head(accuracy: Accuracy | None, site: str = "lm_head") -> StepRecord:
    return record(heads=(Head(site, "text", 1, accuracy=accuracy),))


def collapsed(*accuracies: Accuracy | None, every: int = 10, setup: Any = None) -> list[tuple[str, str]] | None:
    return seen("prediction-collapsed", *in_order(*(head(each) for each in accuracies), every=every), setup=setup)


def test_a_head_that_is_sure_and_wrong() -> None:
    """One token for 20 steps and three records, wrong, and more than a nat surer than it should be."""
    assert collapsed(STUCK, STUCK, STUCK) == [("warning", "lm_head")]
    assert collapsed(STUCK, STUCK, STUCK, every=9) == []
    assert collapsed(STUCK, STUCK, every=20) == []
    assert collapsed(*[STUCK] * 20, every=1) == []
    assert collapsed(*[STUCK] * 21, every=1) == [("warning", "lm_head")]
    assert collapsed(VARIED, STUCK, STUCK, STUCK) == [("warning", "lm_head")]
    assert collapsed(*[replace(STUCK, entropy=2.9, labelled=16)] * 3) == [("warning", "lm_head")]


@pytest.mark.parametrize(
    "fine",
    [
        replace(STUCK, top_token_share=0.95),
        replace(STUCK, token_accuracy=0.5),
        replace(STUCK, entropy=3.0),
        replace(STUCK, loss=None),
        replace(STUCK, entropy=None),
    ],
)
def test_one_token_that_is_no_finding(fine: Accuracy) -> None:
    """Varied or right predictions, or a head that knows that it guesses, are healthy; one such step among the others is enough."""
    assert collapsed(fine, fine, fine) == []
    assert collapsed(STUCK, fine, STUCK) == []
    assert collapsed(STUCK, STUCK, fine) == []


@pytest.mark.parametrize(
    "unknown", [None, replace(STUCK, labelled=15), replace(STUCK, top_token_share=None), replace(STUCK, token_accuracy=None)]
)
def test_predictions_that_were_not_counted(unknown: Accuracy | None) -> None:
    """Without the number, or with fewer than 16 labels, nothing is said; within the stretch such a step breaks it."""
    assert collapsed(STUCK, STUCK, STUCK, unknown) is None
    assert collapsed(STUCK, unknown, STUCK) == []
    assert seen("prediction-collapsed", record()) is None


def test_a_head_that_knew_more() -> None:
    """It was varied and at least twice as often right before; else it is the first thing that a fresh model learns."""
    assert collapsed(VARIED, CALM, CALM, CALM) == [("warning", "lm_head")]
    assert collapsed(VARIED, replace(VARIED, token_accuracy=0.1), CALM, CALM, CALM) == [("warning", "lm_head")]
    assert collapsed(VARIED, None, CALM, CALM, CALM) == [("warning", "lm_head")]
    assert collapsed(replace(VARIED, token_accuracy=0.19), CALM, CALM, CALM) == []
    assert collapsed(replace(VARIED, token_accuracy=0.2), CALM, CALM, CALM) == []
    assert collapsed(replace(VARIED, token_accuracy=0.21), CALM, CALM, CALM) == [("warning", "lm_head")]
    assert collapsed(replace(VARIED, top_token_share=0.5), CALM, CALM, CALM) == []
    assert collapsed(VARIED, CALM, CALM) == []
    assert collapsed(CALM, CALM, CALM) == []
    assert collapsed(VARIED, CALM, CALM, replace(CALM, token_accuracy=0.2)) == []


def test_a_head_that_never_learns_more() -> None:
    """A thousand steps after the warm-up, and eight records, of nothing but one token."""
    assert collapsed(*[CALM] * 8, every=143) == [("warning", "lm_head")]
    assert collapsed(*[CALM] * 8, every=142) == []
    assert collapsed(*[CALM] * 7, every=200) == []
    assert collapsed(*[CALM] * 8, every=143, setup=replace(DECODER, warmup_steps=2)) == [("warning", "lm_head")]
    assert collapsed(*[CALM] * 8, every=143, setup=replace(DECODER, warmup_steps=3)) == []
    assert collapsed(*[CALM] * 8, every=143, setup=DECODER) == [("warning", "lm_head")]
    assert collapsed(*[CALM] * 4, replace(VARIED, token_accuracy=0.1), *[CALM] * 4, every=143) == []


def test_each_head_is_judged_by_itself() -> None:
    """A second head that is well does not hide the first, nor the other way round."""
    for first, second in ((STUCK, VARIED), (VARIED, STUCK)):
        both = [record(heads=(*head(first, "a").heads, *head(second, "b").heads)) for _ in range(3)]
        assert seen("prediction-collapsed", *in_order(*both, every=10)) == [("warning", "a" if first is STUCK else "b")]
    well, ill = (
        Head(name, "audio", 1, shape=(9, 2 * V), codebooks=(FINE, each))
        for name, each in (("a", FINE), ("b", replace(GUESS, entropy=UNIFORM)))
    )
    assert dead(*[record(heads=(well, ill))] * 3) == [("warning", "b, codebook 1")]
