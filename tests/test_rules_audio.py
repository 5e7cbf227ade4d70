"""Rules about audio: what the clips hold, and whether model and text fit them."""

from __future__ import annotations

from typing import Any

import pytest

from judging import DECODER, ENCODER_DECODER, in_order, judged, record, seen, with_audio, with_labels
from probe.records import Attention, BatchChecks, Inputs, InputTensor, Setup, StepRecord

pytestmark = pytest.mark.pure  # of torch and probe alone: the same with every transformers

TOKEN = (("audio_token_id", 60), ("audio_bos_token_id", 3))


def clips(*each: dict[str, Any], every: int = 1) -> tuple[StepRecord, ...]:
    return in_order(*(record(**with_audio(**numbers)) for numbers in each), every=every)


def text_only() -> StepRecord:
    return record(**with_labels())


@pytest.mark.parametrize(("code", "name"), [("audio-constant", "constant"), ("audio-silent", "silent"), ("audio-wrong-scale", "off_scale")])
def test_all_clips_are_critical(code: str, name: str) -> None:
    """All clips of two steps are critical, all but one a warning; one step is not enough; none is fine."""
    assert seen(code, *clips({name: 4}, {name: 4})) == [("critical", "")]
    assert seen(code, *clips({name: 4}, {name: 3})) == [("warning", "")]
    assert seen(code, *clips({name: 4})) == []
    assert seen(code, *clips({name: 0}, {name: 0})) == []
    (symptom,) = judged(code, *clips({name: 4}, {name: 4})) or ()
    assert symptom.evidence[name] == symptom.evidence["clips"] == 8


@pytest.mark.parametrize(("code", "name", "share"), [("audio-constant", "constant", 4), ("audio-wrong-scale", "off_scale", 4)])
def test_a_quarter_of_the_clips_is_a_warning(code: str, name: str, share: int) -> None:
    """Two of eight are a quarter; two of nine are not, nor is one of four."""
    assert seen(code, *clips({name: 2}, {name: 0})) == [("warning", "")]
    assert seen(code, *clips({name: 2}, {name: 0, "clips": 5})) == []
    assert seen(code, *clips({name: 1, "clips": 2}, {name: 0, "clips": 2})) == []


@pytest.mark.parametrize(("code", "name"), [("audio-silent", "silent"), ("audio-clipped", "clipped")])
def test_half_of_the_clips_is_a_warning(code: str, name: str) -> None:
    """Four of eight are half; three are not, nor is one of two."""
    assert seen(code, *clips({name: 4}, {name: 0})) == [("warning", "")]
    assert seen(code, *clips({name: 3}, {name: 0})) == []
    assert seen(code, *clips({name: 1, "clips": 1}, {name: 0, "clips": 1}, {name: 1, "clips": 1}, {name: 0, "clips": 1})) == [
        ("warning", "")
    ]


def test_one_clip_a_step() -> None:
    """With one clip a step it takes four steps: a single silent recording is nothing."""
    one = {"clips": 1, "constant": 1}
    assert seen("audio-constant", *clips(one, one, one)) == []
    assert seen("audio-constant", *clips(one, one, one, one)) == [("critical", "")]
    assert seen("audio-constant", *clips(one, one, one, {"clips": 1})) == [("warning", "")]


def test_steps_without_audio_are_passed_over() -> None:
    """A text-only step says nothing, and the clips before it still count after it; so do clips of another kind not."""
    bad = record(**with_audio(constant=4))
    assert seen("audio-constant", *in_order(bad, bad, text_only())) is None
    assert seen("audio-constant", *in_order(bad, text_only(), bad)) == [("critical", "")]
    assert seen("audio-constant", *in_order(bad, record(**with_audio(clips=0)))) is None
    assert seen("audio-constant", *in_order(bad, record(**with_audio(constant=4, kind="waveform")))) == []
    assert seen("audio-constant", *in_order(bad, record(**with_audio(clips=0)), bad)) == [("critical", "")]


