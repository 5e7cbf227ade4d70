"""Rules about which parts a gradient reaches, how large it is, and what the update does."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from judging import DECODER, in_order, judged, record, repeated, seen
from probe.records import (
    Accuracy,
    ActivationGradient,
    AudioChecks,
    BatchChecks,
    Branches,
    Conditioning,
    Finding,
    Head,
    LossAudit,
    Modes,
    Optimisation,
    Part,
    Setup,
    SiteStatistics,
    StepRecord,
)

pytestmark = pytest.mark.pure  # of torch and probe alone: the same with every transformers

ENCODER = Part("audio_encoder", 500, 1.0, without_gradient=0, gradient_norm=0.2, tensors=10)
REST = Part("rest", 1000, 1.0, without_gradient=0, gradient_norm=0.9, tensors=20)
HEAD = Head("lm_head", "text", 1, accuracy=Accuracy(40, 2.0, 0.3))
AUDIT = LossAudit(2.0, 2.0, 1.0)


def absent(part: Part) -> Part:
    return replace(part, without_gradient=part.tensors, gradient_norm=None)


def zero(part: Part) -> Part:
    return replace(part, gradient_norm=0.0)


def step(*parts: Part, **changes: Any) -> StepRecord:
    given: dict[str, Any] = {"optimisation": Optimisation(2.0, (1e-4,), 0.9), "loss_audit": AUDIT, "heads": (HEAD,), **changes}
    return record(parts=parts, **given)


def test_no_gradient_anywhere() -> None:
    """No tensor that trains has one; a single one that has, frozen parts and what could not be read make it another matter."""
    frozen = Part("lm_head", 10, 0.0)
    assert seen("backward-never-ran", step(absent(ENCODER), absent(REST), frozen)) == [("critical", "")]
    assert seen("backward-never-ran", step(absent(ENCODER), replace(REST, without_gradient=19))) == []
    assert seen("backward-never-ran", step(absent(ENCODER), replace(REST, without_gradient=None))) is None
    assert seen("backward-never-ran", step(frozen)) is None
    (symptom,) = judged("backward-never-ran", step(absent(ENCODER), absent(REST))) or ()
    assert symptom.message.startswith("none of the 30 tensors")


def test_no_gradient_left() -> None:
    """In a loop of one's own they may have been cleared, and some optimizers use them up in the backward: nothing can be said."""
    both = (absent(ENCODER), absent(REST))
    assert seen("backward-never-ran", step(*both, optimisation=Optimisation(None), loss_audit=None)) is None
    assert seen("backward-never-ran", step(*both, optimisation=None, loss_audit=None)) is None
    assert seen("backward-never-ran", step(*both, activation_gradients=(ActivationGradient("lm_head", 1, 0.1, 0.1),))) is None
    assert seen("backward-never-ran", step(*both, loss_audit=None)) == [("critical", "")]
    # A loss that is NaN is no number in the record, but was backpropagated, or not.
    assert seen("backward-never-ran", step(*both, optimisation=Optimisation(None), loss_audit=LossAudit())) == [("critical", "")]


def test_gradients_of_a_loss_of_something_else() -> None:
    """All are exactly 0 and the predictions are not; any other number, or perfect predictions, are no finding."""
    assert seen("loss-not-connected", step(zero(ENCODER), zero(REST))) == [("critical", "")]
    assert seen("loss-not-connected", step(absent(ENCODER), zero(REST))) == [("critical", "")]
    assert seen("loss-not-connected", step(zero(ENCODER), replace(REST, gradient_norm=1e-30))) == []
    perfect = Head("lm_head", "text", 1, accuracy=Accuracy(40, 0.9e-4, 1.0))
    assert seen("loss-not-connected", step(zero(ENCODER), zero(REST), heads=(perfect,))) == []
    assert seen("loss-not-connected", step(zero(ENCODER), zero(REST), heads=())) is None
    silent = (Head("a", "text", 0), Head("b", "text", 0, accuracy=Accuracy(0)))
    assert seen("loss-not-connected", step(zero(ENCODER), zero(REST), heads=(*silent, HEAD))) == [("critical", "")]
    assert seen("loss-not-connected", step(zero(ENCODER), zero(REST), heads=silent)) is None
    assert seen("loss-not-connected", record(heads=(HEAD,))) is None
    assert seen("loss-not-connected", step(absent(ENCODER), absent(REST))) is None
    assert seen("loss-not-connected", step(zero(ENCODER), replace(REST, gradient_norm=None, nonfinite=True))) is None


