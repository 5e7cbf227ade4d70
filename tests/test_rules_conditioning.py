"""Rules about the way of the audio into the model, and about the audio that it is conditioned on."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from judging import DECODER, ENCODER_DECODER, in_order, judged, record, repeated, seen, with_audio, with_labels
from probe.records import (
    AudioChecks,
    BatchChecks,
    Conditioning,
    Counterfactual,
    Effect,
    Head,
    Inputs,
    Optimisation,
    Part,
    Setup,
    SiteStatistics,
    StepRecord,
    Use,
    Verdict,
)

pytestmark = pytest.mark.pure  # of torch and probe alone: the same with every transformers

TOKEN = (("audio_token_id", 60),)


def test_an_encoder_that_is_not_called() -> None:
    """Audio came in and the encoder was not called, twice in a row, is critical; once is not, nor is one call."""
    deaf = record(**with_audio(calls=0))
    assert seen("encoder-not-called", *in_order(deaf, deaf)) == [("critical", "encoder")]
    assert seen("encoder-not-called", deaf) == []
    assert seen("encoder-not-called", *in_order(deaf, record(**with_audio(calls=1)))) == []
    assert seen("encoder-not-called", *in_order(record(**with_audio(calls=1)), deaf)) == []
    assert seen("encoder-not-called", *in_order(deaf, record(**with_audio(calls=0, encoder="")))) is None
    assert seen("encoder-not-called", *repeated(2)) is None
    blind = replace(deaf, not_measured={"statistics": "switched off"})
    assert seen("encoder-not-called", *in_order(blind, blind)) is None


def test_what_counts_as_audio() -> None:
    """Clips among the inputs, or placeholders of given audio: each alone is audio; placeholders of audio to predict are not."""
    uncalled = Conditioning("encoder", 0)
    by_inputs = record(conditioning=uncalled, inputs=Inputs(1, 4, audio_clips=4))
    by_tokens = record(conditioning=replace(uncalled, tokens=TOKEN))
    to_predict = record(conditioning=replace(uncalled, tokens=(("audio_out_token_idx", 9),)), inputs=Inputs(1, 4, audio_clips=0))
    assert seen("encoder-not-called", *in_order(by_inputs, by_inputs)) == [("critical", "encoder")]
    assert seen("encoder-not-called", *in_order(by_tokens, by_tokens)) == [("critical", "encoder")]
    assert seen("encoder-not-called", *in_order(to_predict, to_predict)) == []


def test_text_steps_of_a_model_that_could_hear() -> None:
    """Without audio it takes eight steps, and is a warning; text steps between steps with audio are passed over."""
    text = record(conditioning=Conditioning("encoder", 0), **with_labels())
    deaf, hears = record(**with_audio(calls=0)), record(**with_audio())
    assert seen("encoder-not-called", *in_order(*[text] * 8)) == [("warning", "encoder")]
    assert seen("encoder-not-called", *in_order(*[text] * 7)) == []
    assert seen("encoder-not-called", *in_order(hears, *[text] * 7)) == []
    assert seen("encoder-not-called", *in_order(hears, *[text] * 8)) == [("warning", "encoder")]
    assert seen("encoder-not-called", *in_order(deaf, text, deaf)) == [("critical", "encoder")]
    assert seen("encoder-not-called", *in_order(text, deaf)) == []


def test_a_frozen_encoder() -> None:
    """Worth knowing where nothing of it trains; a little is enough."""
    where = Conditioning("model.encoder", 1)
    assert seen("encoder-frozen", record(parts=(Part("audio_encoder", 100, 0.0),), conditioning=where)) == [("info", "model.encoder")]
    assert seen("encoder-frozen", record(parts=(Part("audio_encoder", 100, 0.0),))) == [("info", "")]
    assert seen("encoder-frozen", record(parts=(Part("audio_encoder", 100, 0.01),))) == []
    assert seen("encoder-frozen", record(parts=(Part("rest", 100, 0.0),))) is None


def encoded(time: float | None = 0.4, batch: float | None = 0.3, rms: float | None = 2.0, **more: Any) -> StepRecord:
    row = SiteStatistics("encoder", "audio_encoder", 1, elements=100, rms=rms, std=rms, time_std=time, batch_std=batch)
    distinct = BatchChecks(4, audio=AudioChecks("log-mel", 4, duplicated=0))
    return record(**{"statistics": (row,), "checks": distinct, **more})


@pytest.mark.parametrize(("code", "what"), [("encoder-collapsed-over-time", "time"), ("encoder-collapsed-over-batch", "batch")])
def test_a_collapsed_encoder(code: str, what: str) -> None:
    """Spread below a ten-thousandth of the size, twice in a row; at it, once, or unknown is no finding."""
    below, at = encoded(**{what: 1.9e-4}), encoded(**{what: 2.0e-4})
    assert seen(code, *in_order(below, below)) == [("critical", "encoder")]
    assert seen(code, *in_order(at, at)) == []
    assert seen(code, below) == []
    assert seen(code, *in_order(below, at)) == []
    assert seen(code, *in_order(at, below)) == []
    assert seen(code, *in_order(below, encoded(**{what: None}))) is None
    assert seen(code, *in_order(below, encoded(**{what: 0.0}, rms=None))) is None
    assert seen(code, *in_order(*[encoded(**{what: 0.0}, rms=0.0)] * 2)) == [("critical", "encoder")]
    assert seen(code, *repeated(2)) is None
    other = SiteStatistics("projector", "projector", 1, elements=100, rms=2.0, time_std=0.0, batch_std=0.0)
    assert seen(code, *in_order(*[encoded(statistics=(other,))] * 2)) is None


def test_each_encoder_is_judged_by_itself() -> None:
    """Of two encoders only the one that collapsed is named."""
    well, ill = (
        SiteStatistics(name, "audio_encoder", 1, elements=9, rms=1.0, time_std=spread) for name, spread in (("a", 0.5), ("b", 0.0))
    )
    assert seen("encoder-collapsed-over-time", *in_order(*[encoded(statistics=(well, ill))] * 2)) == [("critical", "b")]
    unmeasured = SiteStatistics("c", "audio_encoder", 1)
    for rows in ((ill, unmeasured), (unmeasured, ill)):
        assert seen("encoder-collapsed-over-time", *in_order(*[encoded(statistics=rows)] * 2)) == [("critical", "b")]


def test_clips_that_are_alike_do_not_collapse_an_encoder() -> None:
    """Copied rows, equal, silent, constant or broken clips explain a batch that comes out alike; such steps are passed over."""
    alike = [
        BatchChecks(4, duplicated_rows=2, audio=AudioChecks("log-mel", 4, duplicated=0)),
        *(BatchChecks(4, audio=AudioChecks("log-mel", 4, **{name: 1})) for name in ("duplicated", "constant", "silent", "nonfinite")),
    ]
    for checks in alike:
        assert seen("encoder-collapsed-over-batch", *in_order(*[encoded(batch=0.0, checks=checks)] * 2)) is None
        assert seen("encoder-collapsed-over-time", *in_order(*[encoded(time=0.0, checks=checks)] * 2)) == [("critical", "encoder")]
    bad, copied = encoded(batch=0.0), encoded(batch=0.0, checks=alike[0])
    assert seen("encoder-collapsed-over-batch", *in_order(bad, copied, bad)) == [("critical", "encoder")]


def test_clips_that_may_be_alike_are_a_warning() -> None:
    """Where nobody knows whether clips differ (several questions about one recording), it is a warning."""
    for checks in (None, BatchChecks(4), BatchChecks(4, audio=AudioChecks("log-mel", 4))):
        assert seen("encoder-collapsed-over-batch", *in_order(*[encoded(batch=0.0, checks=checks)] * 2)) == [("warning", "encoder")]


def projected(
    rms: float | None = 0.2,
    *,
    std: float | None = 0.2,
    time: float | None = 0.1,
    gradient: float | None = 0.0,
    rate: float = 1e-3,
    **more: Any,
) -> StepRecord:
    rows = (
        SiteStatistics("encoder", "audio_encoder", 1, elements=100, rms=1.0, std=1.0, time_std=0.5),
        SiteStatistics("projector", "projector", 1, elements=100, rms=rms, std=std, time_std=time),
    )
    parts = (Part("projector", 100, 1.0, 0, gradient, tensors=2),)
    return record(**{"statistics": rows, "parts": parts, "optimisation": Optimisation(1.0, (0.0, rate)), **more})


def test_a_dead_projector() -> None:
    """An output below a millionth of the encoder's, twice in a row and without a gradient, is critical."""
    dead, alive = projected(0.9e-6, std=0.9e-6, time=None), projected(1.0e-6, std=1e-6, time=None)
    assert seen("projector-dead", *in_order(dead, dead)) == [("critical", "projector")]
    assert seen("projector-dead", *in_order(alive, alive)) == []
    assert seen("projector-dead", dead) == []
    assert seen("projector-dead", *in_order(alive, dead)) == []
    assert seen("projector-dead", *in_order(dead, alive)) == []
    assert seen("projector-dead", *in_order(dead, projected(None))) is None
    assert seen("projector-dead", *repeated(2)) is None
    assert seen("projector-dead", *in_order(*[projected()] * 3)) == []


