"""Hand-made records: what a step of a Whisper model, of a speech language model with two heads, and of a text-only model leaves behind."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from probe.records import (
    Accuracy,
    Attention,
    AudioSegment,
    Branches,
    Conditioning,
    Finding,
    Head,
    HeadSample,
    HeadwiseAttention,
    Inputs,
    InputSample,
    InputTensor,
    Optimisation,
    Part,
    SiteStatistics,
    StepRecord,
)

NO_PROJECTOR = "no projector: the encoder's output goes straight into the cross-attention"
NO_BRANCHES = "no layer has separate feed-forward branches for text and audio"


_MOVED: dict[str, Any] = {
    "clipped_norm": 0.25,
    "sampled": 5_000,
    "zero_share": 0.125,
    "update_ratio": 2e-3,
    "unchanged_share": 0.0,
    "weight_rms": 0.04,
    "dtype": "float32",
}


def whisper_record(step: int = 100, **changes: Any) -> StepRecord:
    """A step of ``WhisperForConditionalGeneration``: encoder, decoder and cross-attention, one text head."""
    kinds = (("encoder", "model.encoder.layers.{}.self_attn"), ("decoder", "model.decoder.layers.{}.self_attn"))
    layers = [_layer(name.format(index), kind, index) for kind, name in kinds for index in range(4)]
    cross = [_layer(f"model.decoder.layers.{index}.encoder_attn", "cross", index) for index in range(4)]
    record = StepRecord(
        step=step,
        time=1_760_000_000.25,
        ranks=1,
        metrics={
            "probe/loss": 4.5871,
            "probe/text/loss": 4.5869,
            "probe/text/token_accuracy": 0.4839,
            "probe/text/top5_accuracy": 0.7,
            "probe/audio_encoder/rms": 0.9312,
            "probe/attention/entropy": 0.812,
            "probe/attention/entropy_nats": 4.02,
            "probe/attention/first_token": 0.091,
            "probe/attention/padding": 0.0,
            "probe/attention/text_to_audio": 1.0,
            "probe/attention/cross/entropy": 0.93,
            "probe/attention/cross/entropy_nats": 6.81,
            "probe/attention/cross/first_token": 0.003,
            "probe/learning_rate": 1e-5,
            "probe/grad/norm": 3.2151,
        },
        not_measured={
            "projector": NO_PROJECTOR,
            "feed_forward": NO_BRANCHES,
            "probe/audio_encoder/batch_std": "one clip in every batch",
            "conditioning/audio_codes": "the model takes no audio codes: its input embedding has no codebooks",
            "conditioning/tokens": "the config names no audio token",
        },
        inputs=_whisper_inputs(),
        statistics=(
            SiteStatistics(
                "model.encoder",
                "audio_encoder",
                2,
                (2, 1500, 384),
                "torch.float32",
                2_304_000,
                0.0021,
                0.9312,
                0.931,
                -8.2,
                9.4,
                0,
                0.4123,
                None,
            ),
        ),
        heads=(_text_head("proj_out", 37),),
        attention=(*layers, *cross),
        parts=(
            Part("audio_encoder", 8_208_384, 1.0, 0, 0.0412, 67, **_MOVED),
            Part("lm_head", 19_915_776, 1.0, 0, 1.87, 1, **_MOVED),
            Part("rest", 29_550_000, 0.93, 3, 2.61, 98, **_MOVED),
        ),
        conditioning=Conditioning("model.encoder", 2, 0, 0.00132),
        optimisation=Optimisation(4.5871, (1e-5, 1e-5), 3.2151),
    )
    return replace(record, **changes)


def speech_record(step: int = 1, **changes: Any) -> StepRecord:
    """A step of a decoder of 32 dual feed-forward layers with a text head and an audio head of 8 codebooks, on two ranks."""
    names = [f"model.base.layers.{index}.self_attn" for index in range(32)]
    record = StepRecord(
        step=step,
        time=1_760_000_000.0,
        ranks=2,
        metrics={
            "probe/loss": 31.25,
            "probe/text/loss": 2.1,
            "probe/audio/loss": 6.9,
            "probe/audio/codebook_0/token_accuracy": 0.0213,
            "probe/attention/entropy": 0.61,
            "probe/attention/text_to_audio": 0.214,
            "probe/attention/audio_to_text": 0.412,
            "probe/attention/joint/entropy": 0.61,
            "probe/attention/joint/entropy_nats": 3.9,
            "probe/feed_forward/text_token_share": 0.21,
        },
        not_measured={"probe/attention/padding": "the batch has no padding"},
        inputs=_speech_inputs(),
        statistics=(
            SiteStatistics(
                "model.audio_tower",
                "audio_encoder",
                2,
                (2, 1500, 1280),
                "torch.bfloat16",
                3_840_000,
                0.01,
                1.02,
                1.02,
                -6.0,
                7.0,
                0,
                0.61,
                0.33,
            ),
            SiteStatistics(
                "model.audio_proj", "projector", 2, (2, 750, 3072), "torch.bfloat16", 4_608_000, 0.0, 0.11, 0.11, -0.7, 0.8, 0, 0.09, 0.04
            ),
        ),
        heads=(
            _text_head("text_lm_head", 12),
            Head(
                "audio_lm_head",
                "audio",
                2,
                (2, 812, 8208),
                "torch.bfloat16",
                "cuda:0",
                -0.2,
                -21.0,
                19.0,
                0,
                Accuracy(6_400, 6.9, 0.019, 0.08, 6.1, 0.02, 0.2),
                tuple(Accuracy(800, 6.0 + index / 4, 0.021 - index / 500, 0.09, 6.2) for index in range(8)),
                "shifted by one",
            ),
        ),
        attention=tuple(_layer(name, "joint", index) for index, name in enumerate(names)),
        branches=tuple(Branches(f"model.base.layers.{index}", 344, 1_280) for index in range(32)),
        parts=(
            Part("audio_encoder", 636_000_000, 0.0),
            Part("projector", 7_900_000, 1.0, 0, 0.4, 2, **_MOVED),
            Part("rest", 3_600_000_000, 1.0, 0, 12.25, 400, **_MOVED),
        ),
        conditioning=Conditioning("model.audio_tower", 2, 0, 0.21, 6_400, (("audio_in_token_id", 1_500), ("audio_out_token_id", 812))),
        optimisation=Optimisation(31.25, (2e-4,), 12.26),
    )
    return replace(record, **changes)


def text_record(step: int = 1, **changes: Any) -> StepRecord:
    """A step of a text-only model of which next to nothing was measured, and every reason is there."""
    no_encoder = "no audio encoder: no module with a mel front end, and the config has no audio part"
    record = StepRecord(
        step=step,
        time=0.0,
        ranks=1,
        metrics={},
        not_measured={
            "inputs": "the forward was given no tensor",
            "probe/loss": "training_step returned no number",
            "lm_head": "the head was not called: the loss is computed by a fused kernel",
            "attention": "flex attention builds no probabilities",
            "feed_forward": NO_BRANCHES,
            "audio_encoder": no_encoder,
            "parts": "the gradients were freed before they could be read",
            "conditioning": no_encoder,
            "optimisation": "there is no optimizer",
            "grad": "the gradients were freed before they could be read",
            "something/new": "a reason of a part that no table knows",
        },
    )
    return replace(record, **changes)


def finding() -> Finding:
    return Finding("encoder-frozen", "warning", "model.encoder", 1, "no parameter of the encoder trains", {"trainable_share": 0.0})


def _layer(site: str, kind: Any, index: int) -> Attention:
    joint, cross = kind == "joint", kind == "cross"
    return Attention(
        site=site,
        kind=kind,
        how="recomputed from q and k",
        calls=2,
        heads=6,
        keys=1500 if kind in ("encoder", "cross") else 31,
        rows=128,
        entropy=0.9 - ((index * 7) % 32) / 64,
        entropy_nats=4.0 - ((index * 7) % 32) / 16,
        top=0.2 + index / 64,
        effective_keys=20.0 - ((index * 7) % 32) / 2,
        band=None if joint else 0.3,
        distance=None if cross else 7.5,
        monotonicity=0.9 - index / 64 if cross or joint else None,
        coverage=0.7 if cross or joint else None,
        text_to_reference=0.05 if joint else None,
        first_token=((index * 5) % 32) / 100,
        padding=None if joint else 0.0,
        text_to_text=None if cross or kind == "encoder" else 0.5,
        text_to_audio=1.0 if cross else 0.1 + ((index * 3) % 32) / 100 if joint else None,
        audio_to_text=0.4 if joint else None,
        audio_to_audio=1.0 if kind == "encoder" else None,
        per_head=HeadwiseAttention((1.0, 2.0), (0.1, 0.2)),
    )


def _text_head(site: str, labelled: int) -> Head:
    target = tuple(50_257 + (index * 37) % 400 if index % 5 else 11 + index for index in range(labelled))
    predicted = tuple(token + (index % 3 == 0) for index, token in enumerate(target))
    texts = ("<|en|><|transcribe|> the quick brown fog", "<|en|><|transcribe|> the quick brown fox")
    return Head(
        site=site,
        modality="text",
        calls=2,
        shape=(2, 31, 51_865),
        dtype="torch.float32",
        device="cuda:0",
        mean=-3.21,
        minimum=-18.5,
        maximum=22.75,
        accuracy=Accuracy(62, 4.5869, 0.4839, 0.7, 5.12, 0.0712, 0.31, 290),
        alignment="not shifted (encoder-decoder)",
        top_token_text=" and",
        shown=(HeadSample(0, predicted, target, (), (), *texts, 0.25),),
    )


def text_sample(index: int) -> HeadSample:
    """A sample whose tokens are known as text: two of five are wrong."""
    target, predicted = ("<|en|>", " hold", " the", " door", "</s>"), ("<|en|>", " mold", " the", " doorway", "</s>")
    return HeadSample(index, (1, 9, 3, 8, 5), (1, 2, 3, 4, 5), predicted, target, "".join(predicted), "".join(target), 2 / 3)


def _whisper_inputs() -> Inputs:
    text = "<|startoftranscript|><|en|><|transcribe|><|notimestamps|> the quick brown fox<|endoftext|>" + "<|endoftext|>" * 12
    return Inputs(
        micro_batches=2,
        samples=4,
        tensors=(
            InputTensor("input_features", (2, 80, 3000), "torch.float32", "cuda:0", -1.5, 1.8123, 0.0132),
            InputTensor(
                "labels", (2, 31), "torch.int64", "cuda:0", -100, 50_363, 20_103.5, (50_258, 50_259, 50_359, 50_363, 264, 1_702, 345)
            ),
            InputTensor("decoder_input_ids", (2, 31), "torch.int64", "cuda:0", 11, 50_363, 30_103.5, (50_258, 50_258, 50_259)),
        ),
        shown=(
            InputSample(0, (50_258, 50_259), text, (50_258, 50_259, 264), "<|startoftranscript|><|en|> the quick brown fox<|endoftext|>"),
        ),
        audio=(
            AudioSegment(0, 0, 412, "frames", 4.12),
            AudioSegment(1, 0, 3000, "frames", 30.0, "constant"),
        ),
        padding_share=0.2317,
        labels_masked_share=0.2419,
        ids_outside_vocabulary=0,
        audio_clips=4,
        audio_clips_constant=1,
    )


def _speech_inputs() -> Inputs:
    return Inputs(
        micro_batches=4,
        samples=8,
        tensors=(
            InputTensor("input_ids", (2, 812), "torch.int64", "cuda:0", 0, 128_255, 90_000.0, (128_000, 128_006, 9_125)),
            InputTensor("attention_mask", (2, 812), "torch.int64", "cuda:0", 1, 1, 1.0, (1, 1, 1, 1, 1, 1, 1)),
            InputTensor("audio_features", (2, 128, 3000), "torch.float32", "cpu", None, None, None, (), "3 non-finite values"),
        ),
        shown=(
            InputSample(
                0, (128_000, 128_006), "<|begin_of_text|>say this like<|audio_bos|>" + "<|AUDIO|>" * 750 + "<|audio_eos|> " + "la " * 300
            ),
            InputSample(1, tuple(range(40))),
        ),
        audio=tuple(AudioSegment(index // 6, 31 + 50 * (index % 6), 40, "tokens") for index in range(12)),
        padding_share=0.0,
        labels_masked_share=0.61,
        ids_outside_vocabulary=3,
        audio_clips=12,
        audio_clips_constant=0,
    )