def test_a_part_that_is_cut_off() -> None:
    """Twice in a row; critical for an encoder, a warning for what else there is; once may be chance."""
    bad = step(absent(ENCODER), REST)
    assert seen("part-without-gradient", *in_order(bad, bad)) == [("critical", "audio_encoder")]
    assert seen("part-without-gradient", bad) == []
    assert seen("part-without-gradient", *in_order(bad, step(ENCODER, REST))) == []
    other = step(ENCODER, absent(replace(REST, name="embedding")))
    assert seen("part-without-gradient", *in_order(other, other)) == [("warning", "embedding")]
    assert seen("part-without-gradient", *in_order(*[step(absent(ENCODER), absent(REST))] * 2)) is None
    assert seen("part-without-gradient", *in_order(*[step(absent(ENCODER), zero(REST))] * 2)) is None
    assert seen("part-without-gradient", *in_order(*[step(absent(ENCODER), replace(REST, without_gradient=None))] * 2)) is None
    assert seen("part-without-gradient", record()) is None
    # Steps in which nothing could be read, the part was not there, or nothing had a gradient do not count.
    for between in (record(), step(REST), step(absent(ENCODER), absent(REST)), step(absent(ENCODER), replace(REST, without_gradient=None))):
        assert seen("part-without-gradient", *in_order(bad, between, bad)) == [("critical", "audio_encoder")]
        assert seen("part-without-gradient", *in_order(between, bad)) == []


def test_a_part_whose_gradient_is_zero() -> None:
    """Three times in a row: a gate that begins at 0 is open by then."""
    bad = step(zero(ENCODER), REST)
    assert seen("part-without-gradient", *in_order(bad, bad, bad)) == [("critical", "audio_encoder")]
    assert seen("part-without-gradient", *in_order(bad, bad)) == []
    assert seen("part-without-gradient", *in_order(bad, bad, step(ENCODER, REST))) == []
    assert seen("part-without-gradient", *in_order(bad, step(absent(ENCODER), REST), bad)) == [("critical", "audio_encoder")]


def test_adapters_have_a_finding_of_their_own() -> None:
    """They are not told twice."""
    bad = step(absent(replace(ENCODER, name="adapters")), REST)
    assert seen("part-without-gradient", *in_order(bad, bad)) == []


@pytest.mark.parametrize(
    ("silent", "judged_anyway"),
    [
        ({"conditioning": Conditioning("encoder", 0)}, False),
        ({"conditioning": Conditioning("encoder", 1)}, True),
        ({"conditioning": Conditioning("", 0)}, True),
        ({"checks": BatchChecks(4, audio=AudioChecks("log-mel", 4, placeholders=0))}, True),
        ({"checks": BatchChecks(4, audio=AudioChecks("log-mel", 4, placeholders=0, frames=8))}, False),
        ({"checks": BatchChecks(4, audio=AudioChecks("log-mel", 4, placeholders=8, frames=8))}, True),
        ({"branches": (Branches("layer", 9, 0),)}, False),
        ({"branches": (Branches("layer", 9, 3),)}, True),
        ({"branches": (Branches("layer", 9, 3),), "conditioning": Conditioning("encoder", 0)}, True),
    ],
)
def test_steps_without_audio(silent: dict[str, Any], judged_anyway: bool) -> None:
    """What serves audio is judged only in steps that have some; other parts in every step."""
    for part in (ENCODER, replace(ENCODER, name="projector"), replace(ENCODER, name="audio_branch")):
        bad = step(absent(part), REST, **silent)
        found = [("critical", part.name)] if judged_anyway else []
        assert seen("part-without-gradient", *in_order(bad, bad)) == found
    bad = step(absent(replace(ENCODER, name="lm_head")), REST, **silent)
    assert seen("part-without-gradient", *in_order(bad, bad)) == [("critical", "lm_head")]


