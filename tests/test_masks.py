"""Masks of every kind in any combination, against eager attention over the whole matrix."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from probe.measure import blocks
from probe.measure.probabilities import FromScores
from probe.measure.scores import Scores
from rows_together import Rows, together

pytestmark = pytest.mark.pure  # of torch and probe alone: the same with every transformers

B, H, S, K, D = 3, 4, 9, 7, 8


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def all_rows(samples: int, queries: int) -> Tensor:
    return torch.arange(queries).expand(samples, queries)


def bool_mask(*shape: int, seed: int) -> Tensor:
    mask = torch.rand(*shape, generator=torch.Generator().manual_seed(seed)) < 0.6
    mask[..., 0] = True
    return mask


def recompute(q: Tensor, k: Tensor, **kwargs: Any) -> Rows:
    return together(FromScores(Scores(q, k, **kwargs)), all_rows(q.shape[0], q.shape[2]))


def dense(given: Scores) -> tuple[Tensor, Tensor]:
    """Eager attention over the whole matrix in float64, pair by pair where something hides: (B, H, S, K or K + 1), bool (B, S, K)."""
    samples, heads, queries, keys = given.shape
    k = given.k_BhKD.repeat_interleave(heads // given.k_BhKD.shape[1], 1).double()
    scores = given.q_BHSD.double() @ k.mT * (given.q_BHSD.shape[-1] ** -0.5 if given.scale is None else given.scale)
    if given.softcap is not None:
        scores = given.softcap * (scores / given.softcap).tanh()
    may = torch.ones(samples, heads, queries, keys, dtype=torch.bool)
    if given.mask is not None:
        mask = given.mask[..., :keys]
        may &= mask if mask.dtype == torch.bool else mask > -1e8
        scores = scores if mask.dtype == torch.bool else scores + mask.double()
    if given.bias is not None:
        scores = scores + given.bias[..., :keys].double()
    for b, h, i, j in itertools.product(range(samples), range(heads), range(queries), range(keys)):
        own = i + keys - queries
        hidden = (
            given.causal_offset is not None and j > i + given.causal_offset,
            given.window is not None and not own - given.window[0] <= j <= own + given.window[1],
            given.padding_BK is not None and not given.padding_BK[b, j],
            given.segment_BS is not None and given.segment_BK is not None and given.segment_BS[b, i] != given.segment_BK[b, j],
            given.may is not None and not given.may(*map(torch.tensor, (b, h, i, j))),
        )
        if any(hidden):
            may[b, h, i, j] = False
    scores = scores.masked_fill(~may, -torch.inf)
    if given.sinks_H is not None:
        scores = torch.cat((scores, given.sinks_H.double()[None, :, None, None].expand(samples, heads, queries, 1)), -1)
    return scores.softmax(-1).masked_fill(~may.any(-1, keepdim=True), 0.0), may.any(1)


def flex_functions(seed: int) -> list[Any]:
    """Mask functions as flex attention takes them: causal, documents, a prefix, by head, of captured tensors, of some indices only."""
    documents = torch.randint(0, 2, (B, 12), generator=torch.Generator().manual_seed(seed)).sort(1).values
    slopes = torch.arange(H)
    return [
        lambda b, h, q, k: q >= k,
        lambda b, h, q, k: documents[b, q] == documents[b, k],
        lambda b, h, q, k: (k < 3) | ((q >= k) & (q - k <= 2)),
        lambda b, h, q, k: (q - k).abs() <= slopes[h] + 1,
        lambda b, h, q, k: k <= 3,
        lambda b, h, q, k: (b == 0) | (h > 1) | (q > k),
    ]


def random_scores(seed: int) -> Scores:
    """A call with a random choice of everything that scores are made of."""
    pick = random.Random(seed)
    keys, key_heads = pick.choice([S, K, 12]), pick.choice([1, 2, 4])

    def maybe(value: Callable[[], Any], share: float = 0.35) -> Any:
        return value() if pick.random() < share else None

    shape = (pick.choice([1, B]), pick.choice([1, H]), pick.choice([1, S]), keys + pick.choice([0, 0, 3]))
    masks = {
        "bool": lambda: bool_mask(*shape, seed=seed),
        "added": lambda: torch.zeros(shape).masked_fill(~bool_mask(*shape, seed=seed), pick.choice([torch.finfo().min, -1e9, -torch.inf])),
        "bias": lambda: normal(*shape, seed=seed),
        "2-D": lambda: bool_mask(S, shape[3], seed=seed),
    }
    padding = torch.arange(keys) < torch.randint(1, keys + 1, (B, 1), generator=torch.Generator().manual_seed(seed))
    segments = [torch.randint(0, 2, (B, n), generator=torch.Generator().manual_seed(seed + n)).sort(1).values for n in (S, keys)]
    packed = pick.random() < 0.3
    return Scores(
        normal(B, H, S, D, seed=seed) * 2,
        normal(pick.choice([1, B]) if key_heads == 1 else B, key_heads, keys, D, seed=seed + 1),
        scale=maybe(lambda: 0.7),
        softcap=maybe(lambda: 2.5),
        mask=maybe(masks[pick.choice(sorted(masks))], 0.6),
        bias=maybe(lambda: normal(1, H, S, keys, seed=seed + 2)),
        causal_offset=maybe(lambda: pick.choice([0, keys - S, 2])),
        window=maybe(lambda: (pick.randrange(5), pick.randrange(3))),
        padding_BK=maybe(lambda: padding if pick.random() < 0.5 else padding.flip(1)),
        segment_BS=segments[0] if packed else None,
        segment_BK=segments[1] if packed else None,
        may=maybe(lambda: pick.choice(flex_functions(seed)) if keys <= 12 else None),
        sinks_H=maybe(lambda: normal(H, seed=seed + 3)),
    )


@pytest.mark.parametrize("seed", range(80))
def test_everything_that_scores_are_made_of_in_any_combination(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows and visible keys of random calls are those of eager attention over the whole matrix, in one piece and in many."""
    given = random_scores(seed)
    p, visible = dense(given)
    index = torch.stack([torch.randperm(S, generator=torch.Generator().manual_seed(seed + b))[:5] for b in range(B)])
    for limit in (blocks.CHUNK_BYTES, 3_000):
        monkeypatch.setattr(blocks, "CHUNK_BYTES", limit)
        rows = together(FromScores(given), index)
        expected = p.gather(2, index[:, None, :, None].expand(-1, H, -1, p.shape[-1]))
        torch.testing.assert_close(rows.p_BHRK.double(), expected, atol=1e-6, rtol=0)
        assert torch.equal(rows.visible_BRK, visible.gather(1, index[..., None].expand(-1, -1, visible.shape[-1])))


