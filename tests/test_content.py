from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from models.samples import clip_features
from probe.counterfactual.conditions import Condition
from probe.counterfactual.content import Content, content_of
from probe.sites.facts import ModelFacts
from probe.sites.reference import INPUT_ONLY, AudioRoles

pytestmark = pytest.mark.pure  # of torch and probe alone: the same with every transformers

PLACE, OUT, WORD, BOOKS = 7, 8, 1, 3
SPEAKS = AudioRoles(predicts=True, codebooks=BOOKS)


def facts(*tokens: tuple[str, int], codebooks: int = 0, encoder_decoder: bool = False, borders: tuple[int, ...] = ()) -> ModelFacts:
    ids = tuple(token for _, token in tokens)
    return ModelFacts("Any", "any", encoder_decoder, 32, codebooks, tokens, ids, 1, border_codes=borders)


LISTENER = facts(("audio_token_id", PLACE))


def features_of(inputs: dict[str, Any], facts: ModelFacts = LISTENER, *, name: str = "input_features", sounding: bool = False) -> Content:
    content = content_of(Condition(name, "features"), inputs, facts=facts, roles=INPUT_ONLY, sounding=sounding)
    assert isinstance(content, Content)
    return content


def rows(*counts: int, size: int = 40, token: int = PLACE) -> Tensor:
    """Return ids (B, S) in which row b holds ``counts[b]`` placeholders between words."""
    ids = torch.full((len(counts), size), WORD)
    for row, count in zip(ids, counts, strict=True):
        row[3 : 3 + count] = token
    return ids


@pytest.mark.parametrize(
    ("counts", "lengths", "owners"),
    [
        ((10, 12, 8), (40, 48, 32), [0, 1, 2]),
        ((20, 0, 10), (40, 40, 40), [0, 0, 2]),  # two clips of one sample, none of the next
        ((9, 24), (36, 48, 48), [0, 1, 1]),
        ((2, 1), (36, 5, 90), [0, 0, 1]),  # one placeholder a clip, whatever its length
        ((10, 5), (40, 40, 0), [0, 1, 1]),  # a clip of nothing comes last, and is nobody's but the last sample's
        ((0, 0), (36, 90), [0, 1]),
        ((0, 0), (36, 90, 10), [2, 3, 4]),  # nobody tells: no sample has these numbers
        ((3, 2), (0, 0, 0), [0, 0, 0]),  # no frame is valid: anybody's
        ((20, 4, 6), (40, 40, 40), [0, 1, 2]),  # as many clips as samples, whatever else the placeholders stand for
        ((5, 31), (17, 26, 49, 51), [0, 1, 1, 1]),  # rounded by two strides of 2
    ],
)
def test_clips_belong_to_the_samples_whose_placeholders_they_fill(counts: Any, lengths: Any, owners: list[int]) -> None:
    """Ownership goes by order: one placeholder a clip, or a share of them like the clip's share of valid frames."""
    mask = (torch.arange(100) < torch.tensor(lengths)[:, None]).long()
    inputs = {"input_ids": rows(*counts), "input_features": torch.zeros(len(lengths), 4, 100), "feature_attention_mask": mask}
    assert features_of(inputs).owner_C.tolist() == owners


def test_clips_without_a_mask_have_equal_shares() -> None:
    """Chunks of fixed length: a sample with twice the placeholders has two of them."""
    inputs = {"input_ids": rows(12, 24, 12), "input_features": torch.randn(4, 4, 48)}
    assert features_of(inputs).owner_C.tolist() == [0, 1, 1, 2]


def test_placeholders_of_predicted_audio_own_no_clip() -> None:
    """Where the config tells given from predicted audio, only the given counts, be it named so or what is left over."""
    ids = rows(2, 1)
    ids[0, 20:30] = OUT
    inputs = {"input_ids": ids, "input_features": torch.zeros(3, 4, 48)}
    for tokens in (
        (("audio_in_token_idx", PLACE), ("audio_out_token_idx", OUT)),
        (("audio_token_id", PLACE), ("audio_out_token_idx", OUT)),
        (("audio_in_token_idx", PLACE), ("audio_token_id", OUT)),
    ):
        assert features_of(inputs, facts(*tokens)).owner_C.tolist() == [0, 0, 1]


def test_without_token_ids_every_clip_is_a_sample() -> None:
    """An encoder-decoder has one clip a row, even if its decoder's ids hold a number that looks like a placeholder."""
    inputs = {"input_features": torch.zeros(3, 4, 48), "labels": rows(1, 2, 3)}
    assert features_of(inputs).owner_C.tolist() == [0, 1, 2]
    inputs["input_ids"] = rows(9, 0, 0)
    assert features_of(inputs, facts()).owner_C.tolist() == [0, 1, 2]
    assert features_of(inputs | {"input_ids": rows(9, 0)}, facts()).owner_C.tolist() == [2, 3, 4]
    assert features_of(inputs, facts(("audio_token_id", PLACE), encoder_decoder=True)).owner_C.tolist() == [0, 1, 2]


