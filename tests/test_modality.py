from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import WhisperConfig, WhisperFeatureExtractor, WhisperModel

from probe.capture.microbatch import MicroBatch
from probe.sites.facts import ModelFacts
from probe.sites.modality import AUDIO, PADDING, REFERENCE, TEXT, fold_frames, layer_modality, output_modality, sounding_frames
from probe.sites.modality import token_modality as of_tokens
from probe.sites.reference import AudioRoles
from waiting import NoWaiting

AUDIO_ID, DELAY_ID = 7, 9


def facts(*, encoder_decoder: bool = False) -> ModelFacts:
    return ModelFacts(
        model_class="Any",
        model_type="any",
        encoder_decoder=encoder_decoder,
        vocabulary=32,
        codebooks=0,
        audio_tokens=(("audio_token_id", AUDIO_ID),),
        audio_placeholders=(AUDIO_ID, DELAY_ID),
        label_shift=1,
    )


def micro(output: Any = None, batch: dict[str, Any] | None = None, **kwargs: Any) -> MicroBatch:
    return MicroBatch(index=0, batch=batch or {}, kwargs=kwargs, output=output)


def random_ids(seed: int, low: int = 0) -> Tensor:
    return torch.randint(low, 12, (4, 15), generator=torch.Generator().manual_seed(seed))


def lengths_mask(lengths: list[int], total: int) -> Tensor:
    return torch.arange(total) < torch.tensor(lengths)[:, None]


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.float32])
def test_tokens_from_ids_and_mask(dtype: torch.dtype) -> None:
    """Every placeholder id is audio, what the mask hides is padding (also a hidden placeholder), the rest is text."""
    ids, mask = random_ids(0), lengths_mask([15, 3, 9, 0], 15)
    codes = of_tokens(micro(input_ids=ids, attention_mask=mask.to(dtype)), facts())
    assert codes is not None
    assert codes.dtype == torch.int8
    for b in range(4):
        for s in range(15):
            expected = PADDING if not mask[b, s] else AUDIO if int(ids[b, s]) in (AUDIO_ID, DELAY_ID) else TEXT
            assert codes[b, s] == expected


def test_tokens_without_a_mask_that_fits() -> None:
    """Without a mask of the ids' shape nothing is padding; without ids nothing is known; what only the batch holds counts too."""
    ids = random_ids(1)
    masks = [torch.zeros(shape) for shape in ((4, 1, 15, 15), (4, 9), (1, 15))]
    for given in (micro(input_ids=ids), micro(batch={"input_ids": ids}), *(micro(input_ids=ids, attention_mask=mask) for mask in masks)):
        codes = of_tokens(given, facts())
        assert codes is not None
        assert torch.equal(codes == AUDIO, (ids == AUDIO_ID) | (ids == DELAY_ID))
        assert not (codes == PADDING).any()
    assert of_tokens(micro(inputs_embeds=torch.zeros(4, 15, 8)), facts()) is None
    assert of_tokens(micro(input_ids=ids[None]), facts()) is None


def test_decoder_tokens_from_labels() -> None:
    """For an encoder-decoder model the run of -100 that ends the labels is padding, not an ignored label before it."""
    labels = random_ids(2, low=1)
    labels[0, 10:], labels[1, :4], labels[2, 0:] = -100, -100, -100
    codes = of_tokens(micro(labels=labels, input_features=torch.zeros(4, 8, 20)), facts(encoder_decoder=True))
    assert codes is not None
    assert codes[0].tolist() == [TEXT] * 10 + [PADDING] * 5
    assert codes[1].tolist() == [TEXT] * 15
    assert codes[2].tolist() == [PADDING] * 15
    assert codes[3].tolist() == [TEXT] * 15
    popped = of_tokens(micro(batch={"labels": labels}, decoder_input_ids=labels.clamp(min=0)), facts(encoder_decoder=True))
    assert popped is not None
    assert torch.equal(popped, codes)


def test_decoder_mask_wins_over_labels() -> None:
    """``decoder_attention_mask`` decides where it is given; decoder ids alone are all text; without either nothing is known."""
    labels = random_ids(3, low=1)
    labels[:, 5:] = -100
    mask = lengths_mask([15, 3, 9, 5], 15)
    codes = of_tokens(micro(labels=labels, decoder_attention_mask=mask.long()), facts(encoder_decoder=True))
    assert codes is not None
    assert torch.equal(codes, torch.where(mask, TEXT, PADDING).to(torch.int8))
    misfit = of_tokens(micro(labels=labels, decoder_attention_mask=mask[:, :4]), facts(encoder_decoder=True))
    assert misfit is not None
    assert torch.equal(misfit == PADDING, labels == -100)
    alone = of_tokens(micro(decoder_input_ids=labels.clamp(min=0)), facts(encoder_decoder=True))
    assert alone is not None
    assert bool((alone == TEXT).all())
    assert of_tokens(micro(input_features=torch.zeros(4, 8, 20)), facts(encoder_decoder=True)) is None


