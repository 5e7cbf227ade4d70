"""What layers share of their rows: as good as their own, and shared only by those that see the same."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from probe.capture.breaker import Breaker
from probe.capture.buffer import StepBuffer
from probe.capture.microbatch import MicroBatch
from probe.capture.observer import Call
from probe.capture.observers import attention as watching
from probe.capture.observers.attention import AttentionWatcher, attention_cell
from probe.foreign.torch_private import identity
from probe.measure.attention import reduce_rows, sum_up
from probe.measure.blocks import RowSource
from probe.measure.masks import View, view_of
from probe.measure.prepared import Prepared, prepare
from probe.measure.probabilities import FromScores, FromSoftmax
from probe.measure.rows import RowChoice, choose_rows
from probe.measure.scores import Scores
from probe.records import Site
from probe.sites.modality import AUDIO, TEXT

pytestmark = pytest.mark.pure  # of torch and probe alone: the same with every transformers

B, H, S, D = 2, 4, 24, 8


class Layer(nn.Module):
    """Calls ``scaled_dot_product_attention`` with a mask."""

    def forward(self, q: Tensor, k: Tensor, mask: Tensor | None) -> Tensor:
        return F.scaled_dot_product_attention(q, k, k, attn_mask=mask)


def sums(source: RowSource, prepared: Prepared) -> Tensor:
    return sum_up([reduce_rows(source, prepared)], prepared).sums_LC[0]


def tensors(seed: int, *, keys: int = S) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(B, H, S, D, generator=generator), torch.randn(B, H, keys, D, generator=generator)


def codes(text: int, length: int = S) -> Tensor:
    return torch.cat((torch.full((B, text), TEXT), torch.full((B, length - text), AUDIO)), 1).to(torch.int8)


@pytest.fixture
def prepared(monkeypatch: pytest.MonkeyPatch) -> list[Prepared]:
    """What the watcher worked out anew, in order."""
    made: list[Prepared] = []

    def noting(*args: Any, **kwargs: Any) -> Prepared:
        made.append(prepare(*args, **kwargs))
        return made[-1]

    monkeypatch.setattr(watching, "prepare", noting)
    return made


def watch(layers: Sequence[tuple[str, Tensor | None]], known: Callable[[int], Any], monkeypatch: pytest.MonkeyPatch) -> StepBuffer:
    """Show the watcher one forward through layers of some kind, each with its mask."""
    sites = [Site(f"layer{n}", "attention", "", kind) for n, (kind, _) in enumerate(layers)]
    told = iter(range(len(layers)))

    def modalities(call: Call, shape: tuple[int, int, int, int]) -> tuple[Tensor, Tensor]:
        both = known(next(told))
        return both if isinstance(both, tuple) else (both, both)

    monkeypatch.setattr(watching, "modalities", modalities)
    watcher = AttentionWatcher(sites, Breaker(pytest.fail), rows=8)
    buffer = StepBuffer(budget_bytes=1 << 20, sites=[site.name for site in sites], cells=watcher.cells())
    buffer.open(1)
    micro = MicroBatch(0)
    for n, (site, (_, mask)) in enumerate(zip(sites, layers)):
        call = Call(site, Layer(), micro, (*tensors(n), mask), {})
        watcher.enter(call, buffer)
        call.output = call.module(*call.args)
        call.entered.close()
        watcher.leave(call, buffer)
    watcher.leave(Call(Site("", "model", ""), nn.Identity(), micro, (), {}), buffer)
    return buffer


def test_layers_that_see_the_same_share_and_are_measured_as_by_themselves(
    monkeypatch: pytest.MonkeyPatch, prepared: list[Prepared]
) -> None:
    """Six layers of two kinds with one mask each, handed over as views of it, are prepared twice, and their sums are their own."""
    joint, encoder = torch.ones(S, S).tril().bool(), torch.rand(1, 1, S, S) > 0.3
    known = codes(9)
    layers = [(kind, mask[..., :S]) for mask, kind in ((encoder, "encoder"), (joint, "joint")) for _ in range(3)]
    buffer = watch(layers, lambda n: known, monkeypatch)
    assert len(prepared) == 2
    choice = choose_rows(known, rows=8, salt=1)
    for n, (kind, mask) in enumerate(layers):
        source = FromScores(Scores(*tensors(n), mask=mask))
        alone = prepare(source, choice, query_modality_BS=known, key_modality_BK=known, self_attention=True, walks=kind == "joint")
        expected = sums(source, alone)
        torch.testing.assert_close(buffer.totals.sums[attention_cell(f"layer{n}")], expected, rtol=1e-12, atol=0)


def test_another_mask_is_not_taken_for_the_one_before(monkeypatch: pytest.MonkeyPatch, prepared: list[Prepared]) -> None:
    """A mask of other values, one that was written to in between, one of another part of the same memory: each is prepared for itself."""
    both = torch.ones(2, 1, S, S).tril_().bool()
    written = both[1:].clone()

    def known(n: int) -> Tensor:
        if n == 3:
            written[..., :5] = False
        return first

    first = codes(9)
    masks = [both[:1], both[1:], written, written, both[1:], None, None]
    buffer = watch([("joint", mask) for mask in masks], known, monkeypatch)
    assert len(prepared) == 6
    before, after = (buffer.totals.sums[attention_cell(f"layer{n}")] for n in (2, 3))
    assert not torch.equal(before, after)


@pytest.mark.parametrize("which", [0, 1])
def test_other_modalities_are_not_taken_for_those_before(monkeypatch: pytest.MonkeyPatch, prepared: list[Prepared], which: int) -> None:
    """Layers whose queries, or keys, are others, as when a later layer is told more, share nothing."""
    always, told = codes(9), [codes(9), codes(9), codes(12)]

    def known(n: int) -> tuple[Tensor, Tensor]:
        now = told[max(0, n - 1)]
        return (now, always) if which == 0 else (always, now)

    watch([("joint", None)] * 4, known, monkeypatch)
    assert len(prepared) == 3


def test_kinds_of_attention_are_apart(monkeypatch: pytest.MonkeyPatch, prepared: list[Prepared]) -> None:
    """An encoder's layer and a decoder's over the same tokens with the same mask look for other things."""
    known = codes(9)
    watch([("encoder", None), ("joint", None), ("cross", None)], lambda n: known, monkeypatch)
    assert len(prepared) == 3


def test_what_only_the_scores_tell_is_not_shared(monkeypatch: pytest.MonkeyPatch, prepared: list[Prepared]) -> None:
    """Where the model's own softmax is read, each layer is looked at by itself."""

    class Eager(nn.Module):
        def forward(self, q: Tensor, k: Tensor, mask: Tensor | None) -> Tensor:
            return torch.softmax(q @ k.mT, -1) @ k

    monkeypatch.setattr(__name__ + ".Layer", Eager)
    known = codes(9)
    watch([("joint", None)] * 3, lambda n: known, monkeypatch)
    assert len(prepared) == 3