def layered(*cut: int, dropped: tuple[int, ...] = (), **changes: Any) -> StepRecord:
    rows = [Part(f"layers.{index}", 100, 1.0, 5 if index in cut else 0, tensors=5) for index in range(4)]
    sites = [SiteStatistics(f"layers.{index}.attn", "attention", 0 if index in dropped else 1) for index in range(4)]
    rest = Part("rest", 400, 1.0, 5 * len(cut), 0.9, tensors=20)
    return step(rest, layers=(*rows, absent(rest)), statistics=tuple(sites), **changes)


def test_single_layers() -> None:
    """Always the same ones three times in a row; the first names the site, and the rest of a part is no layer."""
    bad = layered(1, 3)
    assert seen("part-without-gradient", *in_order(bad, bad, bad)) == [("warning", "layers.1")]
    assert seen("part-without-gradient", *in_order(bad, bad)) == []
    assert seen("part-without-gradient", *in_order(*[layered()] * 3)) == []
    assert seen("part-without-gradient", *in_order(*[replace(bad, conditioning=Conditioning("encoder", 0))] * 3)) == []
    (symptom,) = judged("part-without-gradient", *in_order(bad, bad, bad)) or ()
    assert symptom.evidence == {"layers": 2.0}


def test_layers_that_cannot_be_judged() -> None:
    """Without layers, or where one could not be read, nothing is said of them; without sites they are taken to have run."""
    bad = layered(1)
    for other in (replace(bad, layers=()), replace(bad, layers=(replace(bad.layers[0], without_gradient=None), *bad.layers[1:]))):
        assert seen("part-without-gradient", *in_order(bad, bad, other)) == []
        assert seen("part-without-gradient", *in_order(bad, bad, bad, other)) == []
        assert seen("part-without-gradient", *in_order(bad, other, bad)) == []
        assert seen("part-without-gradient", *in_order(bad, other, bad, bad)) == [("warning", "layers.1")]
    assert seen("part-without-gradient", *in_order(*[replace(bad, statistics=())] * 3)) == [("warning", "layers.1")]
    whole = replace(bad, statistics=(SiteStatistics("layers.1", "custom", 0),))
    assert seen("part-without-gradient", *in_order(whole, whole, whole)) == []
    frozen = replace(bad, layers=(*bad.layers, Part("layers.9", 100, 0.0)))
    assert seen("part-without-gradient", *in_order(frozen, frozen, frozen)) == [("warning", "layers.1")]


def test_layers_that_change() -> None:
    """Where not always the same layers lack a gradient, one must lack it eight times in a row."""
    changing = [layered(1), layered(1, 2), layered(1), layered(1, 3)]
    assert seen("part-without-gradient", *in_order(*changing)) == []
    assert seen("part-without-gradient", *in_order(*changing, *changing[:3])) == []
    assert seen("part-without-gradient", *in_order(*changing, *changing)) == [("warning", "layers.1")]
    assert seen("part-without-gradient", *in_order(*changing, layered(2), *changing[:3])) == []


def test_layers_that_were_left_out() -> None:
    """Layerdrop: a layer that was not run has no gradient, and that is as it should be."""
    bad = layered(1, dropped=(1,))
    assert seen("part-without-gradient", *in_order(bad, bad, bad)) == []


def gradients(norm: float | None, *, bad: bool = False, scale: float | None = None, clipped: float | None = None) -> StepRecord:
    part = Part("rest", 100, 1.0, 0, norm, tensors=5, nonfinite=bad, clipped_norm=clipped)
    return record(parts=(part,), optimisation=Optimisation(2.0, (1e-4,), norm, scale))


FINE, NAN = gradients(1.0), gradients(None, bad=True)


def test_gradients_that_are_not_finite() -> None:
    """Twice in three records; once is bad luck, and what has passed is over."""
    assert seen("gradient-not-finite", *in_order(NAN, FINE, NAN)) == [("critical", "")]
    assert seen("gradient-not-finite", *in_order(NAN, NAN)) == [("critical", "")]
    assert seen("gradient-not-finite", *in_order(NAN)) == []
    assert seen("gradient-not-finite", *in_order(NAN, NAN, FINE)) == []
    assert seen("gradient-not-finite", *in_order(NAN, FINE, FINE, NAN)) == []
    assert seen("gradient-not-finite", record(parts=(Part("rest", 100, 1.0, None, tensors=5),))) is None
    assert seen("gradient-not-finite", record()) is None