def test_masks_of_features_and_of_something_else() -> None:
    """A mask counts if it is as long as the features; ``attention_mask`` beside token ids belongs to these."""
    mask = torch.rand(3, 48, generator=torch.Generator().manual_seed(0)) < 0.5
    features = {"input_features": torch.zeros(3, 4, 48)}
    for name in ("feature_attention_mask", "input_features_mask", "attention_mask", "audio_attention_mask"):
        found = features_of(features | {name: mask.long()}).frames_CT
        assert found is not None
        assert torch.equal(found, mask)
    assert features_of(features | {"feature_attention_mask": mask[:, :47]}).frames_CT is None
    assert features_of(features | {"feature_attention_mask": mask[:2]}).frames_CT is None
    assert features_of(features | {"attention_mask": mask, "input_ids": torch.zeros(3, 48, dtype=torch.long)}).frames_CT is None


@pytest.mark.parametrize(
    ("shape", "frames", "viewed"),
    [
        ((2, 4, 48), None, (2, 4, 48)),
        ((2, 48, 4), None, (2, 4, 48)),
        ((2, 4, 48), 4, (2, 48, 4)),  # a mask knows better
        ((2, 48, 48), 48, (2, 48, 48)),
        ((2, 3, 4, 20), None, (2, 12, 20)),
        ((2, 60), None, (2, 1, 60)),
        ((2, 1, 60), None, (2, 1, 60)),
    ],
)
def test_time_is_found(shape: Any, frames: int | None, viewed: Any) -> None:
    """Clips are seen as rows over time: time is what the mask is as long as, else the longer of two, else the last."""
    inputs: dict[str, Any] = {"x": torch.randn(*shape)}
    if frames:
        inputs["feature_attention_mask"] = torch.ones(2, frames)
    content = features_of(inputs, name="x")
    assert content.clips(content.tensor).shape == viewed
    new = content.tensor.clone()
    content.clips(new)[1].fill_(5.0)
    assert (new[1] == 5.0).all()
    assert torch.equal(new[0], inputs["x"][0])


@pytest.mark.parametrize("augmented", [False, True])
def test_silence_at_the_end_is_no_content(augmented: bool) -> None:
    """Where asked for, the floor that ends a clip is found, through SpecAugment's zeros as well; a silent clip has no content."""
    generator = torch.Generator().manual_seed(3)
    lengths = [30, 99, 100, 1]
    features = torch.stack([clip_features(generator, 16, 100, valid) for valid in lengths] + [torch.full((16, 100), -1.5)])
    features[:2] += 1.5  # loud enough for a floor above 0
    if augmented:
        features[:, 3:7] = 0.0
        features[:4, :, 90:] = 0.0
        features[0, :, 10:20] = 0.0
        lengths = [30, 90, 90, 1]
    found = features_of({"input_features": features}, sounding=True).frames_CT
    assert found is not None
    assert found.sum(1).tolist() == [*lengths, 0]
    assert features_of({"input_features": features}).frames_CT is None
    time_first = features_of({"input_features": features.mT.contiguous()}, sounding=True).frames_CT
    assert time_first is not None
    assert torch.equal(time_first, found)


def codes_of(inputs: dict[str, Any], *, name: str = "audio_input_ids", roles: AudioRoles = SPEAKS, borders: tuple[int, ...] = ()) -> Any:
    known = facts(("audio_token_id", PLACE), codebooks=BOOKS, borders=borders)
    return content_of(Condition(name, "codes"), inputs, facts=known, roles=roles)


def spoken(seed: int) -> tuple[dict[str, Any], list[list[bool]]]:
    """Return a batch in which each row holds runs of reference and target, and which of its frames are reference."""
    generator = torch.Generator().manual_seed(seed)
    ids, frames, labels = torch.full((4, 60), WORD), [], []
    for row in ids:
        at, marks = 1, []
        for _ in range(int(torch.randint(1, 4, (1,), generator=generator))):
            length, reference = int(torch.randint(2, 12, (1,), generator=generator)), bool(torch.rand(1, generator=generator) < 0.6)
            row[at : at + length] = PLACE
            at += length + 1 + int(torch.randint(0, 4, (1,), generator=generator))
            marks += [reference] * length
        frames.append(marks)
    longest = max(map(len, frames)) + 2
    for marks in frames:
        labels.append([[-100] * BOOKS if reference else [1, -100, 2] for reference in marks] + [[-100] * BOOKS] * (longest - len(marks)))
    mask = torch.tensor([[True] * len(marks) + [False] * (longest - len(marks)) for marks in frames])
    codes = torch.randint(0, 30, (4, longest, BOOKS), generator=generator)
    inputs = {"input_ids": ids, "audio_input_ids": codes, "audio_input_ids_mask": mask, "audio_labels": torch.tensor(labels)}
    return inputs, [marks + [False] * (longest - len(marks)) for marks in frames]


