"""Tests of how passes are scored and compared: against float64, plain Python and torch's own functions."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from probe.capture.microbatch import MicroBatch
from probe.counterfactual import effects, scoring
from probe.counterfactual.effects import SUMS, effect_cell, effect_cells, effect_sums, own_table, paired_table, samples_known
from probe.counterfactual.replay import Replayed
from probe.counterfactual.scoring import HeadRows, Samples, distribution, divergence, head_rows, row_losses, samples_of
from probe.measure.heads import Logits
from probe.records import Site
from probe.sites.facts import ModelFacts

pytestmark = pytest.mark.pure  # of torch and probe alone: the same with every transformers

TEXT = Site("lm_head", "lm_head", "test", modality="text")
AUDIO = Site("audio_head", "lm_head", "test", modality="audio", codebooks=3)
FACTS = ModelFacts("Test", "test", False, 11, 3, (), (), label_shift=1)


def drawn(*shape: int, seed: int = 0, scale: float = 3.0) -> Tensor:
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def labels_of(*shape: int, vocabulary: int, seed: int = 0, ignored: float = 0.3) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(vocabulary, shape, generator=generator)
    return labels.masked_fill(torch.rand(shape, generator=generator) < ignored, -100)


def expected_losses(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy in float64, NaN where there is no label."""
    flat = logits.double().reshape(-1, logits.shape[-1])
    loss = functional.cross_entropy(flat, labels.reshape(-1).clamp(min=0), reduction="none")
    return torch.where(labels.reshape(-1) == -100, torch.nan, loss)


def rows_of(logits: Tensor, labels: Tensor, samples: Samples | None = None) -> HeadRows:
    return HeadRows(row_losses(logits, labels), samples or Samples(logits.shape[0], known=True), logits)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("shape", [(4, 7), (23,), (3, 5, 2)])
def test_losses_are_the_cross_entropy(shape: tuple[int, ...], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every labelled row has torch's cross-entropy, whatever dtype, strides and chunks, and the logits are not changed."""
    monkeypatch.setattr(scoring, "per_chunk", lambda item_bytes, *rest: 3)
    logits = drawn(2, *shape, 11).to(dtype)[0].transpose(0, 1).contiguous().transpose(0, 1)
    labels = labels_of(*shape, vocabulary=11)
    before = logits.clone()
    torch.testing.assert_close(row_losses(logits, labels).double(), expected_losses(logits, labels), rtol=1e-5, atol=1e-5, equal_nan=True)
    assert torch.equal(logits, before)


def test_a_chunk_is_bounded() -> None:
    """Rows are worked through so many at a time that a block in float32 stays below 8 MiB, or is one row."""
    taken: list[int] = []
    original = scoring.blocks

    def noting(x: Tensor, rows: int) -> Any:
        taken.append(rows)
        return original(x, rows)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scoring, "blocks", noting)
        row_losses(drawn(2, 3, 11), labels_of(2, 3, vocabulary=11))
        row_losses(torch.zeros(1, 2, 3_000_000), torch.zeros(1, 2, dtype=torch.int64))
    assert [rows * 4 * vocabulary <= 8 * 2**20 for rows, vocabulary in zip(taken, (11, 11), strict=False)] == [True, True]
    assert taken[-1] == 1


def test_what_does_not_count_is_nan() -> None:
    """Masked labels, labels outside the vocabulary, NaN logits and a label whose own logit is -Inf; an -Inf elsewhere is legitimate."""
    logits = drawn(6, 5)
    logits[2, 0] = torch.nan
    logits[3, 1] = -torch.inf
    logits[4, 1] = -torch.inf
    labels = torch.tensor([-100, 5, 1, 1, 2, 0])
    assert row_losses(logits, labels).isnan().tolist() == [True, True, True, True, False, False]
    kept = logits[4][torch.tensor([0, 2, 3, 4])]
    torch.testing.assert_close(row_losses(logits, labels)[4], kept.logsumexp(0) - logits[4, 2])