def test_gradients_that_were_not_read() -> None:
    """Frozen parts and unread ones say nothing; a part may be known to be broken without being read."""
    unread = record(parts=(Part("rest", 100, 1.0, None, tensors=5, nonfinite=True), Part("lm_head", 10, 0.0, without_gradient=0)))
    assert seen("gradient-not-finite", *in_order(unread, unread)) == [("critical", "")]
    assert seen("gradient-not-finite", record(parts=(Part("lm_head", 10, 0.0, without_gradient=0),))) is None
    bare = replace(NAN, optimisation=None)
    assert seen("gradient-not-finite", *in_order(bare, bare)) == [("critical", "")]
    assert seen("gradient-exploding", bare) is None


def test_where_it_begins() -> None:
    """Going back from the loss, the first site with a gradient that is not finite is named: the last one of the forward."""
    rows = tuple(ActivationGradient(f"layers.{index}", 1, nonfinite=int(index < 3)) for index in range(5))
    bad = replace(NAN, activation_gradients=rows)
    (symptom,) = judged("gradient-not-finite", *in_order(bad, bad)) or ()
    assert symptom.message.endswith("it begins at layers.2")


def test_the_search_of_the_loss_scale() -> None:
    """Under fp16 overflows are how the scale is found: only 16 steps of nothing else are a finding."""
    bad, fine = gradients(None, bad=True, scale=2.0**16), gradients(1.0, scale=1.0)
    assert seen("gradient-not-finite", *in_order(*[bad] * 17)) == [("critical", "")]
    assert seen("gradient-not-finite", *in_order(*[bad] * 16)) == []
    assert seen("gradient-not-finite", *in_order(*[bad] * 8, fine, *[bad] * 8)) == []
    assert seen("gradient-not-finite", *in_order(bad, bad, bad, every=8)) == [("critical", "")]
    assert seen("gradient-not-finite", *in_order(bad, bad, every=100)) == []


def test_a_gradient_that_explodes() -> None:
    """A hundred times the median of eight records and more, ten times the largest, and above what is clipped."""
    before = [gradients(norm) for norm in (1.0, 3.0, 1.0, 1.0, 2.0, 1.0, 1.0, 1.0)]
    assert seen("gradient-exploding", *in_order(*before, gradients(101.0))) == [("warning", "")]
    assert seen("gradient-exploding", *in_order(*before, gradients(99.0))) == []
    assert seen("gradient-exploding", *in_order(*before[:7], gradients(101.0))) == []
    assert seen("gradient-exploding", *in_order(*before[:7], gradients(11.0), gradients(101.0))) == []
    assert seen("gradient-exploding", *in_order(*before, gradients(101.0)), setup=Setup(max_grad_norm=200.0)) == []
    small = [gradients(1e-4)] * 8
    assert seen("gradient-exploding", *in_order(*small, gradients(0.9))) == []
    assert seen("gradient-exploding", *in_order(*small, gradients(0.9)), setup=Setup(max_grad_norm=0.5)) == [("warning", "")]
    assert seen("gradient-exploding", *in_order(*before, NAN)) is None
    assert seen("gradient-exploding", *in_order(*[gradients(0.0)] * 8, gradients(101.0))) == []


def test_an_explosion_that_lasts() -> None:
    """While it lasts it is held against the median from before it."""
    opened = Finding("gradient-exploding", "warning", "", 9, "", {"median": 1.0})
    large = replace(gradients(150.0), findings=(opened,))
    assert seen("gradient-exploding", *in_order(*[FINE] * 8, large, gradients(120.0))) == [("warning", "")]
    assert seen("gradient-exploding", *in_order(*[FINE] * 8, large, gradients(90.0))) == []


def test_clipping_that_is_open_is_no_standard() -> None:
    """A finding that clipping opened holds no median."""
    opened = Finding("gradient-exploding", "warning", "", 9, "", {"clipped_by": 2000.0})
    assert seen("gradient-exploding", *in_order(*[FINE] * 8, replace(FINE, findings=(opened,)), gradients(101.0))) == [("warning", "")]


