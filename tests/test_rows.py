from __future__ import annotations

import pytest
import torch
from torch import Tensor

from probe.measure.rows import RowChoice, choose_all_valid, choose_rows
from probe.sites.modality import AUDIO, PADDING, REFERENCE, TEXT

pytestmark = pytest.mark.pure  # of torch and probe alone: the same with every transformers


def random_modality(samples: int, queries: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 3, (samples, queries), generator=generator).to(torch.int8)


def used(choice: RowChoice, sample: int) -> list[int]:
    return choice.index_BR[sample][choice.weight_BR[sample] > 0].tolist()


@pytest.mark.parametrize(("samples", "queries", "rows"), [(3, 50, 24), (2, 7, 64), (5, 40, 5), (4, 33, 10), (1, 64, 64), (9, 20, 4)])
def test_shape_depends_on_shapes_alone(samples: int, queries: int, rows: int) -> None:
    """R is min(S, max(1, rows // B)) whatever the data, and every index is a row of the call, in unused slots too."""
    expected = min(queries, max(1, rows // samples))
    for seed in range(3):
        for modality in (random_modality(samples, queries, seed), torch.zeros(samples, queries, dtype=torch.int8)):
            choice = choose_rows(modality, rows=rows)
            assert choice.index_BR.shape == choice.weight_BR.shape == (samples, expected)
            assert choice.index_BR.dtype == torch.int64
            assert choice.weight_BR.dtype == torch.float32
            assert choice.queries == queries
            assert int(choice.index_BR.min()) >= 0
            assert int(choice.index_BR.max()) < queries


@pytest.mark.parametrize("rows", [4, 9, 24, 200])
def test_rows_are_distinct_and_never_padding(rows: int) -> None:
    """A used slot holds a row that is not padding, and no row is taken twice."""
    modality = random_modality(4, 50, seed=1)
    choice = choose_rows(modality, rows=rows)
    for sample in range(4):
        taken = used(choice, sample)
        assert len(taken) == len(set(taken)) > 0
        assert all(modality[sample, row] != PADDING for row in taken)


@pytest.mark.parametrize("rows", [4, 9, 24, 200])
def test_weights_add_up_to_the_rows_they_stand_for(rows: int) -> None:
    """The weights of a sample sum to its number of rows that are not padding, per modality where slots allow strata."""
    modality = random_modality(4, 50, seed=2)
    choice = choose_rows(modality, rows=rows)
    torch.testing.assert_close(choice.weight_BR.sum(1), (modality != PADDING).sum(1).float())
    if choice.index_BR.shape[1] > 1:
        taken = modality.gather(1, choice.index_BR)
        for code in (TEXT, AUDIO):
            torch.testing.assert_close((choice.weight_BR * (taken == code)).sum(1), (modality == code).sum(1).float())


@pytest.mark.parametrize(("texts", "audios"), [(40, 2), (1, 45), (30, 30), (0, 60), (60, 0), (2, 3)])
def test_each_modality_gets_its_share(texts: int, audios: int) -> None:
    """Text and audio get half of the slots each, and what one cannot fill goes to the other."""
    modality = torch.full((1, 64), PADDING, dtype=torch.int8)
    modality[0, :texts], modality[0, texts : texts + audios] = TEXT, AUDIO
    choice = choose_rows(modality, rows=8)
    taken = [int(modality[0, row]) for row in used(choice, 0)]
    assert taken.count(TEXT) == min(texts, max(4, 8 - audios))
    assert taken.count(AUDIO) == min(audios, 8 - taken.count(TEXT))
    assert len(taken) == min(8, texts + audios)


def test_all_rows_of_a_short_call_count_once() -> None:
    """When the budget covers the call, every row that is not padding is taken with weight 1, so that means are exact."""
    modality = random_modality(3, 11, seed=3)
    choice = choose_rows(modality, rows=33)
    for sample in range(3):
        assert sorted(used(choice, sample)) == torch.nonzero(modality[sample] != PADDING).flatten().tolist()
    assert set(choice.weight_BR.flatten().tolist()) == {0.0, 1.0}


@pytest.mark.parametrize("rows", [3, 6, 24])
def test_estimate_is_unbiased(rows: int) -> None:
    """Averaged over salts, the weighted sum over sampled rows is the sum over all rows that are not padding (also with one slot)."""
    modality = random_modality(3, 40, seed=4)
    value = torch.rand(3, 40, generator=torch.Generator().manual_seed(5)) + modality
    exact = (value * (modality != PADDING)).sum()
    estimates = []
    for salt in range(600):
        choice = choose_rows(modality, rows=rows, salt=salt)
        estimates.append((value.gather(1, choice.index_BR) * choice.weight_BR).sum())
    spread = torch.stack(estimates).std() / len(estimates) ** 0.5
    assert abs(torch.stack(estimates).mean() - exact) < 4 * spread
    assert spread > 0


def test_choice_is_a_function_of_its_arguments() -> None:
    """The same arguments give the same rows, samples and salts give others, and no random number is drawn."""
    modality = torch.full((2, 100), TEXT, dtype=torch.int8)
    before = torch.get_rng_state()
    first, again, other = (choose_rows(modality, rows=16, salt=salt) for salt in (7, 7, 8))
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(first.index_BR, again.index_BR)
    assert set(used(first, 0)) != set(used(first, 1))
    assert set(used(first, 0)) != set(used(other, 0))


def test_without_modality_every_row_counts_alike() -> None:
    """``choose_all_valid`` takes rows that stand for S / R each; all of them when there are no more."""
    choice = choose_all_valid(4, 60, 40, torch.device("cpu"))
    assert choice.index_BR.shape == (4, 10)
    assert torch.equal(choice.weight_BR, torch.full((4, 10), 6.0))
    assert len(set(choice.index_BR[0].tolist())) == 10
    short = choose_all_valid(1, 5, 40, torch.device("cpu"))
    assert sorted(short.index_BR[0].tolist()) == list(range(5))
    assert torch.equal(short.weight_BR, torch.ones(1, 5))


@pytest.mark.parametrize("shape", [(0, 12), (3, 0), (0, 0)])
def test_empty_calls_give_empty_choices(shape: tuple[int, int]) -> None:
    """A batch without samples or without tokens gives no rows and no error."""
    choice = choose_rows(torch.zeros(shape, dtype=torch.int8), rows=8)
    assert float(choice.weight_BR.sum()) == 0.0
    assert choice.index_BR.shape[0] == shape[0]


@pytest.mark.parametrize("rows", [2, 8, 40])
def test_reference_audio_is_audio(rows: int) -> None:
    """Reference audio shares the stratum of audio: the rows and weights are those of the same audio without a reference."""
    modality = random_modality(2, 60, seed=6)
    given = modality.masked_fill((modality == AUDIO) & (torch.arange(60) < 30), REFERENCE)
    assert (given == REFERENCE).any()
    with_reference, without = choose_rows(given, rows=rows), choose_rows(modality, rows=rows)
    assert torch.equal(with_reference.index_BR, without.index_BR)
    assert torch.equal(with_reference.weight_BR, without.weight_BR)
    taken = given.gather(1, with_reference.index_BR)[with_reference.weight_BR > 0].tolist()
    assert rows < 8 or REFERENCE in taken


def test_a_wide_batch_takes_one_row_a_sample() -> None:
    """More samples than rows: each sample has one row, of text or audio, that stands for all of its own."""
    modality = random_modality(500, 30, seed=7)
    modality[:, 0] = TEXT
    choice = choose_rows(modality, rows=64)
    assert choice.index_BR.shape == (500, 1)
    assert torch.equal(choice.weight_BR[:, 0], (modality != PADDING).sum(1).float())
    assert {TEXT, AUDIO} == set(modality.gather(1, choice.index_BR).flatten().tolist())
