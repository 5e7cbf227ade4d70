"""Tests of the models, batches and trainers that all other tests lean on."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

import models
from models import qwen2_audio
from models.case import Case
from models.reference import batch_of, cross_entropy, outputs_of
from models.running import VARIANTS, assert_identical, run
from models.samples import IGNORED
from models.tokens import encode

CASES = [pytest.param(case, id=case.name) for case in models.available_cases()]
CLIPS = [param for param in CASES if param.values[0].encoder]
SEED = 7


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("case", CASES)
def test_trains_and_repeats_bit_for_bit(case: Case, variant: str) -> None:
    """Three steps: losses are finite, every part learns, and the same seed gives the same run; or the case says that it cannot."""
    if variant in case.unsupported:
        with pytest.raises(RuntimeError):
            run(case, max_steps=3, **VARIANTS[variant])
        return
    before = {name: value.clone() for name, value in case.build(SEED).state_dict().items()}
    first, second = (run(case, seed=SEED, max_steps=3, **VARIANTS[variant]) for _ in range(2))
    assert len(first.losses) == 3
    assert all(math.isfinite(loss) for loss in first.losses)
    changed = {name for name, value in first.state_dict.items() if not torch.equal(value, before[name])}
    for part in (*case.heads, case.encoder, case.projector, *case.dual_layers):
        assert part is None or any(name.startswith(f"{part}.") for name in changed), part
    assert_identical(first, second)


@pytest.mark.parametrize("case", CASES)
def test_truth_about_sites(case: Case) -> None:
    """The names that a case gives are modules of its model, and its vocabulary is the size of the embedding and beyond the tokenizer's."""
    model = case.build(SEED)
    names = [*case.heads, *(name for kind in case.attention.values() for name in kind), *case.dual_layers]
    names += [name for name in (case.encoder, case.projector) if name]
    modules = {name: model.get_submodule(name) for name in names}
    assert all(hasattr(modules[name], "q_proj") for kind in case.attention.values() for name in kind)
    assert all(hasattr(modules[name], "mlp") and hasattr(modules[name], "audio_mlp") for name in case.dual_layers)
    every_attention = [name for name, module in model.named_modules() if hasattr(module, "q_proj")]
    assert sorted(every_attention) == sorted(name for kind in case.attention.values() for name in kind)
    inner = model.model if case.name == "original" else model
    assert inner.get_input_embeddings().num_embeddings == case.vocabulary > len(case.tokenizer())


def expanded_qwen2_labels(batch: Mapping[str, Tensor], merged_mask: Tensor) -> Tensor:
    """Return the labels with as many ignored ones for each placeholder as its clip has frames, where ``merged_mask`` is true."""
    placeholder = models.CASES["qwen2_audio"].tokenizer().convert_tokens_to_ids("<|AUDIO|>")
    frames = iter(qwen2_audio.frames_after(int(valid)) for valid in batch["feature_attention_mask"].sum(1))
    labels = torch.full(merged_mask.shape, IGNORED)
    for row, real in enumerate(batch["attention_mask"].bool()):
        pairs = zip(batch["input_ids"][row][real].tolist(), batch["labels"][row][real].tolist(), strict=True)
        expanded = [value for token, label in pairs for value in ([IGNORED] * next(frames) if token == placeholder else [label])]
        labels[row][merged_mask[row].bool()] = torch.tensor(expanded)
    assert merged_mask.shape[1] > batch["labels"].shape[1]
    return labels


@pytest.mark.parametrize("case", [param for param in CASES if param.id != "original"])
def test_shift_and_heads_explain_the_loss(case: Case) -> None:
    """Cross-entropies of the heads' outputs, laid over the labels with the case's shift, add up to the model's own loss."""
    model, batch = case.build(SEED).eval(), batch_of(case)
    result: dict[str, Any] = {}
    logits = {name: outputs_of(model.get_submodule(name), lambda: result.update(out=model(**batch)))[0] for name in case.heads}
    if case.name == "higgs_audio_v2":
        placeholders = torch.isin(batch["input_ids"], torch.tensor([model.config.audio_token_id, model.config.audio_delay_token_id]))
        labels = torch.full((*batch["input_ids"].shape, model.config.num_codebooks), IGNORED)
        labels[placeholders] = batch["audio_labels"][batch["audio_input_ids_mask"]]
        audio = logits["audio_lm_head"].unflatten(-1, (model.config.num_codebooks, -1))
        expected = sum(cross_entropy(audio[:, :, book], labels[..., book], 1) for book in range(model.config.num_codebooks))
        expected += cross_entropy(logits["text_lm_head"], batch["labels"], case.shift)
    elif case.name == "qwen2_audio" and qwen2_audio.EXPANDS:
        expected = cross_entropy(logits[case.heads[0]], expanded_qwen2_labels(batch, result["out"].attention_mask), case.shift)
    else:
        expected = cross_entropy(logits[case.heads[0]], batch["labels"], case.shift)
    assert float(result["out"].loss.detach()) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("case", CASES)