def test_a_projector_that_answers_with_its_bias() -> None:
    """Constant over all values, or over time alone; not where the encoder's own output is."""
    for one in (projected(std=1.9e-5, time=None), projected(time=1.9e-5)):
        assert seen("projector-dead", *in_order(one, one)) == [("critical", "projector")]
    assert seen("projector-dead", *in_order(*[projected(std=2.1e-5, time=None)] * 2)) == []
    assert seen("projector-dead", *in_order(*[projected(time=2.1e-5)] * 2)) == []
    deaf = projected(time=0.0)
    flat = replace(deaf, statistics=(replace(deaf.statistics[0], time_std=0.9e-4), deaf.statistics[1]))
    assert seen("projector-dead", *in_order(flat, flat)) == []
    unknown = replace(deaf, statistics=(replace(deaf.statistics[0], time_std=None), deaf.statistics[1]))
    assert seen("projector-dead", *in_order(unknown, unknown)) == [("critical", "projector")]
    silent = replace(deaf, statistics=(replace(deaf.statistics[0], rms=0.0), deaf.statistics[1]))
    assert seen("projector-dead", *in_order(silent, silent)) is None


def test_a_projector_that_begins_at_zero() -> None:
    """While a gradient reaches it, it may grow: a warning only after three steps with a learning rate above 0."""
    growing, resting = projected(0.0, gradient=0.1), projected(0.0, gradient=0.1, rate=0.0)
    assert seen("projector-dead", *in_order(growing, growing)) == []
    assert seen("projector-dead", *in_order(growing, growing, growing)) == [("warning", "projector")]
    assert seen("projector-dead", *in_order(*[resting] * 5)) == []
    assert seen("projector-dead", *in_order(resting, growing, growing)) == []
    assert seen("projector-dead", *in_order(projected(gradient=0.1), growing, growing)) == []
    unknown = projected(0.0, gradient=None, optimisation=None)
    assert seen("projector-dead", *in_order(unknown, unknown)) == []
    assert seen("projector-dead", *in_order(unknown, unknown, unknown)) == [("warning", "projector")]


