"""Tests of the original-style model, its batch and its trainer."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from torch.nn import functional as F
from transformers import Trainer, TrainerCallback

import models
from models import original_training
from models.counting import CallCounter
from models.reference import batch_of, cross_entropy, outputs_of
from models.samples import IGNORED

SEED = 7
ORIGINAL = models.CASES["original"]


def test_original_expands_its_sequence() -> None:
    """The output is longer than the input: each audio token becomes its audio's frames, and masks, ids and labels say where."""
    model, batch = ORIGINAL.build(SEED).eval(), batch_of(ORIGINAL, 5)
    out, config = model(**batch), model.config
    _, frames = model.model.audio_tower.lengths(batch["audio_feature_attention_mask"].sum(1))
    assert out.logits.shape[:2] == out.expanded_input_ids.shape == out.expanded_labels.shape == out.attention_mask.shape
    assert out.logits.shape[1] > batch["input_ids"].shape[1]
    assert int(out.audio_in_mask.sum()) == int(frames.sum()) + batch["audio_in_ids"].shape[1]
    assert int(out.audio_in_discrete_codes_mask.sum()) == batch["audio_in_ids"].shape[1]
    assert int(out.audio_out_mask.sum()) == batch["audio_out_ids"].shape[1] == out.audio_logits.shape[0]
    assert out.audio_logits.shape[1:] == (config.audio_num_codebooks, config.audio_codebook_size + 2)
    assert (out.expanded_input_ids[out.audio_in_mask] == config.audio_in_token_idx).all()
    assert (out.expanded_input_ids[out.audio_out_mask] == config.audio_out_token_idx).all()
    text = ~(out.audio_in_mask | out.audio_out_mask) & out.attention_mask.bool()
    placeholders = torch.tensor([config.audio_in_token_idx, config.audio_out_token_idx])
    plain = batch["attention_mask"].bool() & ~torch.isin(batch["input_ids"], placeholders)
    assert torch.equal(out.expanded_input_ids[text], batch["input_ids"][plain])
    assert torch.equal(out.expanded_labels[text], batch["label_ids"][plain])
    assert (out.expanded_labels[~text] == IGNORED).all()
    assert len(batch["audio_out_ids_start"]) == 4
    assert (batch["label_audio_ids"][:, batch["audio_out_ids_start"]] == IGNORED).all()


def test_original_loss_is_text_and_mean_of_codebooks() -> None:
    """The loss equals an independent float64 computation from the logits, with the audio head's last call."""
    model, batch = ORIGINAL.build(SEED).eval(), batch_of(ORIGINAL, 5)
    result: dict[str, Any] = {}
    calls = outputs_of(model.get_submodule(ORIGINAL.heads[1]), lambda: result.update(out=model(**batch)))
    out = result["out"]
    assert len(calls) == 2
    assert calls[0].shape == calls[1].shape
    assert not torch.equal(*calls)
    assert torch.equal(calls[1].view_as(out.audio_logits), out.audio_logits)
    text = cross_entropy(out.logits, out.expanded_labels, 1)
    books = [cross_entropy(out.audio_logits[None, :, book], labels[None], 1) for book, labels in enumerate(batch["label_audio_ids"])]
    assert float(out.llm_loss.detach()) == pytest.approx(text, rel=1e-5)
    assert float(out.loss.detach()) == pytest.approx(text + sum(books) / len(books), rel=1e-5)


def test_original_padding_changes_nothing() -> None:
    """A sample alone gives the logits that it gives beside a longer one: masks in encoder and decoder are right."""
    model, data = ORIGINAL.build(SEED).eval(), ORIGINAL.dataset(2, SEED)
    both = model(**ORIGINAL.collate([data[0], data[1]]))
    for row in range(2):
        alone = model(**ORIGINAL.collate([data[row]]))
        size = alone.logits.shape[1]
        torch.testing.assert_close(both.logits[row, :size], alone.logits[0], rtol=1e-4, atol=1e-5)
    masks: list[Tensor] = []
    attention = model.get_submodule(ORIGINAL.attention["joint"][0])
    attention.register_forward_pre_hook(lambda _module, _args, kwargs: masks.append(kwargs["attention_mask"]), with_kwargs=True)
    padded = ~model(**ORIGINAL.collate([data[0], data[1]])).attention_mask.bool()
    assert padded.any()
    assert not masks[0].transpose(2, 3)[:, 0][padded].any(), "no query sees a padded key"