@pytest.mark.parametrize(
    "change",
    [
        {"causal_offset": 1},
        {"window": (3, 0)},
        {"padding_BK": torch.arange(S).expand(B, S) < 20},
        {"segment_BS": torch.zeros(B, S), "segment_BK": torch.zeros(B, S)},
        {"may": lambda b, h, q, k: q >= k},
        {"mask": torch.ones(S, S).tril().bool()},
        {"autocast_dtype": torch.bfloat16},
        {"sinks_H": torch.zeros(H)},
        {"k_BhKD": torch.randn(B, H, S + 1, D)},
    ],
    ids=lambda change: next(iter(change)),
)
def test_a_view_is_all_that_decides_what_is_seen(change: dict[str, Any]) -> None:
    """Calls that differ in any of it have other views; q, k, scale and bias do not matter."""
    plain = Scores(*tensors(1))
    one, other = view_of(plain), view_of(replace(plain, **change))
    assert not one.same(other)
    assert not other.same(one)
    again = replace(plain, q_BHSD=torch.randn(B, H, S, D), scale=3.0, bias=torch.randn(S, S), softcap=5.0)
    assert one.same(view_of(again))
    assert view_of(replace(plain, **change)).same(view_of(replace(again, **change)))


def test_an_identity_is_of_the_very_elements() -> None:
    """Same memory, form, type and nothing written since; what has no memory, or counts no writes, has none."""
    x = torch.randn(4, 6)
    assert identity(x[:, :3]) == identity(x[:, :3]) is not None
    for other in (x[:, 3:], x[:2], x.clone(), x.view(24), x.view(torch.int32), x.T.contiguous().T):
        assert identity(other) != identity(x)
    before = identity(x)
    x[0].add_(1)
    assert identity(x) != before
    assert identity(torch.empty(3, device="meta")) is None
    with torch.inference_mode():
        assert identity(torch.randn(3)) is None


