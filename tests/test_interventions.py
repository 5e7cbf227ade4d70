from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from models.samples import delayed_codes
from probe.counterfactual.conditions import Condition
from probe.counterfactual.interventions import intervene
from probe.sites.facts import ModelFacts
from probe.sites.reference import INPUT_ONLY, AudioRoles
from waiting import NoWaiting

pytestmark = pytest.mark.pure  # of torch and probe alone: the same with every transformers

PLACE, WORD, BOOKS, CODES = 7, 1, 3, 30
BEGIN, END = CODES, CODES + 1
SPEAKS = AudioRoles(predicts=True, codebooks=BOOKS)
LISTENER = ModelFacts("Any", "any", False, 32, 0, (("audio_token_id", PLACE),), (PLACE,), 1)
SPEAKER = ModelFacts("Any", "any", False, 32, BOOKS, (("audio_token_id", PLACE),), (PLACE,), 1, border_codes=(BEGIN, END))
FEATURES = (Condition("input_features", "features"),)
CODE = (Condition("audio_input_ids", "codes"),)
JOINED = (Condition("audio_in_ids", "codes"),)
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"))]


def done(what: Any, inputs: dict[str, Any], conditions: Any = FEATURES, *, facts: ModelFacts = LISTENER, roles: Any = INPUT_ONLY) -> Any:
    return intervene(what, inputs, conditions, facts=facts, roles=roles)


def ragged(seed: int, *lengths: int, frames: int = 40) -> dict[str, Tensor]:
    """Return features (C, 5, frames) whose padding is 9, and their mask; every third clip is padded on the left, the second has a gap."""
    generator = torch.Generator().manual_seed(seed)
    mask = torch.arange(frames) < torch.tensor(lengths)[:, None]
    mask[2::3] = mask[2::3].flip(1)
    mask[1, 1] = False
    features = torch.randn(len(lengths), 5, frames, generator=generator)
    return {"input_features": torch.where(mask[:, None], features, 9.0), "feature_attention_mask": mask.long()}


def content(features: Tensor, mask: Tensor) -> list[list[Tensor]]:
    """Return the valid columns of each clip, found by walking."""
    return [[clip[:, t] for t in range(mask.shape[1]) if mask[c, t]] for c, clip in enumerate(features)]


def filled(features: Tensor, mask: Tensor, columns: list[list[Tensor]]) -> Tensor:
    """Return the features with each clip's valid places filled from its columns, again from the first when they run out."""
    new = features.clone()
    for c, mine in enumerate(columns):
        places = [t for t in range(mask.shape[1]) if mask[c, t]]
        for k, t in enumerate(places):
            new[c, :, t] = mine[k % len(mine)]
    return new


@pytest.mark.parametrize("seed", range(6))
def test_swap_takes_the_next_sample_cut_or_repeated(seed: int) -> None:
    """Every valid frame is the next clip's, in order, from its beginning again where it is shorter; padding stays to the bit."""
    lengths = torch.randint(3, 41, (5,), generator=torch.Generator().manual_seed(seed)).tolist()
    inputs = ragged(seed, *lengths)
    features, mask = inputs["input_features"], inputs["feature_attention_mask"]
    columns = content(features, mask)
    assert torch.equal(done("swap", inputs)["input_features"], filled(features, mask, [*columns[1:], columns[0]]))
    time_first = {"input_features": features.mT.contiguous(), "feature_attention_mask": mask}
    assert torch.equal(done("swap", time_first)["input_features"].mT, filled(features, mask, [*columns[1:], columns[0]]))


@pytest.mark.parametrize("seed", range(6))
def test_reverse_turns_the_content_round(seed: int) -> None:
    """The valid frames of each clip stand in the other order, the padding where it was."""
    inputs = ragged(seed, 40, 7, 23, 2, 11)
    features, mask = inputs["input_features"], inputs["feature_attention_mask"]
    expected = filled(features, mask, [columns[::-1] for columns in content(features, mask)])
    assert torch.equal(done("reverse", inputs)["input_features"], expected)