def test_a_gradient_that_is_clipped_away() -> None:
    """By more than a thousand, three times in a row."""
    away, nearly = gradients(2.0, clipped=1.9e-3), gradients(2.0, clipped=2.1e-3)
    assert seen("gradient-exploding", *in_order(away, away, away)) == [("warning", "")]
    assert seen("gradient-exploding", *in_order(away, away)) == []
    assert seen("gradient-exploding", *in_order(away, nearly, away)) == []
    assert seen("gradient-exploding", *in_order(*[gradients(2.0, clipped=0.0)] * 3)) == []
    unknown = replace(away, optimisation=None)
    assert seen("gradient-exploding", *in_order(away, unknown, away)) == []
    assert seen("gradient-exploding", *in_order(away, unknown, away, away)) == [("warning", "")]


def faded(share: float, *, first: float | None = None) -> StepRecord:
    rows = (ActivationGradient("layers.0", 1, 1.0, share if first is None else first), ActivationGradient("lm_head", 1, 1.0, 1.0))
    return record(activation_gradients=rows)


def test_a_gradient_that_vanishes() -> None:
    """A millionth of that at the heads, in three records over ten steps; exactly 0 is another finding."""
    bad = faded(0.9e-6)
    assert seen("gradient-vanishing", *in_order(bad, bad, bad, every=5)) == [("warning", "layers.0")]
    assert seen("gradient-vanishing", *in_order(bad, bad, bad)) == []
    assert seen("gradient-vanishing", *in_order(bad, bad, every=20)) == []
    assert seen("gradient-vanishing", *in_order(bad, faded(1.1e-6), bad, every=5)) == []
    assert seen("gradient-vanishing", *in_order(bad, faded(0.0), bad, every=5)) == []
    assert seen("gradient-vanishing", *in_order(bad, bad, faded(0.0), every=5)) is None
    assert seen("gradient-vanishing", record(activation_gradients=bad.activation_gradients[:1])) is None
    silent = record(activation_gradients=(bad.activation_gradients[0], ActivationGradient("lm_head", 1, 0.0, 0.0)))
    assert seen("gradient-vanishing", silent) is None
    unread = record(activation_gradients=(ActivationGradient("encoder", 1, nonfinite=1), *bad.activation_gradients))
    assert seen("gradient-vanishing", *in_order(unread, unread, unread, every=5)) == [("warning", "layers.0")]
    assert seen("gradient-vanishing", record()) is None


def rates(*values: float, **changes: Any) -> StepRecord:
    return record(optimisation=Optimisation(2.0, values), **changes)


def test_a_learning_rate_of_zero() -> None:
    """Of every group, three times in a row; not the first step of a warm-up, not the last of all."""
    none = rates(0.0, 0.0)
    assert seen("learning-rate-zero", *in_order(none, none, none)) == [("critical", "")]
    assert seen("learning-rate-zero", *in_order(none, none)) == []
    assert seen("learning-rate-zero", *in_order(none, none, every=40)) == []
    assert seen("learning-rate-zero", *in_order(none, none, rates(0.0, 1e-9))) == []
    assert seen("learning-rate-zero", *in_order(none, rates(1e-9), none)) == []
    assert seen("learning-rate-zero", *in_order(none, none, none, every=50), setup=DECODER) == []
    assert seen("learning-rate-zero", *in_order(none, none, none, every=49), setup=DECODER) == [("critical", "")]
    for unknown in (record(), rates()):
        assert seen("learning-rate-zero", unknown) is None


def moved(share: float | None, *, dtype: str = "float32", rate: float = 1e-4, ratio: float | None = 0.0, **others: float) -> StepRecord:
    parts = [Part("rest", 900, 1.0, tensors=5, unchanged_share=share, dtype=dtype, update_ratio=ratio)]
    parts += [Part(name, 100, 1.0, tensors=2, unchanged_share=value, dtype=dtype) for name, value in others.items()]
    return rates(rate, parts=tuple(parts))