@pytest.mark.parametrize("seed", range(10))
def test_half_precision_in_any_combination(seed: int) -> None:
    """From bfloat16 q and k, random calls are within 1e-5 of float64."""
    wide = random_scores(seed + 500)
    given = replace(wide, q_BHSD=wide.q_BHSD.bfloat16(), k_BhKD=wide.k_BhKD.bfloat16())
    torch.testing.assert_close(together(FromScores(given), all_rows(B, S)).p_BHRK.double(), dense(given)[0], atol=1e-5, rtol=0)


def test_a_negative_side_of_a_window_hides_nothing() -> None:
    """(-1, 0), as flash attention writes it, is causal with no limit behind."""
    q, k = normal(B, H, S, D, seed=50), normal(B, H, S, D, seed=51)
    rows, causal = recompute(q, k, window=(-1, 0)), recompute(q, k, causal_offset=0)
    assert torch.equal(rows.visible_BRK, causal.visible_BRK)
    assert recompute(q, k, window=(-1, -1)).visible_BRK.all()


def test_blocks_leave_no_mode_behind() -> None:
    """Between two blocks the consumer's own grad mode and autocast hold."""
    q, k = normal(B, H, S, D, seed=52), normal(B, H, K, D, seed=53)
    with torch.enable_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        for _ in FromScores(Scores(q, k)).blocks(all_rows(B, S)):
            assert torch.is_grad_enabled()
            assert torch.is_autocast_enabled("cpu")
