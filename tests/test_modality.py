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
from probe.sites.modality import AUDIO, PADDING, TEXT, fold_frames, output_modality, sounding_frames
from probe.sites.modality import token_modality as of_tokens

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