def test_what_the_model_does_to_its_logits_counts() -> None:
    """A factor and a soft cap are applied before the cross-entropy."""
    logits, labels = drawn(4, 9), labels_of(4, vocabulary=9)
    changed = 5.0 * torch.tanh(logits * 0.5 / 5.0)
    before = logits.clone()
    found = row_losses(logits, labels, change=Logits(0.5, 5.0))
    assert torch.equal(logits, before)
    torch.testing.assert_close(found.double(), expected_losses(changed, labels), rtol=1e-5, atol=1e-5, equal_nan=True)
    kept = distribution(HeadRows(found, Samples(1, True), logits, Logits(0.5, 5.0)), most=4, salt=0)
    assert kept is not None and torch.equal(logits, before)
    torch.testing.assert_close(kept.log_p_RV, functional.log_softmax(changed, -1)[kept.index_R])


def test_text_rows_are_aligned_as_the_model_means_them() -> None:
    """The logits of a decoder-only model are scored against the next label, sample by sample."""
    logits, labels = drawn(3, 6, 11), labels_of(3, 6, vocabulary=11)
    ids = torch.zeros(3, 6, dtype=torch.int64)
    found = head_rows(TEXT, Replayed(MicroBatch(0, {}, {"labels": labels, "input_ids": ids}, {}), {"lm_head": logits}), FACTS)
    assert isinstance(found, HeadRows)
    assert found.samples == Samples(3, known=True)
    expected = expected_losses(logits[:, :-1], labels[:, 1:]).view(3, 5)
    totals = found.samples.totals(torch.where(found.loss_N.isfinite(), found.loss_N, 0.0))
    torch.testing.assert_close(totals, expected.nansum(1), rtol=1e-6, atol=1e-6)


def test_codebooks_are_rows_of_their_own() -> None:
    """Audio logits (B, S, K·V) are scored codebook by codebook, and every codebook's row belongs to the sample of its position."""
    logits, labels = drawn(2, 4, 3 * 5), labels_of(2, 4, 3, vocabulary=5)
    inputs = {"audio_labels": labels, "input_ids": torch.zeros(2, 4, dtype=torch.int64)}
    found = head_rows(AUDIO, Replayed(MicroBatch(0, {}, inputs, {}), {"audio_head": logits}), FACTS)
    assert isinstance(found, HeadRows)
    expected = expected_losses(logits.view(2, 4, 3, 5)[:, :-1], labels[:, 1:]).view(2, -1)
    torch.testing.assert_close(own_table([found])[:, 0], expected.nansum(1), rtol=1e-6, atol=1e-6)
    assert own_table([found])[:, 1].tolist() == expected.isfinite().sum(1).tolist()


def joined_pass(mask: Tensor | None) -> tuple[Tensor, Tensor, Replayed]:
    """Logits (n, K, V) over the audio frames of 3 samples: 2, 0 and 3 of them."""
    logits, labels = drawn(5, 3, 5), labels_of(3, 5, vocabulary=5, ignored=0.2)
    inputs = {"label_audio_ids": labels, "input_ids": torch.zeros(3, 4, dtype=torch.int64)}
    output = {} if mask is None else {"audio_out_mask": mask}
    return logits, labels, Replayed(MicroBatch(0, {}, inputs, output), {"audio_head": logits})


def test_joined_frames_are_told_apart_by_the_mask() -> None:
    """Rows of all samples in one find their sample by the mask of the positions that they were taken from."""
    mask = torch.tensor([[0, 1, 1, 0], [0, 0, 0, 0], [1, 1, 0, 1]], dtype=torch.bool)
    logits, labels, again = joined_pass(mask)
    found = head_rows(AUDIO, again, FACTS)
    assert isinstance(found, HeadRows) and found.samples.known
    rows = expected_losses(logits[:-1], labels.T[1:]).view(4, 3)  # the label of a frame is in the next column
    expected = [rows[:2].nansum(), torch.tensor(0.0), rows[2:].nansum()]
    torch.testing.assert_close(own_table([found])[:, 0], torch.stack([value.double() for value in expected]), rtol=1e-6, atol=1e-6)


