"""Rules about the loss, and about the outputs of sites."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from judging import in_order, judged, record, repeated, seen
from probe.records import (
    Accuracy,
    ActivationGradient,
    BatchChecks,
    Finding,
    Head,
    LabelChecks,
    LossAudit,
    Optimisation,
    Part,
    Setup,
    SiteStatistics,
    StepRecord,
)
from records_factory import speech_record, whisper_record

pytestmark = pytest.mark.pure  # of torch and probe alone: the same with every transformers


def audited(ratio: float | None = 1.0, *kinds: str, loss: float | None = 2.0) -> StepRecord:
    audit = LossAudit(loss, 2.0, ratio, causes=tuple(f"because of {kind}" for kind in kinds), kinds=kinds)
    return record(loss_audit=audit, heads=(Head("lm_head", "text", 1, accuracy=Accuracy(40, 2.0)),))


FINE, NAN = audited(), audited(None, "nonfinite", loss=None)


def test_a_loss_that_is_not_finite() -> None:
    """Twice in the newest three records, the last among them; whether the audit says why or not."""
    assert seen("loss-not-finite", *in_order(NAN, FINE, NAN)) == [("critical", "")]
    assert seen("loss-not-finite", *in_order(NAN, NAN)) == [("critical", "")]
    assert seen("loss-not-finite", *in_order(NAN)) == []
    assert seen("loss-not-finite", *in_order(NAN, NAN, FINE)) == []
    assert seen("loss-not-finite", *in_order(NAN, FINE, FINE, NAN)) == []
    assert seen("loss-not-finite", *in_order(*[audited(None, loss=None)] * 2)) == [("critical", "")]
    assert seen("loss-not-finite", record()) is None
    assert seen("loss-not-finite", replace(FINE, heads=())) == []
    (symptom,) = judged("loss-not-finite", *in_order(NAN, NAN)) or ()
    assert symptom.message == "because of nonfinite, in 2 of the newest 2 sampled steps"


def test_logits_of_a_loop_of_ones_own() -> None:
    """Without a loss the logits tell, unless a loss could be taken of them: some models mask logits with -Inf."""
    broken = Head("lm_head", "text", 1, nonfinite=7, accuracy=Accuracy(0))
    masked = Head("lm_head", "text", 1, nonfinite=7, accuracy=Accuracy(40, 2.0))
    assert seen("loss-not-finite", *repeated(2, heads=(broken,))) == [("critical", "")]
    assert seen("loss-not-finite", *repeated(2, heads=(masked,))) == []
    assert seen("loss-not-finite", *repeated(2, heads=(replace(broken, nonfinite=0),))) == []
    assert seen("loss-not-finite", *repeated(2, heads=(replace(broken, accuracy=None),))) == []
    assert seen("loss-not-finite", *repeated(2, heads=(broken,), loss_audit=FINE.loss_audit)) == []


def test_accumulation_that_scales() -> None:
    """The audit's word is taken at once."""
    assert seen("loss-scaled-by-accumulation", audited(4.0, "accumulation", "log")) == [("critical", "")]
    assert seen("loss-scaled-by-accumulation", FINE) == []
    assert seen("loss-scaled-by-accumulation", audited(4.0, "override")) == []
    assert seen("loss-scaled-by-accumulation", NAN) is None
    assert seen("loss-scaled-by-accumulation", record()) is None
    (symptom,) = judged("loss-scaled-by-accumulation", audited(4.0, "accumulation"), setup=Setup(accumulation=4)) or ()
    assert symptom.evidence == {"ratio": 4.0, "accumulation": 4.0}
    assert "because of accumulation" in symptom.message


@pytest.mark.parametrize("kind", ["items", "ranks", "smoothing", "text", "auxiliary", "unexplained"])
def test_a_loss_that_is_off(kind: str) -> None:
    """Twice in a row, for a cause that has no finding of its own; unaudited records between are passed over."""
    assert seen("loss-off", *in_order(audited(1.3, kind), audited(1.5, kind))) == [("warning", "")]
    assert seen("loss-off", audited(1.3, kind)) == []
    assert seen("loss-off", *in_order(audited(1.3, kind), FINE)) == []
    assert seen("loss-off", *in_order(FINE, audited(1.3, kind))) == []
    assert seen("loss-off", *in_order(audited(1.3, kind), NAN)) is None
    assert seen("loss-off", *in_order(audited(1.3, kind), NAN, audited(1.3, kind))) == [("warning", "")]


def test_the_cause_that_is_told() -> None:
    """Of several the first that has no finding of its own; without an audit nothing is known."""
    (symptom,) = judged("loss-off", *in_order(*[audited(1.3, "shift", "items", "ranks")] * 2)) or ()
    assert symptom.message.endswith("because of items")
    assert symptom.evidence == {"ratio": 1.3, "backpropagated": 2.0, "expected": 2.0}
    assert seen("loss-off", record()) is None