def test_original_feed_forwards_share_the_tokens() -> None:
    """In a dual layer ``audio_mlp`` receives the audio-out positions and ``mlp`` all others; the other layer has no ``audio_mlp``."""
    model, batch = ORIGINAL.build(SEED).eval(), batch_of(ORIGINAL)
    layer = model.get_submodule(ORIGINAL.dual_layers[0])
    result: dict[str, Any] = {}
    audio = outputs_of(layer.audio_mlp, lambda: result.update(out=model(**batch)))[0]
    text = outputs_of(layer.mlp, lambda: model(**batch))[0]
    mask = result["out"].audio_out_mask
    assert (audio.shape[0], text.shape[0]) == (int(mask.sum()), int((~mask).sum()))
    assert not hasattr(model.model.layers[0], "audio_mlp")


def test_original_attention_matches_a_reference() -> None:
    """The encoder's attention by hand equals PyTorch's kernel in evaluation."""
    attention = ORIGINAL.build(SEED).eval().model.audio_tower.layers[0].self_attn
    hidden, mask = torch.randn(2, 9, 24), torch.arange(9)[None, None, None] < torch.tensor([9, 5])[:, None, None, None]
    q, k, v = (proj(hidden).unflatten(-1, (4, -1)).transpose(1, 2) for proj in (attention.q_proj, attention.k_proj, attention.v_proj))
    expected = attention.out_proj(F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(-2))
    torch.testing.assert_close(attention(hidden, mask), expected, rtol=1e-5, atol=1e-6)


def test_original_trains_without_audio() -> None:
    """A batch without audio has features of shape (0, mels, frames); the encoder runs on them and training goes on."""
    data = original_training.text_dataset(4, SEED)
    assert ORIGINAL.collate([data[0]])["audio_features"].shape == (0, 16, 100)
    model = ORIGINAL.build(SEED)
    before = model.model.embed_tokens.weight.detach().clone()
    trainer = Trainer(model=model, args=ORIGINAL.arguments(max_steps=2), train_dataset=data, data_collator=ORIGINAL.collate)
    with CallCounter(model, [ORIGINAL.encoder]) as counter:
        trainer.train()
    assert counter.calls[ORIGINAL.encoder] == [1, 1]
    assert all(math.isfinite(entry["loss"]) for entry in trainer.state.log_history if "loss" in entry)
    assert not torch.equal(before, model.model.embed_tokens.weight)


def test_original_batch_is_no_mapping() -> None:
    """The batch unpacks with ``**`` and moves between devices, and is no ``Mapping``; a missing name is an AttributeError."""
    batch = batch_of(ORIGINAL)
    assert not isinstance(batch, Mapping)
    assert not hasattr(batch, "items")
    assert set(batch.keys()) == set({**batch})
    assert batch.get("nothing") is None
    assert "nothing" not in batch
    assert batch.to("meta")["input_ids"].device.type == "meta"
    with pytest.raises(AttributeError):
        batch["labels"]


class _Events(TrainerCallback):
    """Notes each ``on_step_end`` with the global step and whether any gradient was there."""

    def __init__(self) -> None:
        self.steps: list[int] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.steps.append(state.global_step)


@pytest.mark.parametrize("accumulation", [1, 2])
def test_original_trainer_is_the_stock_trainer_with_more_events(accumulation: int) -> None:
    """Its own ``training_step`` learns exactly as the stock one does, and fires ``on_step_end`` once more in every micro-batch."""
    events = {True: _Events(), False: _Events()}
    results = {}
    for own in (True, False):
        model = ORIGINAL.build(SEED)
        trainer = (original_training.OriginalTrainer if own else Trainer)(
            model=model,
            args=ORIGINAL.arguments(max_steps=3, gradient_accumulation_steps=accumulation, seed=SEED),
            train_dataset=ORIGINAL.dataset(8, SEED),
            data_collator=ORIGINAL.collate,
            callbacks=[events[own]],
        )
        trainer.train()
        logs = [entry for entry in trainer.state.log_history if "loss" in entry]
        results[own] = (model.state_dict(), [entry["loss"] for entry in logs], [entry["grad_norm"] for entry in logs])
    assert events[False].steps == [1, 2, 3]
    assert events[True].steps == [step for end in (1, 2, 3) for step in [end - 1] * accumulation + [end]]
    if transformers.__version__.startswith("4.46.") and accumulation > 1:
        # 4.46 reports the mean over micro-batches and backpropagates the sum, for every model that takes no num_items_in_batch.
        assert results[False][2][0] == pytest.approx(accumulation * results[True][2][0], rel=1e-5)
        return
    assert results[True][1] == results[False][1]
    assert all(torch.equal(value, results[False][0][name]) for name, value in results[True][0].items())