def test_joined_frames_without_a_mask_are_one_sample() -> None:
    """Where nothing tells whose a row is, all of them are one sample that is not known; a batch of one is known anyway."""
    _, _, again = joined_pass(None)
    found = head_rows(AUDIO, again, FACTS)
    assert isinstance(found, HeadRows)
    assert found.samples == Samples(1, known=False)
    assert own_table([found]).shape == (1, 2)
    one = MicroBatch(0, {}, {"input_ids": torch.zeros(1, 4, dtype=torch.int64)}, {})
    assert samples_of(torch.Size([5]), 3, one) == Samples(1, known=True)


def test_rows_beyond_the_mask_belong_to_nobody() -> None:
    """A mask that names fewer positions than there are rows leaves the others out of every sample."""
    mask = torch.tensor([[1, 0], [0, 1]], dtype=torch.bool)
    micro = MicroBatch(0, {}, {"input_ids": torch.zeros(2, 2, dtype=torch.int64)}, {"audio_out_mask": mask})
    found = samples_of(torch.Size([3]), 2, micro)
    assert found.totals(torch.ones(6)).tolist() == [2.0, 2.0]
    assert found.of(torch.tensor([0, 1, 2, 3, 4, 5]), 6).tolist() == [0, 0, 1, 1, 2, 2]


def test_a_head_that_was_not_called_is_scored_from_what_is_offered() -> None:
    """Log-probabilities of the labels in the output give the losses; without them there is a reason."""
    labels = torch.tensor([[3, 4, -100], [-100, 5, 6]])
    log_probs = -drawn(2, 2).abs()
    inputs = {"labels": labels, "input_ids": torch.zeros(2, 3, dtype=torch.int64)}
    found = head_rows(TEXT, Replayed(MicroBatch(0, {}, inputs, {"log_probs": log_probs}), {}), FACTS)
    assert isinstance(found, HeadRows) and found.logits is None
    assert found.loss_N.isnan().tolist() == [False, True, False, False]
    torch.testing.assert_close(own_table([found])[:, 0], torch.stack([-log_probs[0, 0], -log_probs[1].sum()]).double())
    assert distribution(found, most=4, salt=0) is None
    assert head_rows(TEXT, Replayed(MicroBatch(0, {}, inputs, {}), {}), FACTS) == scoring.NOT_CALLED


def test_labels_that_do_not_lie_over_the_logits_are_a_reason() -> None:
    """No labels at all, and labels of another shape, say so."""
    logits = drawn(2, 4, 11)
    assert "no labels" in str(head_rows(TEXT, Replayed(MicroBatch(0, {}, {}, {}), {"lm_head": logits}), FACTS))
    wrong = {"labels": labels_of(2, 3, vocabulary=11)}
    assert "does not lie over" in str(head_rows(TEXT, Replayed(MicroBatch(0, {}, wrong, {}), {"lm_head": logits}), FACTS))


def kl(before: Tensor, after: Tensor) -> Tensor:
    """KL(before ‖ after) of each row, float64."""
    p, q = functional.log_softmax(before.double(), -1), functional.log_softmax(after.double(), -1)
    return functional.kl_div(q, p, log_target=True, reduction="none").sum(-1)