def test_updates_below_the_resolution() -> None:
    """More than half of the weights stay, three times in a row, in float32: a warning; in bfloat16 it is another finding."""
    bad = moved(0.51)
    assert seen("learning-rate-too-small", *in_order(bad, bad, bad)) == [("warning", "")]
    assert seen("learning-rate-too-small", *in_order(bad, bad)) == []
    assert seen("learning-rate-too-small", *in_order(bad, moved(0.5), bad)) == []
    assert seen("learning-rate-too-small", *in_order(*[moved(0.51, dtype="bfloat16")] * 3)) is None
    assert seen("update-lost-to-rounding", *in_order(bad, bad, bad)) is None
    assert seen("learning-rate-too-small", *in_order(*[moved(None)] * 3)) is None
    (symptom,) = judged("learning-rate-too-small", *in_order(*[moved(0.1, projector=1.0)] * 3)) or ()
    assert "100% of projector (float32)" in symptom.message
    assert symptom.evidence["unchanged_share/projector"] == 1.0
    assert "unchanged_share/rest" not in symptom.evidence


@pytest.mark.parametrize(
    ("dtype", "roundoff"), [("float32", 2.0**-24), ("float64", 2.0**-53), ("bfloat16", 2.0**-8), ("float16", 2.0**-11)]
)
def test_weights_of_which_some_move(dtype: str, roundoff: float) -> None:
    """Where the update as a whole is above the roundoff, those that stay have next to no gradient: no finding."""
    code = "update-lost-to-rounding" if "float16" in dtype else "learning-rate-too-small"
    assert seen(code, *in_order(*[moved(0.9, dtype=dtype, ratio=roundoff)] * 3)) == []
    for ratio in (0.99 * roundoff, None):
        found = seen(code, *in_order(*[moved(0.9, dtype=dtype, ratio=ratio)] * 3))
        assert [site for _, site in found or ()] == [""]


def test_rates_that_are_small_on_purpose() -> None:
    """A warm-up, and a schedule near its end, are not judged."""
    bad = moved(1.0)
    assert seen("learning-rate-too-small", *in_order(bad, bad, bad), setup=replace(DECODER, warmup_steps=1)) == []
    assert seen("learning-rate-too-small", *in_order(bad, bad, bad), setup=replace(DECODER, warmup_steps=3)) is None
    assert seen("learning-rate-too-small", *in_order(*[bad] * 4), setup=replace(DECODER, warmup_steps=1)) == [("warning", "")]
    high, low = moved(0.0, rate=1e-4), moved(1.0, rate=0.99e-5)
    assert seen("learning-rate-too-small", *in_order(high, low, low, low)) is None
    assert seen("learning-rate-too-small", *in_order(high, *[moved(1.0, rate=1.01e-5)] * 3)) == [("warning", "")]
    assert seen("learning-rate-too-small", *in_order(*[moved(1.0, rate=0.0)] * 3)) is None


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_updates_that_are_rounded_away(dtype: str) -> None:
    """Critical where it is most of all weights in half precision, a warning where it is a small part."""
    lost = moved(0.9, dtype=dtype)
    assert seen("update-lost-to-rounding", *in_order(lost, lost, lost)) == [("critical", "")]
    assert seen("update-lost-to-rounding", *in_order(lost, lost)) == []
    assert seen("update-lost-to-rounding", *in_order(*[moved(0.5, dtype=dtype)] * 3)) == []
    part = moved(0.1, dtype=dtype, projector=0.9)
    assert seen("update-lost-to-rounding", *in_order(part, part, part)) == [("warning", "")]
    assert seen("update-lost-to-rounding", *in_order(moved(0.9), moved(0.9), moved(0.9))) is None


CODES = ("backward-never-ran", "loss-not-connected", "part-without-gradient", "gradient-not-finite", "gradient-exploding")


def test_healthy_records_have_none() -> None:
    """A model that learns: no rule of gradients and updates says anything."""
    parts = tuple(replace(part, clipped_norm=0.9, unchanged_share=0.001, dtype="float32") for part in (ENCODER, REST))
    fine = step(*parts, activation_gradients=faded(1e-3).activation_gradients, modes=Modes())
    for code in (*CODES, "gradient-vanishing", "learning-rate-zero", "learning-rate-too-small"):
        assert seen(code, *in_order(*[fine] * 12), setup=replace(DECODER, warmup_steps=2)) == []
    assert seen("gradient-not-finite", *repeated(3)) is None