def test_without_a_mask_a_clip_comes_whole_and_turns_before_its_silence() -> None:
    """Such a model hears every frame: another sample's clip keeps its own length; reversed, a clip still begins with sound."""
    features = torch.randn(3, 5, 40, generator=torch.Generator().manual_seed(0))
    for clip, length in zip(features, (40, 25, 10), strict=True):
        clip[:, length:] = -1.0
    inputs = {"input_features": features}
    assert torch.equal(done("swap", inputs)["input_features"], features.roll(-1, 0))
    expected = features.clone()
    for clip, length in zip(expected, (40, 25, 10), strict=True):
        clip[:, :length] = clip[:, :length].flip(1)
    assert torch.equal(done("reverse", inputs)["input_features"], expected)


@pytest.mark.parametrize("shape", [(3, 50), (3, 1, 50)])
def test_waveforms(shape: Any) -> None:
    """A waveform is swapped, turned round and silenced as it is, and within its mask where it has one."""
    waves = torch.randn(*shape, generator=torch.Generator().manual_seed(0))
    condition, inputs = (Condition("input_values", "waveform"),), {"input_values": waves}
    assert torch.equal(done("swap", inputs, condition)["input_values"], waves.roll(-1, 0))
    assert torch.equal(done("reverse", inputs, condition)["input_values"], waves.flip(-1))
    assert torch.equal(done("silence", inputs, condition)["input_values"], torch.zeros(shape))
    masked = inputs | {"attention_mask": (torch.arange(50) < torch.tensor([[50], [20], [30]])).long()}
    turned = done("reverse", masked, condition)["input_values"]
    assert torch.equal(turned[1, ..., :20], waves[1, ..., :20].flip(-1))
    assert torch.equal(turned[1, ..., 20:], waves[1, ..., 20:])
    swapped = done("swap", masked, condition)["input_values"]
    assert torch.equal(swapped[0], torch.cat([waves[1, ..., :20]] * 3, -1)[..., :50])


def test_identical_and_empty_clips_are_passed_over() -> None:
    """The donor is the next clip that differs and has content: a swap with a copy of oneself would say that audio is ignored."""
    inputs = ragged(1, 30, 30, 30, 12, 30)
    features, mask = inputs["input_features"], inputs["feature_attention_mask"]
    features[1], mask[1] = features[0], mask[0]
    features[1, :, 30:] = 5.0  # padded otherwise, of the same content
    mask[3] = 0
    new = done("swap", inputs)["input_features"]
    columns = content(features, mask)
    columns[3] = [features[3, :, 0]]  # asked for nowhere: nothing is put into it
    assert torch.equal(new, filled(features, mask, [columns[2], columns[2], columns[4], columns[4], columns[0]]))


def test_a_clip_without_any_donor_stays() -> None:
    """Copies of one clip, and clips that all belong to one sample, have nothing to be swapped with."""
    same = torch.randn(1, 5, 40, generator=torch.Generator().manual_seed(0)).expand(3, -1, -1)
    assert torch.equal(done("swap", {"input_features": same})["input_features"], same)
    ids = torch.full((2, 9), WORD)
    ids[0, 2:6] = PLACE
    inputs = {"input_ids": ids, "input_features": torch.randn(3, 5, 40, generator=torch.Generator().manual_seed(0))}
    assert torch.equal(done("swap", inputs)["input_features"], inputs["input_features"])


@pytest.mark.parametrize("frames", [1, 40])
def test_clips_without_content_stay(frames: int) -> None:
    """Where no frame is valid there is nothing to swap and nothing to turn round."""
    inputs = {"input_features": torch.randn(2, 5, frames), "feature_attention_mask": torch.zeros(2, frames)}
    for what in ("swap", "reverse"):
        assert torch.equal(done(what, inputs)["input_features"], inputs["input_features"])


def test_features_of_more_dimensions_however_they_are_laid_out() -> None:
    """All but the last dimension are rows of a clip; strides do not matter."""
    features = torch.randn(20, 4, 3, 2, generator=torch.Generator().manual_seed(0)).permute(3, 2, 1, 0)
    assert torch.equal(done("swap", {"input_features": features})["input_features"], features.flip(0))
    assert torch.equal(done("reverse", {"input_features": features})["input_features"], features.flip(3))