@pytest.mark.parametrize("wrap", [lambda **fields: fields, lambda **fields: SimpleNamespace(**fields)])
def test_tokens_that_the_model_expanded(wrap: Any) -> None:
    """The masks in the root's output say what became audio, its attention mask what is padding."""
    ids, kept = random_ids(4), lengths_mask([15, 8, 12, 15], 15)
    inside, outside, codes = (torch.rand(4, 15, generator=torch.Generator().manual_seed(seed)) < 0.3 for seed in (5, 6, 7))
    found = output_modality(
        micro(
            wrap(
                expanded_input_ids=ids,
                audio_in_mask=inside,
                audio_out_mask=outside,
                audio_in_discrete_codes_mask=codes,
                attention_mask=kept.long(),
            )
        )
    )
    assert found is not None
    expected = torch.where(~kept, PADDING, torch.where(inside | outside | codes, AUDIO, TEXT))
    assert torch.equal(found, expected.to(torch.int8))
    partly = output_modality(micro(wrap(expanded_input_ids=ids, audio_out_mask=outside, audio_in_mask=None)))
    assert partly is not None
    assert torch.equal(partly == AUDIO, outside)
    assert output_modality(micro(wrap(logits=torch.zeros(4, 15, 3)))) is None
    assert output_modality(micro(None)) is None


def reference_in(audio: Tensor, labelled: Tensor) -> Tensor:
    """Walk along each row: the positions of every run of audio without a labelled position."""
    out = torch.zeros_like(audio)
    for b in range(audio.shape[0]):
        start = None
        for s in range(audio.shape[1] + 1):
            here = s < audio.shape[1] and bool(audio[b, s])
            if here and start is None:
                start = s
            elif not here and start is not None:
                out[b, start:s] = not labelled[b, start:s].any()
                start = None
    return out


def coded(audio: Tensor, reference: Tensor, kept: Tensor) -> Tensor:
    codes = torch.where(reference, REFERENCE, torch.where(audio, AUDIO, TEXT))
    return torch.where(kept, codes, PADDING).to(torch.int8)


SPEAKER = AudioRoles(predicts=True, codebooks=2)


@pytest.mark.parametrize("seed", range(6))
def test_reference_among_the_roots_tokens(seed: int) -> None:
    """Runs of placeholders without labels, laid over in order whatever the mask hides; a model that only listens has no reference."""
    ids, kept = random_ids(seed), lengths_mask([15, 6, 12, 1], 15)
    audio = (ids == AUDIO_ID) | (ids == DELAY_ID) | (random_ids(seed + 40) > 8)
    frames = torch.randint(0, 9, (4, 15, 2), generator=torch.Generator().manual_seed(seed)).where(
        random_ids(seed + 60)[..., None] > 9, -100
    )
    valid = torch.arange(15) < audio.sum(1, keepdim=True)
    labelled = torch.zeros_like(audio)
    labelled[audio] = (frames != -100).any(-1)[valid]
    given = micro(
        input_ids=torch.where(audio, AUDIO_ID, ids),
        attention_mask=kept,
        batch={"audio_labels": frames, "audio_input_ids_mask": valid},
    )
    found = of_tokens(given, facts(), SPEAKER)
    assert found is not None
    assert torch.equal(found, coded(audio, reference_in(audio, labelled), kept))
    assert bool((found == REFERENCE).any())
    listened = of_tokens(given, facts())
    assert listened is not None
    assert torch.equal(listened, coded(audio, torch.zeros_like(audio), kept))
    unlabelled = of_tokens(micro(**given.kwargs), facts(), SPEAKER)
    assert unlabelled is not None
    assert torch.equal(unlabelled, listened)


def test_placeholders_of_given_audio() -> None:
    """What a placeholder of given audio stands for is reference by definition, labels or not, and takes no label of a predicted frame."""
    ids = torch.tensor([[1, 7, 7, 1, 9, 9, 9, 1], [9, 9, 1, 7, 1, 1, 1, 1]])
    columns = {"label_audio_ids": torch.tensor([[-100, 3, 3, -100, -100], [-100] * 5])}
    roles = AudioRoles(predicts=True, given=frozenset({7}), codebooks=2)
    t, a, r = TEXT, AUDIO, REFERENCE
    found = of_tokens(micro(input_ids=ids, **columns), facts(), roles)
    assert found is not None
    assert found.tolist() == [[t, r, r, t, a, a, a, t], [r, r, t, r, t, t, t, t]]
    without = of_tokens(micro(input_ids=ids), facts(), roles)
    assert without is not None
    assert without.tolist() == [[t, r, r, t, a, a, a, t], [a, a, t, r, t, t, t, t]]