@pytest.mark.parametrize(
    "part", [Part("projector", 100, 0.0), Part("projector", 100, 1.0, 0, 0.0, tensors=2), Part("projector", 100, 1.0, 2, None, tensors=2)]
)
def test_a_projector_that_cannot_grow(part: Part) -> None:
    """Frozen, with a gradient of exactly 0, or without any: then two steps are enough."""
    assert seen("projector-dead", *in_order(*[projected(0.0, parts=(part,))] * 2)) == [("critical", "projector")]


def test_a_projector_of_which_nothing_is_known() -> None:
    """Without its part it may grow."""
    assert seen("projector-dead", *in_order(*[projected(0.0, parts=())] * 2)) == []
    for some in (Part("projector", 100, 1.0, 1, 0.1, tensors=2), Part("projector", 100, 1.0, 0, None, tensors=0)):
        assert seen("projector-dead", *in_order(*[projected(0.0, parts=(some,))] * 2)) == []


def verdict(use: Use) -> Verdict:
    return Verdict(use, "text", 3, "for a reason", {"delta_loss_swap": 0.0})


def passed(step: int, use: Use = "ignored", *, delta: float = 0.01, divergence: float | None = 0.01, **more: Any) -> StepRecord:
    effects = (
        Effect("swap", "text", 4, 40, 2.0, delta, divergence=divergence),
        Effect("silence", "text", 4, 40, 2.0, delta, divergence=divergence),
        Effect("reverse", "text", 4, 40),
    )
    return record(step, verdict=verdict(use), counterfactual=Counterfactual(("input_features",), effects), **more)