def test_clips_of_the_same_sample_are_no_donors() -> None:
    """A sample with two clips gets neither of them back: both come from another sample."""
    ids = torch.full((3, 9), WORD)
    for row, count in zip(ids, (1, 2, 1), strict=True):
        row[2 : 2 + count] = PLACE
    features = torch.randn(4, 5, 40, generator=torch.Generator().manual_seed(0))
    new = done("swap", {"input_ids": ids, "input_features": features})["input_features"]
    assert torch.equal(new, features[[1, 3, 3, 0]])


def test_clips_that_differ_in_order_only_differ() -> None:
    """Frames or mel bins in another order are another clip; so are clips with NaN."""
    first = torch.randint(0, 50, (5, 40), generator=torch.Generator().manual_seed(0)).float()  # sums are exact
    for other in (first.flip(0), first.flip(1), first.roll(1, 1)):
        features = torch.stack([first, other])
        assert torch.equal(done("swap", {"input_features": features})["input_features"], features.flip(0))
    broken = torch.full((2, 5, 40), torch.nan)
    broken[0, 0, 0] = 1.0
    assert torch.equal(done("swap", {"input_features": broken})["input_features"].nan_to_num(7.0), broken.flip(0).nan_to_num(7.0))


def cloned(seed: int, lengths: list[tuple[int, int]]) -> dict[str, Tensor]:
    """Return a batch of delayed codes: of each sample a reference and a target of these plain lengths (0: no reference)."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.full((len(lengths), 60), WORD)
    codes, labels = [], []
    for row, (reference, target) in zip(ids, lengths, strict=True):
        given, _ = delayed_codes(generator, BOOKS, CODES, reference) if reference else (torch.zeros(0, BOOKS, dtype=torch.long), None)
        wanted, learnt = delayed_codes(generator, BOOKS, CODES, target)
        row[1 : 1 + len(given)] = PLACE
        row[3 + len(given) : 3 + len(given) + len(wanted)] = PLACE
        codes.append(torch.cat([given, wanted]))
        labels.append(torch.cat([torch.full_like(given, -100), learnt]))
    pad = torch.nn.utils.rnn.pad_sequence
    return {
        "input_ids": ids,
        "audio_input_ids": pad(codes, batch_first=True, padding_value=END),
        "audio_input_ids_mask": pad([torch.ones(len(frames)) for frames in codes], batch_first=True) != 0,
        "audio_labels": pad(labels, batch_first=True, padding_value=-100),
    }


def plain(delayed: Tensor, length: int) -> Tensor:
    """Undo the delay: the codes (length, K) of a delayed run (length + K - 1, K)."""
    return torch.stack([delayed[book : book + length, book] for book in range(BOOKS)], 1)


def expected_codes(inputs: dict[str, Tensor], lengths: list[tuple[int, int]], sources: list[list[int]], take: Any) -> Tensor:
    new, old = inputs["audio_input_ids"].clone(), inputs["audio_input_ids"]
    for sample, ((reference, _), source) in enumerate(zip(lengths, sources, strict=True)):
        for frame in range(reference):
            theirs = plain(old[source[0]], lengths[source[0]][0])
            for book in range(BOOKS):
                new[sample, frame + book, book] = theirs[take(frame, reference, len(theirs)), book]
    return new


@pytest.mark.parametrize("seed", range(4))
def test_reference_codes_alone_change_and_keep_their_delay(seed: int) -> None:
    """Of delayed codes, each codebook's own stretch is filled in step with the others; its ends, the target and the padding stay."""
    draw = torch.randint(2, 9, (4, 2), generator=torch.Generator().manual_seed(seed)).tolist()
    lengths = [(reference, target) for reference, target in draw]
    inputs = cloned(seed, lengths)
    swapped = done("swap", inputs, CODE, facts=SPEAKER, roles=SPEAKS)
    after = expected_codes(inputs, lengths, [[1], [2], [3], [0]], lambda frame, own, theirs: frame % theirs)
    assert list(swapped) == ["audio_input_ids"]
    assert torch.equal(swapped["audio_input_ids"], after)
    turned = done("reverse", inputs, CODE, facts=SPEAKER, roles=SPEAKS)["audio_input_ids"]
    assert torch.equal(turned, expected_codes(inputs, lengths, [[0], [1], [2], [3]], lambda frame, own, theirs: own - 1 - frame))
    assert not torch.equal(turned, inputs["audio_input_ids"])


