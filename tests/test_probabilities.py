from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from costs import peak_mib
from probe.measure import blocks
from probe.measure.probabilities import FromScores, FromSoftmax, NotObservable, RowSource
from probe.measure.scores import Scores
from rows_together import Rows, together

pytestmark = pytest.mark.pure  # of torch and probe alone: the same with every transformers

B, H, S, K, D = 3, 4, 9, 7, 8


def normal(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def all_rows(samples: int, queries: int) -> Tensor:
    return torch.arange(queries).expand(samples, queries)


def reference(q: Tensor, k: Tensor, **kwargs: Any) -> Tensor:
    """The probabilities as PyTorch's own attention has them in float64: with the identity as values, it returns them."""
    identity = torch.eye(k.shape[2], dtype=torch.float64).expand(*k.shape[:2], -1, -1)
    return F.scaled_dot_product_attention(q.double(), k.double(), identity, **kwargs)


def recompute(q: Tensor, k: Tensor, index_BR: Tensor | None = None, **kwargs: Any) -> Rows:
    index_BR = all_rows(q.shape[0], q.shape[2]) if index_BR is None else index_BR
    return together(FromScores(Scores(q, k, **kwargs)), index_BR)


def gather(scores: Tensor, weights: Tensor, index_BR: Tensor, sinks: int = 0) -> Rows:
    return together(FromSoftmax(scores, weights, sinks), index_BR)


def bool_mask(*shape: int, seed: int) -> Tensor:
    mask = torch.rand(*shape, generator=torch.Generator().manual_seed(seed)) < 0.6
    mask[..., 0] = True
    return mask


@pytest.mark.parametrize("shape", [(B, 1, S, K), (1, 1, S, K), (B, H, S, K), (1, H, S, K), (B, 1, 1, K), (S, K), (H, S, K), (1, 1, 1, K)])
@pytest.mark.parametrize("kind", ["bool", "bias", "minimum", "-inf", "-1e9"])
def test_masks_of_every_shape_and_kind(shape: tuple[int, ...], kind: str) -> None:
    """Rows equal PyTorch's own probabilities for bool and added masks that broadcast in any way; hidden keys are not visible."""
    q, k = normal(B, H, S, D, seed=0), normal(B, H, K, D, seed=1)
    mask = seen = bool_mask(*shape, seed=2)
    if kind == "bias":
        mask, seen = normal(*shape, seed=3), torch.ones(shape, dtype=torch.bool)
    elif kind != "bool":
        low = {"minimum": torch.finfo(torch.float32).min, "-inf": float("-inf"), "-1e9": -1e9}[kind]
        mask = torch.zeros(shape).masked_fill(~mask, low)
    rows = recompute(q, k, mask=mask)
    expected = reference(q, k, attn_mask=mask if mask.dtype == torch.bool else mask.double())
    assert rows.p_BHRK.dtype == torch.float32
    torch.testing.assert_close(rows.p_BHRK.double(), expected, atol=1e-6, rtol=0)
    assert torch.equal(rows.visible_BRK, seen.expand(B, H, S, K).any(1))


@pytest.mark.parametrize(("queries", "keys"), [(9, 9), (9, 5), (5, 9), (1, 6)])
def test_causal_flag_is_aligned_at_the_top_left(queries: int, keys: int) -> None:
    """``is_causal`` means what it means to the kernel, also when there are more keys than queries or fewer."""
    q, k = normal(B, H, queries, D, seed=4), normal(B, H, keys, D, seed=5)
    rows = recompute(q, k, causal_offset=0)
    torch.testing.assert_close(rows.p_BHRK.double(), reference(q, k, is_causal=True), atol=1e-6, rtol=0)
    assert torch.equal(rows.visible_BRK, torch.ones(B, queries, keys).tril().bool())


@pytest.mark.parametrize("scale", [None, 0.3, 1.0])
@pytest.mark.parametrize("key_heads", [1, 2, 4])
@pytest.mark.parametrize("per_head_mask", [False, True])
def test_grouped_heads_and_scale(scale: float | None, key_heads: int, per_head_mask: bool) -> None:
    """Fewer key heads are shared as PyTorch shares them, with a mask that differs between heads too; ``scale`` is the kernel's."""
    q, k = normal(B, H, S, D, seed=6), normal(B, key_heads, K, D, seed=7)
    mask = bool_mask(B, H if per_head_mask else 1, S, K, seed=8)
    rows = recompute(q, k, mask=mask, scale=scale)
    expected = reference(q, k.repeat_interleave(H // key_heads, 1), attn_mask=mask, scale=scale)
    torch.testing.assert_close(rows.p_BHRK.double(), expected, atol=1e-6, rtol=0)


def test_rows_are_those_that_were_asked_for() -> None:
    """Each sample's own row numbers are computed, in the order given."""
    q, k = normal(B, H, S, D, seed=9), normal(B, H, K, D, seed=10)
    index = torch.tensor([[8, 0], [3, 3], [1, 7]])
    rows = recompute(q, k, index, mask=(mask := bool_mask(B, 1, S, K, seed=11)))
    full = reference(q, k, attn_mask=mask)
    for sample in range(B):
        torch.testing.assert_close(rows.p_BHRK[sample].double(), full[sample][:, index[sample]], atol=1e-6, rtol=0)
        assert torch.equal(rows.visible_BRK[sample], mask[sample, 0, index[sample]])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_recomputed_from_the_very_values(dtype: torch.dtype) -> None:
    """From bfloat16 and float16 q and k the rows are within 1e-5 of float64, with large scores too."""
    q, k = normal(2, H, 40, 64, seed=12, dtype=dtype) * 3, normal(2, H, 300, 64, seed=13, dtype=dtype)
    rows = recompute(q, k)
    torch.testing.assert_close(rows.p_BHRK.double(), reference(q, k), atol=1e-5, rtol=0)


def test_autocast_rounds_the_arguments_and_nothing_else() -> None:
    """With ``autocast_dtype`` q and k count as the kernel gets them, and a surrounding autocast does not reach the computation."""
    q, k = normal(B, H, S, 64, seed=14) * 3, normal(B, H, K, 64, seed=15)
    mask = normal(B, 1, S, K, seed=16) * 3
    masked = recompute(q, k, autocast_dtype=torch.bfloat16, mask=mask)
    expected = reference(q.bfloat16(), k.bfloat16(), attn_mask=mask.bfloat16().double())
    torch.testing.assert_close(masked.p_BHRK.double(), expected, atol=1e-5, rtol=0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rows = recompute(q, k, autocast_dtype=torch.bfloat16)
        plain = recompute(q, k)
    torch.testing.assert_close(rows.p_BHRK.double(), reference(q.bfloat16(), k.bfloat16()), atol=1e-5, rtol=0)
    torch.testing.assert_close(plain.p_BHRK.double(), reference(q, k), atol=1e-5, rtol=0)


def test_float64_stays_float64_inside() -> None:
    """float64 input is multiplied in float64: scores of 1e6 that differ in the last digits of float32 come out right."""
    q, k = normal(1, 1, 3, D, seed=16).double() * 1e3, normal(1, 1, 4, D, seed=17).double() * 1e3
    k[:, :, 1] = k[:, :, 0] * (1 + 1e-7)
    rows = recompute(q, k, scale=1.0)
    torch.testing.assert_close(rows.p_BHRK.double(), reference(q, k, scale=1.0), atol=1e-6, rtol=0)


@pytest.mark.parametrize("kind", ["bool", "minimum", "-inf"])
def test_rows_that_see_nothing_are_zero(kind: str) -> None:
    """A fully masked row has probability 0 everywhere and no visible key, not NaN and not the uniform distribution."""
    q, k = normal(B, H, S, D, seed=18), normal(B, H, K, D, seed=19)
    mask = bool_mask(B, 1, S, K, seed=20)
    mask[1, :, 2:5] = False
    given = (
        mask if kind == "bool" else torch.zeros(mask.shape).masked_fill(~mask, torch.finfo().min if kind == "minimum" else float("-inf"))
    )
    rows = recompute(q, k, mask=given)
    assert not rows.p_BHRK[1, :, 2:5].any()
    assert not rows.visible_BRK[1, 2:5].any()
    assert torch.isfinite(rows.p_BHRK).all()
    torch.testing.assert_close(rows.p_BHRK.sum(-1)[1, :, 5:], torch.ones(H, S - 5))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("sinks", [False, True])
def test_what_is_known_of_a_block_is_that_of_its_probabilities(dtype: torch.dtype, sinks: bool) -> None:
    """Entropy and largest probability, as the scores tell them, are those of the rows: masks, a bias of -inf and blind rows included."""
    q, k = normal(B, H, S, 16, seed=60, dtype=dtype) * 8, normal(B, H, K, 16, seed=61, dtype=dtype)
    mask, bias = bool_mask(B, 1, S, K, seed=62), normal(1, H, S, K, seed=63).to(dtype)
    mask[0, 0, 3] = False
    bias[:, :, :, 2] = -torch.inf
    source = FromScores(Scores(q, k, mask=mask, bias=bias, sinks_H=normal(H, seed=64) if sinks else None))
    for block in source.blocks(all_rows(B, S)):
        p = block.p.double()
        assert block.entropy is not None
        torch.testing.assert_close(block.entropy.double(), torch.special.entr(p).sum(-1), atol=1e-5, rtol=1e-5)
        assert not block.entropy[0, :, 3].any()
        assert (block.top is None) == sinks
        if block.top is not None:
            torch.testing.assert_close(block.top.float(), block.p.amax(-1))


def test_nan_is_not_hidden() -> None:
    """NaN in q, in the mask or in scores shows as NaN in the row's probabilities."""
    q, k = normal(B, H, S, D, seed=21), normal(B, H, K, D, seed=22)
    q[0, 1, 2] = float("nan")
    mask = torch.zeros(B, 1, S, K)
    mask[1, 0, 3] = float("nan")
    rows = recompute(q, k, mask=mask)
    assert rows.p_BHRK[0, 1, 2].isnan().all()
    assert rows.p_BHRK[1, :, 3].isnan().all()
    scores = normal(B, H, S, K, seed=23)
    scores[2, 0, 0] = float("nan")
    materialised = gather(scores, scores.softmax(-1), index_BR=all_rows(B, S))
    assert materialised.p_BHRK[2, 0, 0].isnan().all()


def exhaust(source: RowSource, index: Tensor) -> None:
    for block in source.blocks(index):
        del block


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("sizes", [(1, 1, 1, 130_000, 64), (1, 2, 2, 40_000, 64), (3, 8, 2, 4_000, 32), (200, 2, 2, 900, 8)])
def test_temporaries_are_bounded(sizes: tuple[int, int, int, int, int], dtype: torch.dtype, transposed: bool) -> None:
    """Blocks and what their making takes stay within the limit: one long head, many rows and heads, a wide batch."""
    samples, heads, key_heads, keys, width = sizes
    q, k = normal(samples, heads, 64, width, seed=24, dtype=dtype), normal(samples, key_heads, keys, width, seed=25, dtype=dtype)
    if transposed:
        k = k.transpose(1, 2).contiguous().transpose(1, 2)
    index = all_rows(samples, 64 if samples < 10 else 1)
    source = FromScores(Scores(q, k, causal_offset=keys - 64, padding_BK=torch.ones(samples, keys, dtype=torch.bool)))
    assert peak_mib(lambda: exhaust(source, index)) <= 8
    assert peak_mib(lambda: source.visible(index)) <= 8 + index.numel() * keys / 2**20


@pytest.mark.parametrize("limit", [1, 24 * 2**10, 100 * 2**10])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_slices_change_no_value(monkeypatch: pytest.MonkeyPatch, limit: int, dtype: torch.dtype) -> None:
    """However small the limit, every (sample, head, row) comes once and has the value that it has in one piece."""
    q, k = normal(6, 8, 20, 16, seed=24, dtype=dtype), normal(6, 4, 128, 16, seed=25, dtype=dtype)
    mask = bool_mask(6, 8, 20, 128, seed=26)
    index = torch.arange(4).expand(6, 4)
    whole = recompute(q, k, index, causal_offset=0, mask=mask, sinks_H=normal(8, seed=27))
    monkeypatch.setattr(blocks, "CHUNK_BYTES", limit)
    chunked = recompute(q, k, index, causal_offset=0, mask=mask, sinks_H=normal(8, seed=27))
    torch.testing.assert_close(chunked.p_BHRK, whole.p_BHRK, atol=3e-7, rtol=0)
    assert torch.equal(chunked.visible_BRK, whole.visible_BRK)


@pytest.mark.parametrize(("heads", "whole"), [(12, True), (6, False)])
def test_a_heads_keys_are_read_once_where_that_takes_no_more_blocks(heads: int, whole: bool) -> None:
    """Over 1,500 keys all 64 rows of some heads are a block, or, where that would be twice as many blocks, some rows of all heads."""
    source = FromScores(Scores(torch.zeros(1, heads, 1500, 2), torch.zeros(1, heads, 1500, 2)))
    index = all_rows(1, 64)
    shapes = [tuple(block.p.shape[1:3]) for block in source.blocks(index, source.masks(index))]
    assert len(shapes) == 3
    assert {rows == 64 for _, rows in shapes} == {whole}
    assert {of_them == heads for of_them, _ in shapes} == {not whole}


def test_a_mask_expanded_over_heads_is_not_copied_for_each() -> None:
    """A mask that the model expanded over its heads is gathered once: what it takes does not grow with the heads."""
    q, k = normal(1, 64, 20, 2, seed=38), normal(1, 64, 2_000, 2, seed=39)
    mask = normal(1, 1, 20, 2_000, seed=40).expand(1, 64, 20, 2_000)
    source = FromScores(Scores(q, k, mask=mask))
    assert peak_mib(lambda: source.visible(all_rows(1, 20))) < 1
    rows = together(source, all_rows(1, 20))
    torch.testing.assert_close(rows.p_BHRK.double(), reference(q, k, attn_mask=mask.double()), atol=1e-6, rtol=0)


def test_mask_and_causal_flag_together() -> None:
    """Where a mask and ``is_causal`` are both given, a key must pass both, as in PyTorch's own formula."""
    q, k = normal(B, H, S, D, seed=41), normal(B, H, S, D, seed=42)
    mask = bool_mask(B, 1, S, S, seed=43)
    both = mask & torch.ones(S, S).tril().bool()
    rows = recompute(q, k, mask=mask, causal_offset=0)
    torch.testing.assert_close(rows.p_BHRK.double(), reference(q, k, attn_mask=both), atol=1e-6, rtol=0)
    assert torch.equal(rows.visible_BRK, both[:, 0])


def test_materialised_rows_are_the_models_own() -> None:
    """Rows of a softmax are its very values; visibility comes from the scores; a fully masked (uniform) row counts as empty."""
    scores = normal(B, H, S, K, seed=26)
    mask = bool_mask(B, 1, S, K, seed=27)
    mask[0, :, 4] = False
    scores = scores.masked_fill(~mask, torch.finfo().min)
    index = torch.tensor([[4, 0, 8], [1, 1, 2], [7, 6, 5]])
    rows = gather(scores, weights := scores.softmax(-1), index_BR=index)
    for sample in range(B):
        assert torch.equal(rows.visible_BRK[sample], mask[sample, 0, index[sample]])
        first = 1 if sample == 0 else 0
        assert torch.equal(rows.p_BHRK[sample][:, first:], weights[sample][:, index[sample][first:]])
    assert weights[0, 0, 4].sum() > 0.99
    assert not rows.p_BHRK[0, :, 0].any()


def test_materialised_rows_are_gathered_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Gathering stays within the limit, and chunks change no value."""
    scores = normal(2, 8, 70, 6_000, seed=28)
    index, weights = all_rows(2, 60), scores.softmax(-1)
    source = FromSoftmax(scores, weights)
    assert peak_mib(lambda: exhaust(source, index)) <= 8
    few = all_rows(2, 6)
    whole = gather(scores, weights, few)
    monkeypatch.setattr(blocks, "CHUNK_BYTES", 16 * 2**10)
    chunked = gather(scores, weights, few)
    assert torch.equal(chunked.p_BHRK, whole.p_BHRK)
    assert torch.equal(chunked.visible_BRK, whole.visible_BRK)


@pytest.mark.parametrize("sinks", [1, 2])
def test_materialised_sinks_are_one_last_column(sinks: int) -> None:
    """Columns at the end of the softmax that are sinks are no keys; together they are the last column of the rows."""
    scores = normal(B, H, S, K + sinks, seed=44).masked_fill(~bool_mask(B, 1, S, K + sinks, seed=45), torch.finfo().min)
    scores[0, :, 2, :K] = torch.finfo().min
    weights = scores.softmax(-1)
    rows = gather(scores, weights, all_rows(B, S), sinks)
    assert FromSoftmax(scores, weights, sinks).shape == (B, H, S, K)
    assert rows.visible_BRK.shape == (B, S, K)
    assert not rows.p_BHRK[0, :, 2].any(), "a row that sees no key is 0, in the sink, too"
    assert torch.equal(rows.p_BHRK[1:, ..., :K], weights[1:, ..., :K])
    torch.testing.assert_close(rows.p_BHRK[1:, ..., K], weights[1:, ..., K:].sum(-1))


def test_bfloat16_weights_keep_their_visible_keys() -> None:
    """With bfloat16 scores the dtype's own minimum hides, and a large negative score does not."""
    scores = torch.tensor([[[[1.0, -300.0, torch.finfo(torch.bfloat16).min, float("-inf")]]]], dtype=torch.bfloat16)
    rows = gather(scores, scores.softmax(-1), index_BR=torch.zeros(1, 1, dtype=torch.int64))
    assert rows.visible_BRK.tolist() == [[[True, True, False, False]]]
    assert rows.p_BHRK.dtype == torch.float32


def test_an_added_float16_mask_hides_with_its_own_minimum() -> None:
    """float16 reaches no further than -65504, which hides there; in float32 the same number is a bias like any other."""
    q, k = normal(1, 1, 2, D, seed=54), normal(1, 1, 3, D, seed=55)
    mask = torch.tensor([0.0, torch.finfo(torch.float16).min, -100.0])
    assert recompute(q.half(), k.half(), mask=mask.half()).visible_BRK.tolist() == [[[True, False, True]] * 2]
    assert recompute(q, k, mask=mask).visible_BRK.all()


def test_rows_beyond_the_call_do_not_crash() -> None:
    """An index chosen for a longer sequence reads the last row: on a GPU an index out of range would end the process."""
    q, k = normal(B, H, S, D, seed=29), normal(B, H, K, D, seed=30)
    index = torch.full((B, 1), 500)
    expected = reference(q, k)[:, :, -1:]
    torch.testing.assert_close(recompute(q, k, index).p_BHRK.double(), expected, atol=1e-6, rtol=0)
    weights = expected.expand(B, H, S, K).float()
    assert torch.equal(gather(weights, weights, index_BR=index).p_BHRK, weights[:, :, -1:])


class Marked(Tensor):
    """A tensor class of its own, as ``CausalBias`` is."""


def test_what_cannot_be_observed_says_why() -> None:
    """Calls outside the promise raise NotObservable with a reason that names the shapes or the type."""
    q, k = normal(B, H, S, D, seed=31), normal(B, H, K, D, seed=32)
    index = all_rows(B, S)
    with pytest.raises(NotObservable, match=r"\(12, 9, 8\)"):
        recompute(q.flatten(0, 1), k.flatten(0, 1), index)
    with pytest.raises(NotObservable, match="empty"):
        recompute(q[:0], k[:0])
    with pytest.raises(NotObservable, match="heads do not fit"):
        recompute(q, k[:, :3])
    with pytest.raises(NotObservable, match="rows were chosen for 2 samples"):
        recompute(q, k, index[:2])
    with pytest.raises(NotObservable, match="width do not fit"):
        recompute(q, k[..., :4])
    with pytest.raises(NotObservable, match="Marked"):
        recompute(q, k, mask=torch.ones(S, K).as_subclass(Marked))
    with pytest.raises(NotObservable, match="int64"):
        recompute(q, k, mask=torch.ones(S, K, dtype=torch.int64))
    for wrong in (torch.ones(S, K - 1).bool(), torch.ones(B + 1, 1, S, K).bool(), torch.ones(1, 3, S, K), torch.ones(1, 1, 1, S, K)):
        with pytest.raises(NotObservable, match="does not fit"):
            recompute(q, k, mask=wrong)
    with pytest.raises(NotObservable, match=r"the bias has dtype torch\.bool"):
        recompute(q, k, bias=torch.ones(S, K).bool())
    for name, length in (("padding_BK", S), ("segment_BS", K), ("segment_BK", S)):
        with pytest.raises(NotObservable, match="expected"):
            recompute(q, k, **{name: torch.ones(B, length, dtype=torch.int64)})
    with pytest.raises(NotObservable, match="queries or keys only"):
        recompute(q, k, segment_BS=torch.ones(B, S, dtype=torch.int64))
    with pytest.raises(NotObservable, match="sinks of shape"):
        recompute(q, k, sinks_H=torch.ones(H + 1))
    for function, words in (
        (lambda b, h, q, k: True if q > k else False, "cannot be evaluated on indices: RuntimeError"),  # noqa: SIM210
        (lambda b, h, q, k: (q - k).float(), "returns torch.float32"),
        (lambda b, h, q, k: torch.ones(S, K).bool()[None], "cannot be evaluated"),
        (lambda b, h, q, k: None, "cannot be evaluated"),
    ):
        with pytest.raises(NotObservable, match=words):
            recompute(q, k, torch.zeros(B, 2, dtype=torch.int64), may=function)
    nested = torch.nested.nested_tensor([normal(H, S, D, seed=33)] * B)
    with pytest.raises(NotObservable, match="nested"):
        recompute(nested, nested, index)
    weights = normal(B, H, S, K, seed=34)
    with pytest.raises(NotObservable, match="expected"):
        gather(weights[0], weights[0], index_BR=index)
    with pytest.raises(NotObservable, match="empty"):
        gather(weights[:0], weights[:0], index_BR=index[:0])
    with pytest.raises(NotObservable, match="2 samples"):
        gather(weights, weights, index_BR=index[:2])
    with pytest.raises(NotObservable, match="9 sinks"):
        gather(weights, weights, index, 9)
    with pytest.raises(NotObservable, match="empty"):
        gather(weights, weights, index, K)


def test_no_graph_is_built_and_nothing_is_changed() -> None:
    """Rows of tensors that require a gradient carry none, and q, k, mask, scores and weights keep their values."""
    tensors = [normal(B, H, S, D, seed=35), normal(B, H, K, D, seed=36), normal(B, H, S, K, seed=37)]
    before = [tensor.clone() for tensor in tensors]
    for tensor in tensors:
        tensor.requires_grad_()
    q, k, bias = tensors
    assert not recompute(q, k, mask=bias).p_BHRK.requires_grad
    assert not gather(bias, bias.softmax(-1), index_BR=all_rows(B, S)).p_BHRK.requires_grad
    assert all(torch.equal(tensor, old) for tensor, old in zip(tensors, before))