def test_constant_clips_are_not_silent_ones() -> None:
    """Clips of one value have their own finding, whether or not they count as silent, too."""
    assert seen("audio-silent", *clips({"silent": 4, "constant": 4}, {"silent": 4, "constant": 4})) == []
    assert seen("audio-silent", *clips({"silent": 4, "constant": 2}, {"silent": 4, "constant": 2})) == [("critical", "")]
    assert seen("audio-silent", *clips({"silent": 3, "constant": 2}, {"silent": 3, "constant": 2})) == []
    assert seen("audio-silent", *clips({"silent": 0, "constant": 3}, {"silent": 0, "constant": 3})) == []


def test_clipped_is_never_critical() -> None:
    """All clips clipped are a warning; of log-mel features nothing is known."""
    assert seen("audio-clipped", *clips({"clipped": 4}, {"clipped": 4})) == [("warning", "")]
    assert seen("audio-clipped", *clips({}, {})) is None
    assert seen("audio-clipped", *clips({}, {"clipped": 4})) == []
    assert seen("audio-clipped", text_only()) is None
    assert seen("audio-clipped", *clips({"clipped": 4})) == []


def test_an_unknown_scale() -> None:
    """Where the extractor's range is not known, nothing is said; the values of the step are told where it is."""
    assert seen("audio-wrong-scale", *clips({}, {})) is None
    assert seen("audio-wrong-scale", *clips({}, {"off_scale": 4})) == []
    assert seen("audio-wrong-scale", *clips({"off_scale": 4})) == []
    (symptom,) = judged("audio-wrong-scale", *clips({"off_scale": 4}, {"off_scale": 4, "minimum": -3.5, "maximum": 9.25})) or ()
    assert "-3.5 … 9.25" in symptom.message


def test_a_narrow_band() -> None:
    """All of at least four sounding clips; one that is not, or too few that sound, is no finding."""
    narrow, silent = {"band_limited": 4}, {"band_limited": 1, "silent": 3}
    assert seen("audio-band-limited", *clips(narrow, narrow)) == [("warning", "")]
    assert seen("audio-band-limited", *clips(narrow, {"band_limited": 3})) == []
    assert seen("audio-band-limited", *clips(narrow, {"band_limited": 0, "silent": 4})) == [("warning", "")]
    assert seen("audio-band-limited", *clips(narrow, {"band_limited": 0, "constant": 4, "silent": 1})) == [("warning", "")]
    assert seen("audio-band-limited", *clips({"band_limited": 2, "silent": 2}, silent)) == []
    assert seen("audio-band-limited", *clips(narrow)) == []
    assert seen("audio-band-limited", *clips(narrow, {})) is None
    assert seen("audio-band-limited", *clips({}, narrow)) == []


def test_not_finite() -> None:
    """One clip of one step is critical."""
    assert seen("audio-not-finite", *clips({"nonfinite": 1})) == [("critical", "")]
    assert seen("audio-not-finite", *clips({"nonfinite": 1}, {})) == []
    assert seen("audio-not-finite", text_only()) is None


def test_empty_features() -> None:
    """No clip, or no frame, while placeholders stand in the text, or of an encoder-decoder; text alone is fine."""
    assert seen("audio-empty", record(**with_audio(clips=0, tokens=TOKEN)), setup=DECODER) == [("critical", "")]
    assert seen("audio-empty", record(**with_audio(frames=0, tokens=TOKEN)), setup=DECODER) == [("critical", "")]
    assert seen("audio-empty", record(**with_audio(clips=0)), setup=ENCODER_DECODER) == [("critical", "")]
    assert seen("audio-empty", record(**with_audio(clips=0), attention=(Attention("x", "cross", "", 1),))) == [("critical", "")]
    assert seen("audio-empty", record(**with_audio(clips=0, tokens=[("audio_token_id", 0)])), setup=DECODER) == []
    assert seen("audio-empty", record(**with_audio(clips=0, tokens=[("audio_out_token_idx", 9)])), setup=DECODER) == []
    assert seen("audio-empty", record(**with_audio(clips=1, frames=1, tokens=TOKEN)), setup=DECODER) == []
    assert seen("audio-empty", record(**with_audio(tokens=TOKEN)), setup=DECODER) == []
    assert seen("audio-empty", record(**with_audio(clips=0, tokens=TOKEN, encoder="")), setup=DECODER) is None
    assert seen("audio-empty", text_only(), setup=DECODER) is None