def test_batches_are_like_real_ones(case: Case) -> None:
    """Samples differ in length; padding is no label; all ids but placeholders are the tokenizer's; two seeds give two data sets."""
    batch, tokenizer = batch_of(case, 6), case.tokenizer()
    labels = batch["label_ids" if case.name == "original" else "labels"]
    lengths = (labels != IGNORED).sum(1)
    assert len(set(lengths.tolist())) > 1
    assert int(lengths.min()) > 0
    assert int(labels.max()) < len(tokenizer)
    if "attention_mask" in batch:
        mask = batch["attention_mask"].bool()
        assert not mask.all()
        assert (labels[~mask] == IGNORED).all()
        assert (batch["input_ids"][~mask] == tokenizer.pad_token_id).all()
        assert (labels[:, 0] == IGNORED).all(), "the prompt is not learnt"
        learnt = labels != IGNORED
        assert torch.equal(batch["input_ids"][learnt], labels[learnt])
    other, same = case.dataset(1, SEED + 1)[0], case.dataset(1, SEED)[0]
    first = case.dataset(6, SEED)[0]
    assert repr(first) == repr(same) != repr(other)


@pytest.mark.parametrize("case", CLIPS)
def test_features_have_a_constant_padded_tail(case: Case) -> None:
    """Clips differ, and end in a floor that is 2 below the clip's peak, as a Whisper feature extractor pads."""
    batch = batch_of(case, 6)
    features = batch["audio_features" if case.name == "original" else "input_features"]
    assert len(features) > 1
    assert not torch.equal(features[0], features[1])
    for clip in features:
        tail = clip[:, -1].unique()
        if len(tail) == 1:  # Voxtral's long clips fill their first chunk
            assert float(clip.max() - tail) == pytest.approx(2.0, abs=1e-5)
            assert clip[:, 0].std() > 0
    assert sum(len(clip[:, -1].unique()) == 1 for clip in features) >= 4


@pytest.mark.parametrize("case", [param for param in CLIPS if param.values[0].projector])
def test_placeholders_equal_encoder_frames(case: Case) -> None:
    """A clip has as many placeholders as the encoder makes valid frames of it; where the model expands, one."""
    model, batch = case.build(SEED).eval(), batch_of(case, 6)
    placeholders = int((batch["input_ids"] == case.tokenizer().convert_tokens_to_ids(case.audio_token)).sum())
    projected = outputs_of(model.get_submodule(case.projector), lambda: model(**batch))[0]
    if case.name == "voxtral":
        assert placeholders == projected.shape[0]
    elif case.name == "original" or qwen2_audio.EXPANDS:
        assert placeholders == projected.shape[0]  # clips
    else:
        valid = batch["feature_attention_mask"].sum(1)
        assert placeholders == sum(qwen2_audio.frames_after(int(frames)) for frames in valid)
        assert projected.shape[:2] == (len(valid), 25)


@pytest.mark.parametrize("case", CASES)
def test_tokenizer_round_trip(case: Case) -> None:
    """Text of any script comes back as it went in, special tokens are single ids from 256 on, and decoding can hide them."""
    tokenizer = case.tokenizer()
    special = tokenizer.eos_token
    ids = encode(tokenizer, f"naïve 語 a  b{special}")
    assert tokenizer.decode(ids) == f"naïve 語 a  b{special}"
    assert tokenizer.decode(ids, skip_special_tokens=True) == "naïve 語 a  b"
    assert ids[-1] == tokenizer.eos_token_id >= 256
    assert max(ids[:-1]) < 256