def test_samples_without_a_reference_neither_give_nor_take() -> None:
    """The next sample with a reference is the donor; the target of one without stays."""
    lengths = [(4, 3), (0, 5), (6, 2), (0, 4)]
    inputs = cloned(0, lengths)
    after = expected_codes(inputs, lengths, [[2], [1], [0], [3]], lambda frame, own, theirs: frame % theirs)
    assert torch.equal(done("swap", inputs, CODE, facts=SPEAKER, roles=SPEAKS)["audio_input_ids"], after)


def joined_batch(seed: int, *lengths: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.full((len(lengths), 6), WORD)
    ids[:, 2] = PLACE
    parts = [torch.randint(0, CODES, (BOOKS, length), generator=generator) for length in lengths]
    starts = torch.tensor([0, *lengths]).cumsum(0)[:-1]
    return {"input_ids": ids, "audio_in_ids": torch.cat(parts, 1), "audio_in_ids_start": starts}


def test_joined_codes() -> None:
    """Segments of one tensor are swapped and turned round within their own bounds."""
    inputs = joined_batch(0, 5, 3, 8)
    first, second, third = inputs["audio_in_ids"].split([5, 3, 8], 1)
    swapped = done("swap", inputs, JOINED, facts=SPEAKER, roles=SPEAKS)["audio_in_ids"]
    assert torch.equal(swapped, torch.cat([torch.cat([second, second], 1)[:, :5], third[:, :3], torch.cat([first, first], 1)[:, :8]], 1))
    turned = done("reverse", inputs, JOINED, facts=SPEAKER, roles=SPEAKS)["audio_in_ids"]
    assert torch.equal(turned, torch.cat([part.flip(1) for part in (first, second, third)], 1))


def test_one_audio_in_two_forms_has_one_donor() -> None:
    """Features and codes of the same clips are taken from the same clip, though in one form alone the next is a copy."""
    inputs = joined_batch(0, 4, 4, 4)
    features = torch.randn(3, 5, 40, generator=torch.Generator().manual_seed(0))
    features[1] = features[0]
    both = inputs | {"input_features": features}
    new = done("swap", both, (*FEATURES, *JOINED), facts=SPEAKER, roles=SPEAKS)
    assert torch.equal(new["input_features"], features[[1, 2, 0]])
    assert torch.equal(new["audio_in_ids"], inputs["audio_in_ids"].roll(-4, 1))
    fewer = both | {"input_features": features[1:]}
    apart = done("swap", fewer, (*FEATURES, *JOINED), facts=SPEAKER, roles=SPEAKS)
    assert torch.equal(apart["input_features"], features[[2, 1]])
    assert torch.equal(apart["audio_in_ids"], inputs["audio_in_ids"].roll(-4, 1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_silence_of_whispers_features(dtype: torch.dtype) -> None:
    """Within Whisper's range, whatever the clips' floors, silence is -1.5 in every frame."""
    generator = torch.Generator().manual_seed(0)
    peaks = torch.tensor([1.37, 0.2, -0.4, 0.5]).view(-1, 1, 1)
    features = (peaks - 2.5 * torch.rand(4, 5, 40, generator=generator)).clamp(min=peaks - 2.0).clamp(min=-1.5).to(dtype)
    features[0, :, 3:9] = 0.0
    features[1, 2] = 0.0
    features[3] = 0.0
    new = done("silence", {"input_features": features})["input_features"]
    assert new.dtype == dtype
    assert torch.equal(new, torch.full_like(features, -1.5))


def test_rounding_does_not_leave_whispers_range() -> None:
    """In bfloat16 the floor may seem to be more than 2 below the maximum; that is no other extractor."""
    peaks = torch.linspace(1.0, 1.4, 41).view(-1, 1, 1)
    features = torch.cat([peaks, peaks - 1.0, peaks - 2.0], 2).bfloat16()
    assert (features[..., 0].float() - features[..., 2].float() > 2.0).any()
    assert (done("silence", {"input_features": features})["input_features"] == -1.5).all()


def test_silence_of_other_features_is_the_clips_own_minimum() -> None:
    """One clip out of Whisper's range, below its floor or wider, tells that another extractor made them; zeros and NaN are passed over."""
    features = 0.5 * torch.rand(3, 5, 40, generator=torch.Generator().manual_seed(0)) + torch.tensor([0.5, 1.0, -0.4]).view(-1, 1, 1)
    features[:, 0, 0] = 0.0
    features[1, 2] = torch.nan
    wide, low = features.clone(), features.clone()
    wide[2, 3, 3] = 1.7
    low[2, 3, 3] = -1.6
    for other in (wide, low):
        expected = [other[clip][other[clip].isfinite() & (other[clip] != 0)].min() for clip in range(3)]
        new = done("silence", {"input_features": other})["input_features"]
        for clip in range(3):
            assert (new[clip] == expected[clip]).all()
    wide[1] = 0.0
    assert not done("silence", {"input_features": wide})["input_features"][1].any()


def test_what_is_not_defined_says_why() -> None:
    """One sample has nobody to swap with, codes have no silence, an embedding has no time and no silence."""
    one = {"input_features": torch.randn(1, 5, 40)}
    assert "one sample" in done("swap", one)
    for what in ("reverse", "silence"):
        assert isinstance(done(what, one), dict)
    two_clips = {"input_ids": torch.full((1, 4), PLACE), "input_features": torch.randn(2, 5, 40)}
    assert "one sample" in done("swap", two_clips)
    one_clip = {"input_ids": torch.full((2, 4), PLACE), "input_features": torch.randn(1, 5, 40)}
    assert "one clip" in done("swap", one_clip)
    codes = cloned(0, [(3, 3), (4, 4)])
    assert "no silence code" in done("silence", codes, CODE, facts=SPEAKER, roles=SPEAKS)
    speaker = {"speaker": torch.randn(3, 16)}
    condition = (Condition("speaker", "features"),)
    assert torch.equal(done("swap", speaker, condition)["speaker"], speaker["speaker"].roll(-1, 0))
    assert "time" in done("reverse", speaker, condition)
    assert "silence" in done("silence", speaker, condition)
    assert "nothing" in done("swap", {}, ())
    unmasked = {name: value for name, value in codes.items() if name != "audio_input_ids_mask"}
    assert "no mask" in done("swap", unmasked, CODE, facts=SPEAKER, roles=SPEAKS)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("what", ["swap", "silence", "reverse"])
def test_nothing_waits_and_nothing_given_changes(what: Any, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """No operator synchronises or draws a number, with deterministic algorithms either; inputs stay, however they are laid out."""
    cases = [
        (ragged(0, 40, 7, 23, 11), FEATURES, LISTENER, INPUT_ONLY),
        ({"input_features": torch.randn(3, 40, 5).mT}, FEATURES, LISTENER, INPUT_ONLY),
        ({"input_features": torch.randn(1, 5, 40).expand(3, -1, -1)}, FEATURES, LISTENER, INPUT_ONLY),
        (cloned(0, [(3, 3), (4, 6), (0, 4)]), CODE, SPEAKER, SPEAKS),
        (joined_batch(0, 5, 3, 8), JOINED, SPEAKER, SPEAKS),
    ]
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    for inputs, conditions, facts, roles in cases:
        moved = {name: value.to(device) for name, value in inputs.items()}
        before = {name: value.clone() for name, value in moved.items()}
        state = torch.get_rng_state()
        for deterministic in (False, True):
            torch.use_deterministic_algorithms(deterministic)
            if device == "cuda":
                torch.cuda.set_sync_debug_mode("error")
            try:
                with NoWaiting() as watch:
                    found = intervene(what, moved, conditions, facts=facts, roles=roles)
            finally:
                torch.use_deterministic_algorithms(False)
                if device == "cuda":
                    torch.cuda.set_sync_debug_mode("default")
            assert watch.operators > 0 or isinstance(found, str)
            expected = intervene(what, inputs, conditions, facts=facts, roles=roles)
            if isinstance(found, str) or isinstance(expected, str):
                assert found == expected
                continue
            for name, tensor in found.items():
                assert (tensor.shape, tensor.dtype, tensor.device) == (moved[name].shape, moved[name].dtype, moved[name].device)
                assert not tensor.requires_grad
                assert torch.equal(tensor.cpu(), expected[name])
                assert tensor.untyped_storage().data_ptr() != moved[name].untyped_storage().data_ptr()
        assert all(torch.equal(moved[name], before[name]) for name in moved)
        assert torch.equal(torch.get_rng_state(), state)