@pytest.mark.parametrize("seed", range(8))
def test_reference_frames_among_targets(seed: int) -> None:
    """Of the codes of a batch, the content is the frames whose placeholders stand in a run without labels."""
    inputs, reference = spoken(seed)
    content = codes_of(inputs)
    assert content.frames_CT.tolist() == reference
    assert content.owner_C.tolist() == [0, 1, 2, 3]
    transposed = codes_of(inputs | {"audio_input_ids": inputs["audio_input_ids"].transpose(1, 2)})
    assert torch.equal(transposed.clips(transposed.tensor), content.clips(content.tensor))


def test_codes_of_a_model_that_predicts_none_are_all_given() -> None:
    """What the mask calls real is content then."""
    inputs, _ = spoken(0)
    content = codes_of(inputs, roles=AudioRoles(predicts=False, codebooks=BOOKS))
    assert torch.equal(content.frames_CT, inputs["audio_input_ids_mask"])


def test_given_codes_need_no_labels() -> None:
    """Where ids tell given audio from predicted, a batch without audio labels has a reference all the same."""
    ids = torch.tensor([[WORD, PLACE, PLACE, OUT, OUT, OUT], [OUT, OUT, WORD, PLACE, PLACE, PLACE]])
    inputs = {"input_ids": ids, "audio_input_ids": torch.zeros(2, 5, BOOKS, dtype=torch.long), "audio_input_ids_mask": torch.ones(2, 5)}
    known = facts(("audio_in_token_idx", PLACE), ("audio_out_token_idx", OUT), codebooks=BOOKS)
    roles = AudioRoles(predicts=True, given=frozenset({PLACE}), codebooks=BOOKS)
    content = content_of(Condition("audio_input_ids", "codes"), inputs, facts=known, roles=roles)
    assert isinstance(content, Content)
    assert content.frames_CT is not None
    assert content.frames_CT.tolist() == [[True, True, False, False, False], [False, False, True, True, True]]


def test_codes_that_the_user_named() -> None:
    """By another name all real frames are content, also of codes of another number of codebooks than the model's own."""
    inputs, _ = spoken(0)
    mask = inputs["audio_input_ids_mask"]
    codes = torch.randint(0, 30, (*mask.shape, 5), generator=torch.Generator().manual_seed(0))
    content = codes_of(inputs | {"voice_codes": codes, "voice_codes_mask": mask}, name="voice_codes")
    assert torch.equal(content.frames_CT, mask)
    assert torch.equal(content.clips(codes), codes.mT)


def test_codes_that_nobody_can_tell_apart() -> None:
    """Each thing that is missing is named: the mask of frames, the ids, labels that fit, the starts of joined codes."""
    inputs, _ = spoken(1)
    without = {name: value for name, value in inputs.items() if name != "audio_input_ids_mask"}
    assert "no mask" in codes_of(without)
    assert "no mask" in codes_of(inputs | {"audio_input_ids_mask": inputs["audio_input_ids_mask"][:, :-1]})
    assert "no token ids" in codes_of({name: value for name, value in inputs.items() if name != "input_ids"})
    assert "do not lie over" in codes_of(inputs | {"audio_labels": inputs["audio_labels"][:, :-1]})
    one = {name: value[:1] for name, value in without.items()}
    one["audio_labels"] = torch.full_like(one["audio_labels"], -100)
    assert codes_of(one).frames_CT.shape == one["audio_input_ids"].shape[:2]
    assert "no audio_in_ids_start" in codes_of({"audio_in_ids": torch.zeros(BOOKS, 9, dtype=torch.long)}, name="audio_in_ids")


def test_joined_codes() -> None:
    """Each clip begins at its start; its frames are told from its neighbours', its sample by its placeholder."""
    ids = rows(1, 0, 2)
    inputs = {"input_ids": ids, "audio_in_ids": torch.arange(BOOKS * 9).view(BOOKS, 9), "audio_in_ids_start": torch.tensor([0, 4, 5])}
    content = codes_of(inputs, name="audio_in_ids")
    assert [row.nonzero().flatten().tolist() for row in content.frames_CT] == [[0, 1, 2, 3], [4], [5, 6, 7, 8]]
    assert content.owner_C.tolist() == [0, 2, 2]


def test_codes_at_the_ends_of_a_stream_are_no_content() -> None:
    """Where a code begins or ends its codebook's stream, nothing is taken and nothing put."""
    codes = torch.tensor([[[30, 30], [5, 30], [6, 7], [31, 8]]])
    content = Content(codes, 1, torch.zeros(1, dtype=torch.long), 1, torch.ones(1, 4, dtype=torch.bool), borders=(30, 31))
    values, valid = content.clip(torch.tensor([0]))
    assert values.tolist() == [[30, 5, 6, 31], [30, 30, 7, 8]]
    assert valid.tolist() == [[False, True, True, False], [False, False, True, True]]