def test_features_that_are_empty_for_long() -> None:
    """Without placeholders it takes eight steps of nothing, and is a warning; one clip among them is enough."""
    empty = record(**with_audio(clips=0))
    assert seen("audio-empty", *in_order(*[empty] * 8), setup=DECODER) == [("warning", "")]
    assert seen("audio-empty", *in_order(*[empty] * 7), setup=DECODER) == []
    assert seen("audio-empty", *in_order(*[empty] * 4, record(**with_audio()), *[empty] * 7), setup=DECODER) == []
    assert seen("audio-empty", *in_order(*[text_only()] * 8), setup=DECODER) is None


def test_the_mel_count() -> None:
    """Another count than the encoder's is critical; an unknown one says nothing."""
    assert seen("mel-count-wrong", record(**with_audio(mel_bins=128)), setup=ENCODER_DECODER) == [("critical", "")]
    assert seen("mel-count-wrong", record(**with_audio(mel_bins=80)), setup=ENCODER_DECODER) == []
    assert seen("mel-count-wrong", record(**with_audio()), setup=ENCODER_DECODER) is None
    assert seen("mel-count-wrong", record(**with_audio(mel_bins=80)), setup=DECODER) is None
    assert seen("mel-count-wrong", record(**with_audio(mel_bins=80))) is None
    assert seen("mel-count-wrong", text_only(), setup=ENCODER_DECODER) is None


def fitted(placeholders: int, *, setup: Setup | None = DECODER, starts: bool = False, times: int = 2, **numbers: Any) -> Any:
    tensors = (InputTensor("audio_in_ids_start", (2,), "torch.int64", "cpu"),) if starts else ()
    fields = with_audio(tokens=(("audio_in_token_idx", placeholders), ("audio_eos_token_id", 500)), **numbers)
    each = record(**fields, inputs=Inputs(1, 4, tensors=tensors))
    return seen("audio-tokens-mismatch", *in_order(*[each] * times), setup=setup)


def test_placeholders_and_frames() -> None:
    """As many as valid frames, or no more than frames where only these are known; twice in a row."""
    assert fitted(60, frames=200, valid_frames=60) == []
    assert fitted(61, frames=200, valid_frames=60) == [("critical", "")]
    assert fitted(59, frames=200, valid_frames=60) == [("critical", "")]
    assert fitted(59, frames=200, valid_frames=60, times=1) == []
    assert fitted(200, frames=200) == []
    assert fitted(201, frames=200) == [("critical", "")]
    assert fitted(150, frames=200) == []


def test_no_placeholder_at_all() -> None:
    """Frames for which no placeholder stands are lost; a batch without frames has none to lose."""
    assert fitted(0, frames=200) == [("critical", "")]
    assert fitted(0, frames=0, clips=0) is None
    assert fitted(0, frames=None) is None


def test_one_placeholder_a_clip() -> None:
    """A model that makes room itself takes one a clip, and that is told by its segment starts where the number is another one."""
    assert fitted(4, frames=200, valid_frames=60) == []
    assert fitted(4, frames=200, starts=True) == []
    assert fitted(5, frames=200, starts=True) == [("critical", "")]
    assert fitted(5, frames=200) == []


def test_where_there_is_nothing_to_count() -> None:
    """Encoder-decoders, codecs and configs without an audio token are not judged; one odd step between good ones is no finding."""
    assert fitted(0, frames=200, setup=ENCODER_DECODER) is None
    assert fitted(0, frames=200, encoder="") is None
    unnamed = record(**with_audio(frames=200, tokens=[("audio_bos_token_id", 3)]))
    assert seen("audio-tokens-mismatch", *in_order(unnamed, unnamed), setup=DECODER) is None
    assert seen("audio-tokens-mismatch", record(checks=BatchChecks(4)), setup=DECODER) is None
    right, wrong = (record(**with_audio(frames=200, valid_frames=60, tokens=(("audio_token_id", count),))) for count in (60, 59))
    assert seen("audio-tokens-mismatch", *in_order(wrong, right, wrong), setup=DECODER) == []
    assert seen("audio-tokens-mismatch", *in_order(wrong, text_only(), wrong), setup=DECODER) == [("critical", "")]