def test_masks_among_the_inputs() -> None:
    """A mask adds to what the ids say; without ids it tells alone, where it covers all audio and the tokens' shape is known."""
    ids, mask, kept = random_ids(2), random_ids(3) > 7, lengths_mask([15, 6, 12, 3], 15)
    found = of_tokens(micro(input_ids=ids, attention_mask=kept, speech_mask=mask.long()), facts())
    assert found is not None
    audio = (ids == AUDIO_ID) | (ids == DELAY_ID) | mask
    assert torch.equal(found, coded(audio, torch.zeros_like(audio), kept))
    embeds = {"inputs_embeds": torch.zeros(4, 15, 8), "attention_mask": kept}
    alone = of_tokens(micro(**embeds, audio_token_mask=mask), facts())
    assert alone is not None
    assert torch.equal(alone, coded(mask, torch.zeros_like(mask), kept))
    assert of_tokens(micro(**embeds), facts()) is None
    assert of_tokens(micro(**embeds, audio_token_mask=mask[:, :9]), facts()) is None
    assert of_tokens(micro(**embeds, audio_out_mask=mask, input_features=torch.zeros(4, 8, 20)), facts()) is None
    both = of_tokens(micro(**embeds, audio_out_mask=mask, audio_in_mask=~mask), facts(), SPEAKER)
    assert both is not None
    assert torch.equal(both, coded(torch.ones_like(mask), ~mask, kept))


def test_one_id_for_a_segment_is_no_token_of_the_layers() -> None:
    """Where one placeholder stands for a segment that the model expands, the root's ids tell nothing, even if the lengths agree."""
    starts = torch.tensor([0])
    assert of_tokens(micro(input_ids=random_ids(2)), facts()) is not None
    assert of_tokens(micro(input_ids=random_ids(2), audio_out_ids_start=starts), facts()) is None
    assert of_tokens(micro(input_ids=random_ids(2), batch={"audio_in_ids_start": starts}), facts()) is None


@pytest.mark.parametrize("seed", range(4))
def test_reference_in_what_the_model_expanded(seed: int) -> None:
    """Audio in is reference, audio out is where a run's columns are all -100; without labels all audio out is target."""
    ids, kept = random_ids(4), lengths_mask([15, 8, 12, 15], 15)
    out, inside = random_ids(seed) > 5, random_ids(seed + 20) > 8
    out &= ~inside
    drawn = torch.rand(2, int(out.sum()), generator=torch.Generator().manual_seed(seed + 30))
    columns = torch.where(drawn > 0.8, 5, -100)
    labelled = torch.zeros_like(out)
    labelled[out] = (columns != -100).any(0)
    output = {"expanded_input_ids": ids, "audio_in_mask": inside, "audio_out_mask": out, "attention_mask": kept}
    found = output_modality(micro(output, batch={"label_audio_ids": columns}), SPEAKER)
    assert found is not None
    assert torch.equal(found, coded(out | inside, inside | reference_in(out, labelled), kept))
    without = output_modality(micro(output), SPEAKER)
    assert without is not None
    assert torch.equal(without, coded(out | inside, inside, kept))


def causal(kept: Tensor) -> Tensor:
    """Return the (B, 1, S, S) mask of causal attention over the tokens that are not padding."""
    size = kept.shape[1]
    return torch.ones(size, size, dtype=torch.bool).tril()[None, None] & kept[:, None, None]


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("form", ["2-D", "bool", "added", "opened", "none"])
def test_tokens_of_a_layers_arguments(form: str, side: str) -> None:
    """A mask of all audio tells, and padding is read off the layer's attention mask of any form, else off the root's."""
    audio, kept = random_ids(8) > 6, lengths_mask([15, 8, 12, 3], 15)
    kept = kept.flip(1) if side == "left" else kept
    allowed = causal(kept)
    added = torch.where(allowed, 0.0, torch.finfo(torch.float32).min)
    opened = allowed | ~allowed.any(-1, keepdim=True)  # as transformers does for kernels that cannot bear a row that sees nothing
    masks = {"2-D": kept.long(), "bool": allowed, "added": added, "opened": opened, "none": None}
    root = micro(attention_mask=kept) if form == "none" else micro()
    found = layer_modality({"audio_token_mask": audio, "attention_mask": masks[form]}, root, facts(), SPEAKER)
    assert found is not None
    assert torch.equal(found, coded(audio, torch.zeros_like(audio), kept))