def passes(**numbers: Any) -> tuple[StepRecord, ...]:
    return tuple(passed(step, **numbers) for step in (5, 10, 15))


def test_a_reference_that_is_used() -> None:
    """Used is well, weak is worth knowing, no verdict says nothing; the evidence is the verdict's."""
    assert seen("reference-ignored", *passes(use="used"), setup=ENCODER_DECODER) == []
    assert seen("reference-ignored", *passes(use="leaked"), setup=ENCODER_DECODER) == []
    assert seen("reference-ignored", *passes(use="weak"), setup=ENCODER_DECODER) == [("info", "")]
    assert seen("reference-ignored", record(), setup=ENCODER_DECODER) is None
    (symptom,) = judged("reference-ignored", *passes(), setup=ENCODER_DECODER) or ()
    assert symptom.message == "verdict ignored: for a reason"
    assert symptom.evidence == {"delta_loss_swap": 0.0, "passes": 3.0}


def test_how_late_an_ignored_reference_is() -> None:
    """A warning up to half of the planned training, critical after; only a warning where text is prompt and answer."""
    late = replace(ENCODER_DECODER, max_steps=30)
    assert seen("reference-ignored", *passes(), setup=replace(late, max_steps=31)) == [("warning", "")]
    assert seen("reference-ignored", *passes(), setup=late) == [("critical", "")]
    assert seen("reference-ignored", *passes(), setup=replace(DECODER, max_steps=30)) == [("warning", "")]
    assert seen("reference-ignored", *passes(), setup=replace(DECODER, max_steps=30, codebooks=8)) == [("critical", "")]
    cloner = passes(heads=(Head("audio_lm_head", "audio", 1),))
    assert seen("reference-ignored", *cloner, setup=replace(DECODER, max_steps=30)) == [("critical", "")]
    assert seen("reference-ignored", *passes(), setup=replace(late, max_steps=None)) == [("warning", "")]
    assert seen("reference-ignored", *passes()) == [("warning", "")]


def test_audio_that_changes_nothing_at_all() -> None:
    """Three passes with the same losses to the last bit are critical at once; two, or the smallest change, are not."""
    exactly = {"delta": 1e-10, "divergence": 0.0}
    assert seen("reference-ignored", *passes(**exactly), setup=ENCODER_DECODER) == [("critical", "")]
    assert seen("reference-ignored", *passes(delta=0.0, divergence=None), setup=ENCODER_DECODER) == [("critical", "")]
    assert seen("reference-ignored", *passes(**exactly), setup=DECODER) == [("warning", "")]
    assert seen("reference-ignored", *passes(**exactly)[1:], setup=ENCODER_DECODER) == [("warning", "")]
    assert seen("reference-ignored", *passes(delta=1e-8, divergence=0.0), setup=ENCODER_DECODER) == [("warning", "")]
    assert seen("reference-ignored", *passes(delta=0.0, divergence=1e-8), setup=ENCODER_DECODER) == [("warning", "")]
    assert seen("reference-ignored", *passes(delta=-0.01, divergence=0.0), setup=ENCODER_DECODER) == [("warning", "")]
    moved = (*passes(**exactly)[:2], passed(15, delta=0.1))
    assert seen("reference-ignored", *moved, setup=ENCODER_DECODER) == [("warning", "")]
    earlier = (passed(1, delta=0.1), *passes(**exactly))
    assert seen("reference-ignored", *earlier, setup=ENCODER_DECODER) == [("critical", "")]
    between = (*passes(**exactly), record(16, verdict=verdict("ignored")))
    assert seen("reference-ignored", *between, setup=ENCODER_DECODER) == [("critical", "")]
    unmeasured = [replace(each, counterfactual=Counterfactual(("x",))) for each in passes()]
    assert seen("reference-ignored", *unmeasured, setup=ENCODER_DECODER) == [("warning", "")]


