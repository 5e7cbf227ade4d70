"""Rules about labels."""

from __future__ import annotations

from typing import Any

import pytest

from judging import DECODER, ENCODER_DECODER, in_order, judged, record, repeated, seen, with_labels
from probe.records import Accuracy, Attention, BatchChecks, Head, Inputs, LabelChecks, LossAudit, Setup, StepRecord

pytestmark = pytest.mark.pure  # of torch and probe alone: the same with every transformers

SHIFTED = Head("lm_head", "text", 1, shape=(2, 8, 288), alignment="shifted by one")
AUDIT = LossAudit(2.0, 2.0, 1.0)


def audit(*kinds: str) -> LossAudit:
    return LossAudit(2.0, 3.0, 2 / 3, causes=tuple(f"because of {kind}" for kind in kinds), kinds=kinds)


def related(same: int = 0, following: int = 0, previous: int = 0, compared: int = 40, **more: Any) -> StepRecord:
    labels = LabelChecks(40, compared=compared, same=same, next=following, previous=previous)
    return record(**{"checks": BatchChecks(4, labels=labels), "heads": (SHIFTED,), "loss_audit": AUDIT, **more})


def test_all_masked() -> None:
    """Not one label is critical; a single one, of text or of audio, is not; without label checks nothing is said."""
    assert seen("labels-all-masked", record(**with_labels(labelled=0))) == [("critical", "")]
    assert seen("labels-all-masked", record(**with_labels(labelled=1))) == []
    assert seen("labels-all-masked", record(checks=BatchChecks(4, labels=LabelChecks(0), audio_labels=3))) == []
    scored = Head("audio_lm_head", "audio", 1, accuracy=Accuracy(5))
    assert seen("labels-all-masked", record(**with_labels(labelled=0), heads=(scored,))) == []
    unscored = Head("lm_head", "text", 1)
    assert seen("labels-all-masked", record(**with_labels(labelled=0), heads=(unscored,))) == [("critical", "")]
    assert seen("labels-all-masked", record(checks=BatchChecks(4, audio_labels=0))) is None
    assert seen("labels-all-masked", record()) is None


def test_padding_by_the_mask() -> None:
    """More labels where the mask is 0 than rows are a warning; one a row may be the end of its text."""
    assert seen("padding-in-loss", record(**with_labels(on_padding=5))) == [("warning", "")]
    assert seen("padding-in-loss", record(**with_labels(on_padding=4))) == []
    assert seen("padding-in-loss", record(**with_labels(on_padding=0, padding_runs=0))) == []
    assert seen("padding-in-loss", record(**with_labels(labelled=0, on_padding=9))) == []
    assert seen("padding-in-loss", record()) is None
    (symptom,) = judged("padding-in-loss", record(**with_labels(on_padding=7))) or ()
    assert symptom.evidence == {"on_padding": 7.0, "rows": 4.0}


def test_padding_by_runs() -> None:
    """Without a mask, more than a hundredth of the labels repeating the padding id; a hundredth is still text."""
    assert seen("padding-in-loss", record(**with_labels(labelled=100, padding_runs=2))) == [("warning", "")]
    assert seen("padding-in-loss", record(**with_labels(labelled=100, padding_runs=1))) == []


def test_padding_by_the_audit() -> None:
    """What the loss audit found is told in its own words."""
    (symptom,) = judged("padding-in-loss", record(loss_audit=audit("shift", "padding"))) or ()
    assert symptom.message == "because of padding"
    assert seen("padding-in-loss", record(loss_audit=audit("shift"))) == []
    assert seen("padding-in-loss", record(**with_labels(), loss_audit=audit("padding"))) == [("warning", "")]
    assert seen("padding-in-loss", record(**with_labels(on_padding=4), loss_audit=audit("padding"))) == []  # it counts the same ones


def test_placeholders_in_the_labels() -> None:
    """One label that asks for a placeholder is a warning, except of models that write audio."""
    asked = record(**with_labels(on_placeholders=1))
    assert seen("prompt-not-masked", asked, setup=DECODER) == [("warning", "")]
    assert seen("prompt-not-masked", record(**with_labels(on_placeholders=0)), setup=DECODER) == []
    assert seen("prompt-not-masked", asked, setup=Setup(codebooks=8)) == []
    assert seen("prompt-not-masked", record(**with_labels(on_placeholders=1), heads=(Head("h", "audio", 1),))) == []
    assert seen("prompt-not-masked", record(**with_labels()), setup=DECODER) is None
    assert seen("prompt-not-masked", record(), setup=DECODER) is None


def prefixed(length: int | None, *, masked: float | None = 0.25, padding: float | None = 0.25, **more: Any) -> StepRecord:
    inputs = Inputs(1, 4, padding_share=padding, labels_masked_share=masked)
    return record(**with_labels(common_prefix=length, **more), inputs=inputs)


def test_a_common_prefix_where_nothing_is_masked() -> None:
    """Four tokens twice in a row, where no more is masked than padding; three, or once, or of an encoder-decoder, is no finding."""
    assert seen("prompt-not-masked", *in_order(prefixed(4), prefixed(4)), setup=DECODER) == [("warning", "")]
    assert seen("prompt-not-masked", *in_order(prefixed(4), prefixed(3)), setup=DECODER) == []
    assert seen("prompt-not-masked", *in_order(prefixed(3), prefixed(4)), setup=DECODER) == []
    assert seen("prompt-not-masked", prefixed(4), setup=DECODER) == []
    assert seen("prompt-not-masked", *in_order(prefixed(40), prefixed(40)), setup=ENCODER_DECODER) == []
    cross = {"attention": (Attention("x", "cross", "", 1),)}
    by_layers = [record(**with_labels(common_prefix=40), **cross) for _ in range(2)]
    assert seen("prompt-not-masked", *in_order(*by_layers)) == []
    assert seen("prompt-not-masked", *in_order(prefixed(0, masked=0.0, padding=None), prefixed(4, masked=0.0, padding=None))) == []
    unpadded = [prefixed(4, masked=0.0, padding=None) for _ in range(2)]
    assert seen("prompt-not-masked", *in_order(*unpadded), setup=DECODER) == [("warning", "")]