def test_what_cannot_be_told_is_not_shared() -> None:
    """A mask without an identity is the same as none, not even as itself."""
    q, k = tensors(1)
    with torch.inference_mode():
        mask = torch.ones(S, S).bool()
    assert not view_of(Scores(q, k, mask=mask)).same(view_of(Scores(q, k, mask=mask)))


def test_a_source_without_view_says_so() -> None:
    """The model's own softmax has no view; recomputed rows have one."""
    scores = torch.randn(B, H, S, S)
    assert FromSoftmax(scores, scores.softmax(-1)).view is None
    assert isinstance(FromScores(Scores(*tensors(1))).view, View)


@pytest.mark.parametrize("large", [False, True])
def test_large_masks_and_those_of_each_head_are_worked_out_by_block(large: bool) -> None:
    """What would take more than a part of a block, or differs by head, is not kept; the sums are the same."""
    mask = torch.rand(1, 1 if large else H, S, S) > 0.3
    source = FromScores(Scores(*tensors(2), mask=mask))
    known = codes(9)
    choice = choose_rows(known, rows=1000)
    given = {"query_modality_BS": known, "key_modality_BK": known}
    if large:
        whole = prepare(source, choice, **given)
        assert whole.masks is not None
        without = replace(whole, masks=None, groups_BKM=None)
        torch.testing.assert_close(sums(source, without), sums(source, whole))
    else:
        assert prepare(source, choice, **given).masks is None
    wide = FromScores(Scores(torch.randn(1, 1, 64, 2), torch.randn(1, 1, 4_000, 2), causal_offset=0))
    index = torch.arange(64).expand(1, 64)
    assert wide.masks(index) is None
    assert wide.masks(index[:, :4]) is not None


def test_keys_of_a_group_lie_side_by_side() -> None:
    """The CPU multiplies by groups of keys in less than half the time then; as kept for all layers, and worked out anew."""
    q, k = tensors(7)
    choice = choose_rows(torch.full((B, S), TEXT, dtype=torch.int8), rows=8)
    made = prepare(FromScores(Scores(q, k)), choice, query_modality_BS=None, key_modality_BK=None)
    for groups_bKM in (made.groups(slice(0, B)), replace(made, groups_BKM=None).groups(slice(0, 1))):
        assert groups_bKM.shape[1] == S and groups_bKM.stride(1) == 1


def test_slots_that_count_for_nothing_read_a_row_that_counts() -> None:
    """An unused slot may point anywhere, such as at a padding row that holds NaN: it reads a row of its sample that counts."""
    q, k = tensors(3)
    q[:, :, 5] = float("nan")
    choice = RowChoice(torch.tensor([[0, 5, 2]] * B), torch.tensor([[1.0, 0.0, 1.0]] * B), S)
    known = codes(9)
    source = FromScores(Scores(q, k))
    made = prepare(source, choice, query_modality_BS=known, key_modality_BK=known)
    assert made.choice.index_BR.tolist() == [[0, 0, 2]] * B
    assert sums(source, made).isfinite().all()