def unreached(*, swap: int | None = 0, reverse: int | None = 0, rows: int = 4, references: int | None = 4, **more: Any) -> StepRecord:
    effects = tuple(Effect(name, "audio", each, 0) for name, each in (("swap", swap), ("reverse", reverse)) if each is not None)  # type: ignore[arg-type]
    checks = BatchChecks(rows, reference_matches=0, reference_compared=references)
    return record(**{"counterfactual": Counterfactual(("audio_input_ids",), effects), "checks": checks, **more})


def test_audio_that_is_the_same_in_every_sample() -> None:
    """Where neither exchanging nor reversing changes anything in three passes, the audio says nothing, and no verdict can be had."""
    cloner, listener = replace(DECODER, codebooks=8), DECODER
    same = unreached()
    assert seen("reference-ignored", *in_order(same, same, same), setup=cloner) == [("critical", "")]
    assert seen("reference-ignored", *in_order(same, same, same), setup=listener) == [("warning", "")]
    assert seen("reference-ignored", *in_order(same, same), setup=cloner) is None
    assert seen("reference-ignored", *in_order(same, same, record(), same), setup=cloner) == [("critical", "")]
    clips = BatchChecks(4, audio=AudioChecks("log-mel", 4))
    assert seen("reference-ignored", *in_order(*[unreached(checks=clips)] * 3), setup=cloner) == [("critical", "")]


@pytest.mark.parametrize(
    "other",
    [
        {"swap": 1},
        {"reverse": 1},
        {"swap": None},
        {"reverse": None},
        {"references": 3},
        {"references": None},
        {"rows": 1, "references": 1},
        {"checks": None},
    ],
)
def test_audio_that_may_say_something(other: dict[str, Any]) -> None:
    """One sample reached, a change that was not made, a row without audio, or a single row: then nothing is said."""
    same, may = unreached(), unreached(**other)
    for order in ((same, same, may), (may, same, same), (same, may, same)):
        assert seen("reference-ignored", *in_order(*order), setup=replace(DECODER, codebooks=8)) is None


def compared(matches: int | None, samples: int | None) -> StepRecord:
    return record(checks=BatchChecks(4, reference_matches=matches, reference_compared=samples))


def test_a_reference_that_is_its_target() -> None:
    """Nine of ten, of at least four samples over the newest four steps that compared any."""
    assert seen("reference-is-target", compared(4, 4)) == [("critical", "")]
    assert seen("reference-is-target", compared(3, 3)) == []
    assert seen("reference-is-target", *in_order(compared(2, 2), compared(2, 2))) == [("critical", "")]
    assert seen("reference-is-target", compared(9, 10)) == [("critical", "")]
    assert seen("reference-is-target", compared(89, 100)) == []
    assert seen("reference-is-target", compared(None, 4)) == []
    assert seen("reference-is-target", *in_order(*[compared(0, 4)] * 4, *[compared(4, 4)] * 4)) == [("critical", "")]
    assert seen("reference-is-target", *in_order(*[compared(0, 4)] * 4, *[compared(4, 4)] * 3)) == []
    assert seen("reference-is-target", *in_order(compared(4, 4), compared(0, 0))) is None
    assert seen("reference-is-target", *in_order(compared(4, 4), compared(None, None))) is None
    assert seen("reference-is-target", record()) is None


def test_a_leak_that_the_verdict_sees() -> None:
    """The verdict `leaked` is enough; any other verdict says that there is none."""
    assert seen("reference-is-target", passed(5, "leaked")) == [("critical", "")]
    assert seen("reference-is-target", passed(5, "used")) == []
    assert seen("reference-is-target", passed(5, "used", checks=BatchChecks(4, reference_matches=4, reference_compared=4))) == [
        ("critical", "")
    ]
    assert seen("reference-is-target", passed(5, "used", checks=BatchChecks(4))) == []
    assert Setup().codebooks == 0