@pytest.mark.parametrize("apart", [0.0, 1e-5, 1e-2, 3.0, 60.0])
def test_divergence_is_kl(apart: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Over all labelled rows it is torch's KL in float64, also for passes that are nearly equal or very far apart; never negative."""
    monkeypatch.setattr(scoring, "per_chunk", lambda item_bytes, *rest: 4)
    logits, labels = drawn(3, 7, 40), labels_of(3, 7, vocabulary=40)
    other = logits + apart * drawn(3, 7, 40, seed=1, scale=1.0)
    kept = distribution(rows_of(logits, labels), most=64, salt=5)
    assert kept is not None
    total, rows = divergence(kept, rows_of(other, labels)).tolist()
    counted = labels != -100
    assert rows == counted.sum()
    expected = kl(logits, other)[counted].sum().item()
    assert total == pytest.approx(expected, rel=1e-3, abs=1e-9)
    assert total >= 0 and (total == 0) == (apart == 0)


def test_divergence_is_over_picked_rows() -> None:
    """Of more labelled rows than asked for, so many are taken, the same in both passes, others with another salt, none unlabelled."""
    logits, labels = drawn(2, 50, 6), labels_of(2, 50, vocabulary=6)
    kept = [distribution(rows_of(logits, labels), most=10, salt=salt) for salt in (1, 2)]
    assert kept[0] is not None and kept[1] is not None
    assert (labels.reshape(-1)[kept[0].index_R] != -100).all() and len(kept[0].index_R) == 10
    assert set(kept[0].index_R.tolist()) != set(kept[1].index_R.tolist())
    other = drawn(2, 50, 6, seed=3)
    expected = kl(logits, other).reshape(-1)[kept[0].index_R].sum().item()
    assert divergence(kept[0], rows_of(other, labels)).tolist() == [pytest.approx(expected, rel=1e-4), 10]


def test_divergence_of_strided_logits() -> None:
    """Rows of logits whose strides admit no flat view are the right ones."""
    wide = drawn(3, 4, 5, 6)
    logits, labels = wide.transpose(0, 2), labels_of(5, 4, 3, vocabulary=6, ignored=0.0)
    kept = distribution(HeadRows(row_losses(logits, labels), Samples(5, True), logits), most=100, salt=0)
    assert kept is not None
    expected = functional.log_softmax(logits.reshape(-1, 6), -1)[kept.index_R]
    torch.testing.assert_close(kept.log_p_RV, expected)


def test_divergence_leaves_out_what_is_not_finite_or_not_reached() -> None:
    """A row with a NaN, a row whose token became impossible, and the rows of a sample that was not reached are in no sum."""
    logits, labels = drawn(2, 3, 5), torch.ones(2, 3, dtype=torch.int64)
    kept = distribution(rows_of(logits, labels), most=10, salt=0)
    assert kept is not None
    other = drawn(2, 3, 5, seed=1)
    other[0, 1, 0], other[1, 0, 2] = torch.nan, -torch.inf
    good = [(0, 0), (0, 2), (1, 1), (1, 2)]
    rows = kl(logits, other)
    assert divergence(kept, rows_of(other, labels)).tolist() == [pytest.approx(sum(rows[i].item() for i in good), rel=1e-4), 4]
    reached = divergence(kept, rows_of(other, labels), torch.tensor([False, True]))
    assert reached.tolist() == [pytest.approx(sum(rows[i].item() for i in good[2:]), rel=1e-4), 2]


def test_a_suppressed_token_is_no_divergence() -> None:
    """A token that is impossible before (-Inf) counts for what probability it has after."""
    logits, labels = drawn(1, 2, 5), torch.ones(1, 2, dtype=torch.int64)
    other = drawn(1, 2, 5, seed=1)
    logits[0, :, 3] = -torch.inf
    other[0, 0, 3] = -torch.inf
    kept = distribution(rows_of(logits, labels), most=10, salt=0)
    assert kept is not None
    p, q = functional.softmax(logits.double(), -1), functional.softmax(other.double(), -1)
    expected = torch.where(p > 0, p * (p.clamp(min=1e-300).log() - q.clamp(min=1e-300).log()), 0.0).sum().item()
    assert divergence(kept, rows_of(other, labels)).tolist() == [pytest.approx(expected, rel=1e-4), 2]


def test_a_paired_table_is_over_the_tokens_of_both() -> None:
    """A row whose loss is not finite in one of the passes is in neither sum."""
    before, after = drawn(2, 4, scale=1.0).abs(), drawn(2, 4, seed=1, scale=1.0).abs()
    before[0, 1], after[1, 2], after[1, 3] = torch.nan, torch.nan, torch.nan
    samples = Samples(2, known=True)
    table = paired_table([HeadRows(before.reshape(-1), samples, None)], [HeadRows(after.reshape(-1), samples, None)])
    pairs = [
        [(b, a) for b, a in zip(*rows, strict=True) if not math.isnan(a + b)] for rows in zip(before.tolist(), after.tolist(), strict=True)
    ]
    expected = [[sum(b for b, _ in row), sum(a for _, a in row), float(len(row))] for row in pairs]
    torch.testing.assert_close(table, torch.tensor(expected, dtype=torch.float64), rtol=1e-6, atol=1e-6)


def test_samples_that_were_not_reached_have_no_tokens() -> None:
    """They are left out of the table, unless the samples cannot be told apart."""
    losses = torch.ones(6)
    told, joined = HeadRows(losses, Samples(3, True), None), HeadRows(losses, Samples(1, False), None)
    reached = torch.tensor([True, False, True])
    assert paired_table([told], [told], reached)[:, 2].tolist() == [2, 0, 2]
    assert paired_table([joined], [joined], reached)[:, 2].tolist() == [6]
    assert paired_table([joined], [joined], torch.tensor([False]))[:, 2].tolist() == [6]


def test_heads_of_a_modality_add_up() -> None:
    """Two heads add up sample by sample; if one of them does not know its samples, all are one."""
    one, other = HeadRows(torch.ones(4), Samples(2, True), None), HeadRows(2 * torch.ones(6), Samples(2, True), None)
    joined = HeadRows(torch.ones(5), Samples(1, False), None)
    assert own_table([one, other]).tolist() == [[8.0, 5.0], [8.0, 5.0]]
    assert own_table([one, joined]).tolist() == [[9.0, 9.0]]
    assert samples_known([one, other]) and not samples_known([one, joined])
    assert not samples_known([one, HeadRows(torch.ones(3), Samples(3, True), None)])


@pytest.mark.parametrize("seed", range(3))
def test_the_sums_are_those_of_plain_python(seed: int) -> None:
    """Every column against a loop over samples, with ties and samples without tokens among them."""
    generator = torch.Generator().manual_seed(seed)
    loss, tokens = 10 * torch.rand(9, generator=generator), torch.randint(1, 8, (9,), generator=generator)
    changed = loss + torch.randn(9, generator=generator)
    changed[2], tokens[5] = loss[2], 0
    loss[5] = changed[5] = 0
    table = torch.stack([loss, changed, tokens], 1).double()
    found = dict(zip(SUMS, effect_sums(table, torch.tensor([1.5, 4.0])).tolist(), strict=True))
    rows = [(changed_ - loss_, loss_, changed_, n) for loss_, changed_, n in table.tolist()]
    expected = {
        "loss": sum(row[1] for row in rows),
        "changed": sum(row[2] for row in rows),
        "tokens": sum(row[3] for row in rows),
        "samples": 8,
        "wins": sum(1.0 if d > 0 else 0.5 if d == 0 else 0.0 for d, _, _, n in rows if n),
        "delta_squared": sum(d * d for d, *_ in rows),
        "delta_tokens": sum(d * n for d, _, _, n in rows),
        "tokens_squared": sum(n * n for *_, n in rows),
        "divergence": 1.5,
        "divergence_tokens": 4,
    }
    assert found == pytest.approx(expected)


def test_cells_are_those_of_the_modalities() -> None:
    """One cell a modality and intervention, of the columns that the sums fill."""
    cells = effect_cells(["text", "audio"])
    assert [cell.name for cell in cells] == [effect_cell(m, w) for m in ("text", "audio") for w in effects.INTERVENTIONS]
    assert {cell.sums for cell in cells} == {SUMS}