def test_a_common_prefix_where_something_is_masked() -> None:
    """Where more is masked than padding answers may share a template: then it takes 16."""
    for masked in (0.26, None):
        assert seen("prompt-not-masked", *in_order(*(prefixed(15, masked=masked) for _ in range(2))), setup=DECODER) == []
        assert seen("prompt-not-masked", *in_order(*(prefixed(16, masked=masked) for _ in range(2))), setup=DECODER) == [("warning", "")]
    bare = [record(**with_labels(common_prefix=15)) for _ in range(2)]
    assert seen("prompt-not-masked", *in_order(*bare), setup=DECODER) == []


@pytest.mark.parametrize("slip", ["following", "previous"])
def test_a_decoder_whose_labels_are_moved(slip: str) -> None:
    """Labels that equal the next or the previous id are critical; nine tenths of them are still not enough, nor are 15 labels."""
    assert seen("labels-shifted", related(**{slip: 37}), setup=DECODER) == [("critical", "")]
    assert seen("labels-shifted", related(**{slip: 36}), setup=DECODER) == []
    assert seen("labels-shifted", related(**{slip: 16}, compared=16), setup=DECODER) == [("critical", "")]
    assert seen("labels-shifted", related(**{slip: 15}, compared=15), setup=DECODER) == []
    assert seen("labels-shifted", related(**{slip: 38}, same=20), setup=DECODER) == []  # repeated tokens
    assert seen("labels-shifted", related(**{slip: 38}, same=19), setup=DECODER) == [("critical", "")]
    assert seen("labels-shifted", related(same=40), setup=DECODER) == []


def test_an_encoder_decoder_means_the_next_id() -> None:
    """There the label is the next decoder input: the same one, or the one before, is critical; told by layers without a setup."""
    assert seen("labels-shifted", related(same=40), setup=ENCODER_DECODER) == [("critical", "")]
    assert seen("labels-shifted", related(previous=40), setup=ENCODER_DECODER) == [("critical", "")]
    assert seen("labels-shifted", related(following=40), setup=ENCODER_DECODER) == []
    cross = (Attention("x", "cross", "", 1),)
    assert seen("labels-shifted", related(same=40, attention=cross)) == [("critical", "")]


def test_labels_that_nobody_shifts() -> None:
    """A class that does not shift (masked language model), or is given shifted labels, means no relation that could be checked."""
    for how in ("not shifted", "already shifted (shift_labels)"):
        head = Head("lm_head", "text", 1, shape=(2, 8, 288), alignment=how)
        assert seen("labels-shifted", related(following=40, heads=(head,)), setup=DECODER) == []
        assert seen("labels-shifted", related(following=40, heads=(head,), loss_audit=None), setup=DECODER) is None


def test_whose_alignment_is_asked() -> None:
    """The text head's: an audio head, or a head that says nothing, does not tell how text labels lie."""
    for other in (Head("a", "audio", 1, alignment="not shifted"), Head("b", "text", 1)):
        assert seen("labels-shifted", related(following=40, heads=(other, SHIFTED)), setup=DECODER) == [("critical", "")]
        bare = Head("lm_head", "text", 1, alignment="not shifted")
        assert seen("labels-shifted", related(following=40, heads=(other, bare)), setup=DECODER) == []


def test_a_shift_without_an_audit_is_a_warning() -> None:
    """Where no audit confirms how the model shifts, it may take its labels as they come."""
    assert seen("labels-shifted", related(following=40, loss_audit=None), setup=DECODER) == [("warning", "")]
    assert seen("labels-shifted", related(following=40, loss_audit=LossAudit()), setup=DECODER) == [("warning", "")]


def test_two_shifts_may_cancel() -> None:
    """Labels moved by one, for a model whose loss does not move them, are right."""
    assert seen("labels-shifted", *in_order(*(related(following=40, loss_audit=audit("shift")) for _ in range(2))), setup=DECODER) == []


def test_a_shift_that_only_the_audit_sees() -> None:
    """Twice in a row and labels as meant: told in the audit's words; once may be chance."""
    right = related(same=40, loss_audit=audit("log", "shift"))
    (symptom,) = judged("labels-shifted", *in_order(right, right), setup=DECODER) or ()
    assert symptom.message == "because of shift"
    assert seen("labels-shifted", right, setup=DECODER) == []
    assert seen("labels-shifted", *in_order(related(same=40), right), setup=DECODER) == []
    assert seen("labels-shifted", *in_order(right, related(same=40)), setup=DECODER) == []


def test_nothing_to_compare() -> None:
    """Without label checks and audit, or with too few labels and no audit, nothing is said."""
    assert seen("labels-shifted", record(), setup=DECODER) is None
    assert seen("labels-shifted", related(same=15, compared=15, loss_audit=None), setup=DECODER) is None
    assert seen("labels-shifted", related(same=16, compared=16, loss_audit=None), setup=DECODER) == []
    assert seen("labels-shifted", related(same=40, loss_audit=None), setup=DECODER) == []
    assert seen("labels-shifted", *repeated(2, loss_audit=AUDIT), setup=DECODER) == []