@pytest.mark.parametrize("kind", ["masked", "nonfinite", "accumulation", "shift", "padding", "audio", "log"])
def test_causes_with_findings_of_their_own(kind: str) -> None:
    """They are not told twice."""
    assert seen("loss-off", *in_order(audited(1.3, kind), audited(1.3, kind))) == []


@pytest.mark.parametrize("kind", ["loss_function", "forward", "override"])
def test_a_loss_that_may_be_meant(kind: str) -> None:
    """What somebody wrote and what changes from step to step is worth knowing; a constant factor is a warning."""
    assert seen("loss-off", *in_order(audited(1.3, kind), audited(1.31, kind))) == [("info", "")]
    assert seen("loss-off", *in_order(audited(3.0, kind), audited(3.005, kind))) == [("warning", "")]
    assert seen("loss-off", *in_order(audited(1.3, kind), audited(1.31, kind, "items"))) == [("warning", "")]


def spoken(labels: int | None = 24, *, text: int = 12, calls: int = 1, **changes: Any) -> StepRecord:
    scored = Accuracy(24, 3.0) if calls else None
    heads = (Head("text_head", "text", 1, accuracy=Accuracy(12, 2.0)), Head("audio_head", "audio", calls, accuracy=scored))
    checks = BatchChecks(4, labels=LabelChecks(text), audio_labels=labels)
    rows = tuple(ActivationGradient(site, 1, 0.1, 0.1) for site in ("text_head", "audio_head"))
    return record(**{"heads": heads, "checks": checks, "loss_audit": FINE.loss_audit, "activation_gradients": rows, **changes})


def test_audio_labels_that_are_all_masked() -> None:
    """Three times in a row, while text has labels."""
    none = spoken(0)
    assert seen("audio-loss-missing", *in_order(none, none, none)) == [("critical", "")]
    assert seen("audio-loss-missing", *in_order(none, none)) == []
    assert seen("audio-loss-missing", *in_order(none, none, spoken(1))) == []
    assert seen("audio-loss-missing", *in_order(*[spoken(0, text=0)] * 3)) == []
    unlabelled = replace(none, checks=BatchChecks(4, audio_labels=0))
    assert seen("audio-loss-missing", *in_order(*[unlabelled] * 3)) == []
    assert seen("audio-loss-missing", *in_order(none, none, spoken(None))) is None
    assert seen("audio-loss-missing", record()) is None


def test_an_audio_head_that_is_not_called() -> None:
    """Twice in a row, and no other audio head was; one that is evaluated without being called serves."""
    idle = spoken(calls=0)
    assert seen("audio-loss-missing", *in_order(idle, idle)) == [("critical", "")]
    assert seen("audio-loss-missing", idle) == []
    assert seen("audio-loss-missing", *in_order(idle, spoken())) == []
    evaluated = replace(idle, heads=(Head("audio_head", "audio", 0, accuracy=Accuracy(24, 3.0)),))
    assert seen("audio-loss-missing", *in_order(evaluated, evaluated)) == []
    beside = replace(evaluated, heads=(idle.heads[0], *evaluated.heads), activation_gradients=idle.activation_gradients[:1])
    assert seen("audio-loss-missing", *in_order(beside, beside)) == []
    nothing = replace(idle, heads=(idle.heads[0], Head("audio_head", "audio", 0, accuracy=Accuracy(0))))
    assert seen("audio-loss-missing", *in_order(nothing, nothing)) == [("critical", "")]
    unscored = replace(idle, heads=(idle.heads[0], Head("audio_head", "audio", 1)))
    assert seen("audio-loss-missing", *in_order(unscored, unscored)) == []
    assert seen("audio-loss-missing", *in_order(*[spoken(0, calls=0)] * 2)) == []
    both = (*idle.heads, Head("audio_head_2", "audio", 1, accuracy=Accuracy(24, 3.0)))
    another = replace(idle, heads=both, activation_gradients=())
    assert seen("audio-loss-missing", *in_order(another, another)) == []
    blind = replace(idle, not_measured={"heads": "switched off"})
    assert seen("audio-loss-missing", *in_order(blind, blind)) == []
    assert seen("audio-loss-missing", *in_order(*[replace(idle, heads=idle.heads[:1])] * 2)) == []


def test_a_loss_without_that_of_the_audio() -> None:
    """Twice in a row the audit finds that the loss is that of the text alone."""
    missing = spoken(loss_audit=audited(0.4, "audio").loss_audit)
    assert seen("audio-loss-missing", *in_order(missing, missing)) == [("critical", "")]
    assert seen("audio-loss-missing", missing) == []
    assert seen("audio-loss-missing", *in_order(missing, spoken())) == []
    assert seen("audio-loss-missing", *in_order(*[spoken(loss_audit=None)] * 2)) == []