def test_reference_by_a_layers_arguments() -> None:
    """Labels among the root's inputs are laid over what the layer calls audio."""
    audio = random_ids(9) > 6
    columns = torch.full((2, int(audio.sum())), -100)
    columns[1, 4] = 3
    labelled = torch.zeros_like(audio)
    labelled[audio] = (columns != -100).any(0)
    found = layer_modality({"audio_token_mask": audio}, micro(label_audio_ids=columns), facts(), SPEAKER)
    assert found is not None
    assert torch.equal(found, coded(audio, reference_in(audio, labelled), torch.ones_like(audio)))


def test_a_layer_that_knows_a_part() -> None:
    """A mask of predicted audio alone is not taken for the whole where a clip is given, nor is anything claimed without a mask."""
    audio = random_ids(9) > 6
    clip = {"audio_features": torch.zeros(1, 8, 20)}
    assert layer_modality({"audio_out_mask": audio}, micro(**clip), facts(), SPEAKER) is None
    named = ModelFacts("Any", "any", False, 32, 0, (("audio_in_token_idx", 7),), (7,), 1)
    assert layer_modality({"audio_out_mask": audio}, micro(), named, SPEAKER) is None
    assert layer_modality({"audio_out_mask": audio}, micro(), facts(), SPEAKER) is not None
    assert layer_modality({"hidden_states": torch.zeros(4, 15, 3)}, micro(), facts(), SPEAKER) is None


@pytest.mark.parametrize("mask", [torch.zeros(4, 1, 15, 15, dtype=torch.int64), torch.zeros(4, 1, 15, 20), torch.zeros(4, 1, 15)])
def test_a_layers_attention_mask_that_says_nothing(mask: Tensor) -> None:
    """From an attention mask that is not over these tokens, or of which nobody knows what its numbers mean, no padding is read."""
    audio, kept = random_ids(9) > 6, lengths_mask([15, 8, 12, 3], 15)
    found = layer_modality({"audio_token_mask": audio, "attention_mask": mask}, micro(attention_mask=kept), facts(), SPEAKER)
    assert found is not None
    assert torch.equal(found, coded(audio, torch.zeros_like(audio), kept))


def test_nothing_waits_for_the_device() -> None:
    """From ids, layer masks and the root's output alike."""
    ids, kept, audio = random_ids(0), lengths_mask([15, 3, 9, 0], 15), random_ids(1) > 6
    columns = {"label_audio_ids": torch.zeros(2, 20, dtype=torch.int64)}
    with NoWaiting() as watch:
        of_tokens(micro(input_ids=ids, attention_mask=kept, **columns), facts(), SPEAKER)
        layer_modality({"audio_token_mask": audio, "attention_mask": causal(kept)}, micro(**columns), facts(), SPEAKER)
        output_modality(micro({"expanded_input_ids": ids, "audio_out_mask": audio, "attention_mask": kept}, batch=columns), SPEAKER)
    assert watch.operators > 30


def frame_modality(given: MicroBatch, *, frames: int, clips: int) -> Tensor | None:
    sounding = sounding_frames(given)
    return None if sounding is None else fold_frames(sounding, frames=frames, clips=clips)


def extract(seconds: list[float], *, scale: float = 0.1, mask: bool = False) -> dict[str, Tensor]:
    extractor = WhisperFeatureExtractor(feature_size=80, chunk_length=2)
    generator = np.random.default_rng(11)
    clips = [(generator.standard_normal(int(16000 * length)) * scale).astype(np.float32) for length in seconds]
    return dict(extractor(clips, sampling_rate=16000, return_tensors="pt", return_attention_mask=mask))


@pytest.mark.parametrize("frames", [200, 100, 50])
def test_frames_from_what_whisper_pads(frames: int) -> None:
    """Without a mask the silence that Whisper's own extractor appends is padding, to within the width of its window."""
    seconds = [1.0, 0.55, 2.0]
    codes = frame_modality(micro(**extract(seconds)), frames=frames, clips=3)
    assert codes is not None
    assert codes.shape == (3, frames)
    for row, length in zip(codes, seconds):
        sounding = int((row == AUDIO).sum())
        assert torch.equal(row, torch.where(torch.arange(frames) < sounding, AUDIO, PADDING).to(torch.int8))
        assert 0 <= sounding - length / 2 * frames <= 4 * frames / 200 + 1 or sounding == frames


