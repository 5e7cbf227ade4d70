"""Picks of rows: all of a few, some of many, each as likely as any other; estimates that are right on average, with their variance."""

from __future__ import annotations

import pytest
import torch

from probe.measure.picks import estimated, pick_rows, variance_of_estimate

pytestmark = pytest.mark.pure  # of torch and probe alone: the same with every transformers


def test_all_of_a_few() -> None:
    """No more named rows than asked for: each is picked once, and slots that are left over are marked."""
    mask = torch.zeros(100, dtype=torch.bool)
    mask[[3, 50, 99]] = True
    index, used = pick_rows(mask, most=8)
    assert index.shape == used.shape == (8,)
    assert sorted(index[used].tolist()) == [3, 50, 99]
    assert pick_rows(mask[:5], most=8)[0].shape == (5,)
    assert not pick_rows(torch.zeros(4, dtype=torch.bool), most=2)[1].any()


def test_some_of_many() -> None:
    """Picks are named rows, all different, the same for the same salt, and over salts each is taken about as often."""
    mask = torch.arange(300) % 3 == 1
    taken = torch.zeros(300)
    for salt in range(600):
        index, used = pick_rows(mask, most=10, salt=salt)
        assert used.all()
        assert len(set(index.tolist())) == 10
        taken[index] += 1
    assert taken[~mask].sum() == 0
    assert torch.equal(pick_rows(mask, most=10, salt=7)[0], pick_rows(mask, most=10, salt=7)[0])
    assert 30 < float(taken[mask].min()) < 60 < float(taken[mask].max()) < 95


def test_estimates_are_right_on_average() -> None:
    """The mean over salts of the estimated total is the total, and that of the stated variance is the spread of the estimates."""
    torch.manual_seed(1)
    values, mask = torch.randn(200, dtype=torch.float64).exp(), torch.rand(200) < 0.6
    rows, totals, variances = mask.sum(), [], []
    for salt in range(2000):
        index, used = pick_rows(mask, most=16, salt=salt)
        seen = values[index][used]
        picked = used.sum()
        totals.append(estimated(seen.sum(), rows=rows, picked=picked))
        variances.append(variance_of_estimate(seen.sum(), seen.square().sum(), rows=rows.double(), picked=picked))
    truth, found, spread = values[mask].sum(), torch.stack(totals), torch.stack(totals).var()
    assert abs(found.mean() - truth) < 4 * (spread / 2000).sqrt()
    assert 0.85 < torch.stack(variances).mean() / spread < 1.15


def test_what_was_picked_whole_is_exact() -> None:
    """With every row picked the estimate is the sum, to the bit, and has no variance; with none it is 0."""
    sums = torch.tensor([0.1, 7.3], dtype=torch.float64)
    assert torch.equal(estimated(sums, rows=torch.tensor(7), picked=torch.tensor(7)), sums)
    assert variance_of_estimate(sums[0], sums[1], rows=torch.tensor(7.0), picked=torch.tensor(7)) == 0
    assert estimated(sums, rows=torch.tensor(0), picked=torch.tensor(0)).tolist() == [0, 0]
    assert variance_of_estimate(sums[0], sums[1], rows=torch.tensor(9.0), picked=torch.tensor(1)) == 0
    infinite = torch.tensor([torch.inf, 1.0], dtype=torch.float64)
    assert estimated(infinite, rows=torch.tensor(4), picked=torch.tensor(2)).tolist() == [torch.inf, 2]
    assert estimated(infinite, rows=torch.tensor(4), picked=torch.tensor(0)).tolist() == [0, 0]


def test_no_sync() -> None:
    """On a device whose values the host cannot read, nothing is read."""
    index, used = pick_rows(torch.empty(50, dtype=torch.bool, device="meta"), most=8, salt=3)
    assert index.shape == used.shape == (8,)
    assert estimated(torch.empty(3, device="meta"), rows=used.sum(), picked=used.sum()).shape == (3,)