@pytest.mark.parametrize("rows", [(ActivationGradient("text_head", 1, 0.1, 0.1),), None])
def test_an_audio_head_without_a_gradient(rows: tuple[ActivationGradient, ...] | None) -> None:
    """Twice in a row none, or one of exactly 0, while the text head has one."""
    zero = (ActivationGradient("text_head", 1, 0.1, 0.1), ActivationGradient("audio_head", 1, 0.0, 0.0))
    cut = spoken(activation_gradients=zero if rows is None else rows)
    assert seen("audio-loss-missing", *in_order(cut, cut)) == [("critical", "")]
    assert seen("audio-loss-missing", cut) == []
    assert seen("audio-loss-missing", *in_order(cut, spoken())) == []
    assert seen("audio-loss-missing", *in_order(*[spoken(activation_gradients=())] * 2)) == []
    nothing = replace(cut, checks=BatchChecks(4, labels=LabelChecks(12), audio_labels=0))
    assert seen("audio-loss-missing", *in_order(nothing, nothing)) == []


def outputs(*rows: SiteStatistics, **changes: Any) -> StepRecord:
    return record(statistics=rows, **changes)


def site(name: str, rms: float | None = 1.0, role: Any = "attention", **changes: Any) -> SiteStatistics:
    return SiteStatistics(name, role, **{"calls": 1, "elements": 100, "rms": rms, "dtype": "torch.float32", **changes})


def broken(name: str, **changes: Any) -> SiteStatistics:
    return site(name, None, nonfinite=3, **changes)


def test_the_first_site_that_is_not_finite() -> None:
    """One finding, at the first in the order of the forward; logits are not meant, because some models mask them with -Inf."""
    bad = outputs(site("layers.0"), broken("layers.1"), broken("layers.2"))
    assert seen("activation-not-finite", bad) == [("critical", "layers.1")]
    (symptom,) = judged("activation-not-finite", bad) or ()
    assert symptom.message == "3 of 100 values in the output of layers.1 are NaN or Inf, and of 1 more sites"
    assert seen("activation-not-finite", outputs(site("layers.0"))) == []
    assert seen("activation-not-finite", outputs(site("layers.0"), broken("lm_head", role="lm_head"))) == []
    assert seen("activation-not-finite", outputs(broken("layers.0", calls=0))) is None
    assert seen("activation-not-finite", outputs(broken("layers.0", elements=0))) is None
    assert seen("activation-not-finite", record()) is None


def test_a_site_that_it_is_open_at() -> None:
    """When more sites follow, the finding stays where it began."""
    opened = Finding("activation-not-finite", "critical", "layers.1", 1, "")
    first = outputs(site("layers.0"), broken("layers.1"), findings=(opened,))
    assert seen("activation-not-finite", *in_order(first, outputs(broken("layers.0"), broken("layers.1")))) == [("critical", "layers.1")]
    assert seen("activation-not-finite", *in_order(first, outputs(broken("layers.0"), site("layers.1")))) == [("critical", "layers.0")]


def test_values_that_nothing_looks_at() -> None:
    """While loss and gradient are finite it is a warning."""
    learns = {"optimisation": Optimisation(2.0), "parts": (Part("rest", 10, 1.0, 0, 0.1, tensors=2),)}
    assert seen("activation-not-finite", outputs(broken("layers.0"), **learns)) == [("warning", "layers.0")]
    frozen, unread = Part("lm_head", 10, 0.0, gradient_norm=0.1), Part("rest", 10, 1.0, None, None, tensors=2)
    for untold in (
        {"parts": (frozen,)},
        {"parts": (unread,)},
        {"optimisation": None},
        {"optimisation": Optimisation(None)},
        {"parts": ()},
        {"parts": (Part("rest", 10, 1.0, 0, 0.1, 2, nonfinite=True),)},
    ):
        assert seen("activation-not-finite", outputs(broken("layers.0"), **{**learns, **untold})) == [("critical", "layers.0")]


def sizes(*values: float | None, name: str = "layers.0") -> list[StepRecord]:
    return [outputs(site(name, value)) for value in values]


def test_an_output_that_explodes() -> None:
    """A hundred times its median, and ten times its largest, of eight records and more."""
    before = sizes(1.0, 2.0, 1.0, 1.0, 3.0, 1.0, 1.0, 1.0)
    assert seen("activation-exploding", *in_order(*before, *sizes(101.0))) == [("warning", "layers.0")]
    assert seen("activation-exploding", *in_order(*before, *sizes(99.0))) == []
    assert seen("activation-exploding", *in_order(*before[:7], *sizes(101.0))) == []
    assert seen("activation-exploding", *in_order(*before[:7], *sizes(11.0, 101.0))) == []
    assert seen("activation-exploding", *in_order(*before, *sizes(101.0, name="layers.1"))) == []
    assert seen("activation-exploding", *in_order(*sizes(*[0.0] * 8), *sizes(101.0))) == []
    logits = [outputs(site("lm_head", value, "lm_head")) for value in (*[1.0] * 8, 101.0)]
    assert seen("activation-exploding", *in_order(*logits)) is None
    assert seen("activation-exploding", *in_order(*before, *sizes(None))) is None