def test_a_pause_is_no_padding_and_silence_is() -> None:
    """A silent stretch inside a clip is audio; a clip that is silent throughout is all padding."""
    features = extract([1.8, 1.5])["input_features"]
    features[0, :, 40:90] = features[0].min()
    codes = frame_modality(micro(input_features=features), frames=100, clips=2)
    assert codes is not None
    assert bool((codes[0, :89] == AUDIO).all())
    silent = frame_modality(micro(**extract([1.0], scale=0.0)), frames=100, clips=1)
    assert silent is not None
    assert not silent.any()


@pytest.mark.parametrize("name", ["feature_attention_mask", "input_features_mask", "audio_feature_attention_mask", "attention_mask"])
def test_frames_from_a_mask(name: str) -> None:
    """A feature mask decides over the features; a frame of the encoder is audio when any frame it covers is."""
    features = extract([1.0, 2.0, 2.0])["input_features"]
    mask = lengths_mask([100, 37, 200], 200)
    codes = frame_modality(micro(input_features=features, **{name: mask.long()}), frames=50, clips=3)
    assert codes is not None
    assert (codes == AUDIO).sum(1).tolist() == [25, 10, 50]
    if name != "attention_mask":
        alone = frame_modality(micro(**{name: mask}), frames=50, clips=3)
        assert alone is not None
        assert torch.equal(alone, codes)


def test_the_extractors_mask_and_its_silence_agree() -> None:
    """For real clips, what the mask of Whisper's extractor says and what its features show differ by two frames at most."""
    given = extract([0.3, 1.1, 1.7], mask=True)
    by_mask, by_silence = sounding_frames(micro(**given)), sounding_frames(micro(input_features=given["input_features"]))
    assert by_mask is not None
    assert by_silence is not None
    assert int((by_mask != by_silence).sum(1).max()) <= 2


def test_frames_that_do_not_fit() -> None:
    """Another number of clips, a length that is no multiple, a text mask, token features or no audio at all: nothing is claimed."""
    features = extract([1.0, 2.0])["input_features"]
    assert frame_modality(micro(input_features=features), frames=100, clips=3) is None
    assert frame_modality(micro(input_features=features), frames=150, clips=2) is None
    assert frame_modality(micro(input_features=features), frames=400, clips=2) is None
    assert frame_modality(micro(attention_mask=torch.ones(2, 200)), frames=100, clips=2) is None
    assert frame_modality(micro(input_features=features[:0]), frames=100, clips=0) is None
    assert frame_modality(micro(input_features=torch.ones(2, 80, 200, dtype=torch.int64)), frames=100, clips=2) is None
    text_mask = frame_modality(micro(input_features=features, attention_mask=torch.zeros(2, 40)), frames=100, clips=2)
    assert text_mask is not None
    assert text_mask.any()
    assert fold_frames(torch.ones(2, 200, dtype=torch.bool), frames=0, clips=2) is None
    assert fold_frames(torch.ones(2, 0, dtype=torch.bool), frames=5, clips=2) is None


def test_silence_is_read_before_spec_augment_writes() -> None:
    """SpecAugment overwrites the features in place, so frames are read before the forward; read after it, they would differ."""
    config = WhisperConfig(
        d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2, encoder_ffn_dim=16,
        decoder_ffn_dim=16, max_source_positions=100, vocab_size=32, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        decoder_start_token_id=1, apply_spec_augment=True, mask_time_prob=0.0, mask_feature_prob=0.5,
    )  # fmt: skip
    given = micro(**extract([0.5, 1.0]))
    before = sounding_frames(given)
    torch.manual_seed(0)
    np.random.seed(0)
    WhisperModel(config).train()(input_features=given.kwargs["input_features"], decoder_input_ids=torch.ones(2, 3, dtype=torch.int64))
    after = sounding_frames(given)
    assert before is not None
    assert after is not None
    assert before.sum(1).tolist()[0] < 60
    assert not torch.equal(before, after)


def test_inputs_are_left_as_they_are() -> None:
    """No function writes into the tensors it reads."""
    ids, mask, audio = random_ids(12), lengths_mask([15, 3, 9, 0], 15).long(), random_ids(13) > 6
    copies = [ids.clone(), mask.clone(), audio.clone()]
    of_tokens(micro(input_ids=ids, attention_mask=mask), facts())
    output_modality(micro({"expanded_input_ids": ids, "audio_in_mask": audio, "attention_mask": mask}))
    sounding_frames(micro(feature_attention_mask=mask))
    assert all(torch.equal(now, copy) for now, copy in zip((ids, mask, audio), copies))