def test_an_explosion_that_lasts() -> None:
    """It is held against the median from before it, at the site where it began."""
    opened = Finding("activation-exploding", "warning", "layers.0", 9, "", {"median": 1.0})
    large = replace(sizes(150.0)[0], findings=(opened,))
    assert seen("activation-exploding", *in_order(*sizes(*[1.0] * 8), large, *sizes(120.0))) == [("warning", "layers.0")]
    assert seen("activation-exploding", *in_order(*sizes(*[1.0] * 8), large, *sizes(90.0))) == []


def test_what_an_explosion_is_held_against() -> None:
    """Records without the output, or with one that is not finite, are passed over; what is open at another site is no standard."""
    elsewhere = Finding("activation-exploding", "warning", "layers.9", 9, "", {"median": 1e-3})
    by_dtype = Finding("activation-exploding", "warning", "layers.0", 9, "", {"largest": 4e4})
    last = replace(sizes(1.0)[0], findings=(elsewhere, by_dtype))
    before = sizes(*[1.0] * 7, None)
    assert seen("activation-exploding", *in_order(*before, last, *sizes(1.5))) == []
    assert seen("activation-exploding", *in_order(*before, last, *sizes(101.0))) == [("warning", "layers.0")]
    calm = [outputs(site("layers.0"), site("layers.1")) for _ in range(8)]
    assert seen("activation-exploding", *in_order(*calm, outputs(site("layers.0"), site("layers.1", 101.0)))) == [("warning", "layers.1")]
    broken_too = outputs(broken("layers.0"), site("layers.1", 101.0))
    assert seen("activation-exploding", *in_order(*calm, broken_too)) == [("warning", "layers.1")]


def test_the_end_of_float16() -> None:
    """A value beyond half of the largest, whatever came before; bfloat16 reaches further."""
    for least, most, found in ((-1.0, 32_753.0, True), (-32_753.0, 1.0, True), (-1.0, 32_752.0, False), (None, None, False)):
        row = site("layers.0", minimum=least, maximum=most, dtype="torch.float16")
        assert seen("activation-exploding", outputs(row)) == ([("warning", "layers.0")] if found else [])
        assert seen("activation-exploding", outputs(replace(row, dtype="torch.bfloat16"))) == []


def test_a_layer_that_gives_nothing() -> None:
    """Below a millionth three times in a row, while something else is there; encoder, projector and branches have other findings."""
    other, small = site("encoder", 1.1e-3, "audio_encoder"), site("layers.1", 0.9e-6)
    bad = outputs(site("layers.0"), small)
    assert seen("activation-vanishing", *in_order(bad, bad, bad)) == [("warning", "layers.1")]
    assert seen("activation-vanishing", *in_order(bad, bad)) == []
    assert seen("activation-vanishing", *in_order(bad, bad, outputs(site("layers.0"), site("layers.1", 1.1e-6)))) == []
    assert seen("activation-vanishing", *in_order(*[outputs(small, other)] * 3)) == [("warning", "layers.1")]
    assert seen("activation-vanishing", *in_order(*[outputs(small, replace(other, rms=0.9e-3))] * 3)) == []
    for role in ("audio_encoder", "projector", "feed_forward", "lm_head"):
        assert not seen("activation-vanishing", *in_order(*[outputs(site("layers.0"), replace(small, role=role))] * 3))
    assert seen("activation-vanishing", *in_order(*[outputs(other)] * 3)) is None
    unknown = outputs(broken("layers.0"), site("layers.1"), small)
    assert seen("activation-vanishing", *in_order(unknown, unknown, unknown)) == [("warning", "layers.1")]
    assert seen("activation-vanishing", *in_order(*[outputs(broken("layers.0"), other)] * 3)) is None
    assert seen("activation-vanishing", *in_order(*[outputs(replace(small, calls=0), other)] * 3)) is None


def test_healthy_records_have_none() -> None:
    """Whole records of healthy steps: no rule of loss and outputs says anything."""
    codes = ("loss-not-finite", "loss-scaled-by-accumulation", "loss-off", "audio-loss-missing")
    for made in (whisper_record, speech_record):
        records = [replace(made(), step=number, loss_audit=FINE.loss_audit) for number in range(1, 12)]
        for code in (*codes, "activation-not-finite", "activation-exploding", "activation-vanishing"):
            assert not seen(code, *records)
