from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from probe.measure import attention
from probe.measure.attention import COLUMNS, HEAD_ROWS, AttentionSums, describe, describe_later, finish_later
from probe.measure.probabilities import NotObservable, RowProbabilities, rows_from_sdpa, rows_from_softmax
from probe.measure.rows import RowChoice, choose_all_valid, choose_rows
from probe.sites.modality import AUDIO, PADDING, TEXT

B, H, S, K = 3, 4, 12, 10


def random_modality(length: int, seed: int, samples: int = B) -> Tensor:
    return torch.randint(0, 3, (samples, length), generator=torch.Generator().manual_seed(seed)).to(torch.int8)


def random_rows(choice: RowChoice, seed: int, *, hidden: float = 0.4) -> RowProbabilities:
    """Rows of random attention in which each row sees a random set of keys, some rows one key or none."""
    generator = torch.Generator().manual_seed(seed)
    rows = choice.index_BR.shape[1]
    visible = torch.rand(B, rows, K, generator=generator) > hidden
    visible[0, 0], visible[1, 0] = False, torch.arange(K) == 4
    p = torch.rand(B, H, rows, K, generator=generator) * visible[:, None]
    p = p / p.sum(-1, keepdim=True).clamp(min=1e-9)
    return RowProbabilities(p_BHRK=p, visible_BRK=visible, queries=choice.queries, how="")


def by_hand(
    rows: RowProbabilities, choice: RowChoice, query: Tensor | None, key: Tensor | None
) -> tuple[dict[str, float], dict[str, list[float]]]:
    """The definitions, one row and one head at a time, in Python floats."""
    sums = dict.fromkeys(COLUMNS, 0.0)
    heads = {name: [0.0] * H for name in HEAD_ROWS}
    for b in range(B):
        if key is None:
            seen_by_any = [k for k in range(K) if bool(rows.visible_BRK[b, :, k].any())]
            first = min(seen_by_any) if seen_by_any else 0
        else:
            first = min([k for k in range(K) if key[b, k] != PADDING], default=0)
        for r in range(choice.index_BR.shape[1]):
            weight = float(choice.weight_BR[b, r])
            keys = [k for k in range(K) if bool(rows.visible_BRK[b, r, k])]
            code = None if query is None else int(query[b, choice.index_BR[b, r]])
            if weight == 0 or not keys or code == PADDING:
                continue
            sums["sampled"] += 1
            sums["rows"] += weight
            sums["relative_rows"] += weight * (len(keys) >= 2)
            sums["padding_rows"] += weight * (key is not None)
            for h in range(H):
                p = [float(value) for value in rows.p_BHRK[b, h, r]]
                entropy = -sum(value * math.log(value) for value in p if value > 0)
                sums["entropy_nats"] += weight * entropy / H
                sums["entropy"] += weight * entropy / math.log(len(keys)) / H if len(keys) >= 2 else 0.0
                sums["first_token"] += weight * p[first] / H
                heads["entropy_nats"][h] += weight * entropy
                heads["first_token"][h] += weight * p[first]
                if key is None:
                    continue
                sums["padding"] += weight * sum(p[k] for k in range(K) if key[b, k] == PADDING) / H
                for of, of_code in (("text", TEXT), ("audio", AUDIO)):
                    for to, to_code in (("text", TEXT), ("audio", AUDIO)):
                        if code != of_code or not any(int(key[b, k]) == to_code for k in keys):
                            continue
                        mass = sum(p[k] for k in range(K) if key[b, k] == to_code)
                        sums[f"{of}_rows_{to}_visible"] += weight / H
                        sums[f"{of}_to_{to}"] += weight * mass / H
                        if of != to:
                            heads[f"{of}_to_{to}"][h] += weight * mass
    return sums, heads


def named(found: AttentionSums) -> dict[str, float]:
    assert found.sums.dtype == torch.float64
    return dict(zip(COLUMNS, found.sums.tolist(), strict=True))


@pytest.mark.parametrize("queries_known", [False, True])
@pytest.mark.parametrize("keys_known", [False, True])
@pytest.mark.parametrize("budget", [6, 15, 100])
def test_sums_are_those_of_the_definition(queries_known: bool, keys_known: bool, budget: int) -> None:
    """Every column and every head's numerator equals the definition worked out row by row, whatever is known."""
    for seed in range(3):
        query = random_modality(S, seed) if queries_known else None
        key = random_modality(K, seed + 10) if keys_known else None
        choice = choose_all_valid(B, S, budget, torch.device("cpu")) if query is None else choose_rows(query, rows=budget)
        rows = random_rows(choice, seed + 20)
        found = describe(rows, choice, query_modality_BS=query, key_modality_BK=key)
        sums, heads = by_hand(rows, choice, query, key)
        assert named(found) == pytest.approx(sums, rel=1e-6, abs=1e-9)
        assert found.masses_per_head
        for name, values in zip(HEAD_ROWS, found.per_head.tolist(), strict=True):
            assert values == pytest.approx(heads[name], rel=1e-6, abs=1e-9)


def test_known_values() -> None:
    """Uniform attention has relative entropy 1 and shares its mass as the keys are shared; a single spike has entropy 0."""
    query, key = torch.full((B, S), TEXT, dtype=torch.int8), torch.full((B, K), TEXT, dtype=torch.int8)
    key[:, 2:5], key[:, 9] = AUDIO, PADDING
    choice = choose_rows(query, rows=1000)
    visible = torch.ones(B, S, K, dtype=torch.bool)
    uniform = RowProbabilities(torch.full((B, H, S, K), 1 / K), visible, S, "")
    sums = named(describe(uniform, choice, query_modality_BS=query, key_modality_BK=key))
    assert sums["rows"] == sums["sampled"] == sums["padding_rows"] == B * S
    assert sums["entropy"] / sums["relative_rows"] == pytest.approx(1.0, abs=1e-6)
    assert sums["entropy_nats"] / sums["rows"] == pytest.approx(math.log(K), abs=1e-6)
    assert sums["text_to_audio"] / sums["text_rows_audio_visible"] == pytest.approx(0.3, abs=1e-6)
    assert sums["text_to_text"] / sums["text_rows_text_visible"] == pytest.approx(0.6, abs=1e-6)
    assert sums["padding"] / sums["padding_rows"] == pytest.approx(0.1, abs=1e-6)
    assert sums["audio_rows_text_visible"] == sums["audio_to_audio"] == 0.0
    spike = RowProbabilities(torch.zeros(B, H, S, K).index_fill_(-1, torch.tensor([0]), 1.0), visible, S, "")
    sums = named(describe(spike, choice, query_modality_BS=query, key_modality_BK=key))
    assert sums["entropy"] == sums["entropy_nats"] == 0.0
    assert sums["first_token"] == B * S


@pytest.mark.parametrize("known", [False, True])
def test_later_is_the_same_as_at_once(known: bool) -> None:
    """Sums finished when the modality is known equal those taken at once; only masses per head are not there, and say so."""
    query, key = (random_modality(S, 1), random_modality(K, 2)) if known else (None, None)
    choice = choose_all_valid(B, S, 15, torch.device("cpu"))
    rows = random_rows(choice, 3)
    now = describe(rows, choice, query_modality_BS=query, key_modality_BK=key)
    held = describe_later(rows, choice)
    later = finish_later(held, query, key)
    torch.testing.assert_close(later.sums, now.sums, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(later.per_head[0], now.per_head[0])
    assert later.per_head.shape == now.per_head.shape
    assert not later.masses_per_head
    assert not later.per_head[1:].any()


def test_held_rows_tell_their_size_and_hold_no_heads() -> None:
    """``nbytes`` covers what is held, which is the rows without their heads, and nothing of the whole rows stays alive."""
    choice = choose_all_valid(B, S, 15, torch.device("cpu"))
    rows = random_rows(choice, 4)
    held = describe_later(rows, choice)
    owned = (held.p_BRK, held.visible_BRK, held.entropy_BHR, held.choice.index_BR, held.choice.weight_BR)
    assert held.nbytes >= sum(tensor.untyped_storage().nbytes() for tensor in owned)
    assert held.p_BRK.untyped_storage().data_ptr() != rows.p_BHRK.untyped_storage().data_ptr()
    assert held.p_BRK.numel() * H == rows.p_BHRK.numel()


def test_heads_are_taken_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of heads give the values of all heads at once, and no float64 copy of all heads is built."""
    query, key = random_modality(S, 5), random_modality(K, 6)
    choice = choose_rows(query, rows=100)
    rows = random_rows(choice, 7)
    whole = describe(rows, choice, query_modality_BS=query, key_modality_BK=key)
    monkeypatch.setattr(attention, "CHUNK_BYTES", 1)
    with Watch() as watch:
        chunked = describe(rows, choice, query_modality_BS=query, key_modality_BK=key)
    assert watch.largest < rows.p_BHRK.numel()
    torch.testing.assert_close(chunked.sums, whole.sums)
    torch.testing.assert_close(chunked.per_head, whole.per_head)


def test_padding_rows_may_hold_anything() -> None:
    """NaN in a row that is padding or unused spoils nothing; NaN in a row that counts shows."""
    query, key = random_modality(S, 8), random_modality(K, 9)
    choice = choose_all_valid(B, S, 1000, torch.device("cpu"))
    rows = random_rows(choice, 10, hidden=-1.0)
    rows.visible_BRK.fill_(True)
    padding = query.gather(1, choice.index_BR) == PADDING
    assert padding.any()
    rows.p_BHRK.masked_fill_(padding[:, None, :, None], float("nan"))
    found = describe(rows, choice, query_modality_BS=query, key_modality_BK=key)
    assert found.sums.isfinite().all()
    assert found.per_head.isfinite().all()
    assert not describe(rows, choice, query_modality_BS=None, key_modality_BK=key).sums.isfinite().all()


def test_calls_and_facts_that_do_not_fit_are_told() -> None:
    """A choice or a modality of another call raises NotObservable with both shapes, now and later."""
    query, key = random_modality(S, 11), random_modality(K, 12)
    choice = choose_rows(query, rows=15)
    rows = random_rows(choice, 13)
    other = choose_all_valid(B, S + 1, 15, torch.device("cpu"))
    with pytest.raises(NotObservable, match=r"\(3, 13\) queries, the call has \(3, 12\)"):
        describe(rows, other, query_modality_BS=query, key_modality_BK=key)
    with pytest.raises(NotObservable, match="queries"):
        describe_later(rows, other)
    with pytest.raises(NotObservable, match=r"\(3, 10\) tokens is known, the call has \(3, 12\) queries"):
        describe(rows, choice, query_modality_BS=key, key_modality_BK=key)
    with pytest.raises(NotObservable, match="keys"):
        finish_later(describe_later(rows, choice), query, query)


class Watch(TorchDispatchMode):
    """Fails on what waits for the device or draws random numbers; counts operators and the elements of the largest float64 tensor."""

    FORBIDDEN = ("_local_scalar_dense", "nonzero", "masked_select", "item", "is_nonzero", "equal", "random", "rand", "bernoulli", "unique")

    def __init__(self) -> None:
        super().__init__()
        self.operators = 0
        self.largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        assert name.rstrip("_") not in self.FORBIDDEN, f"{name} waits for the device or draws random numbers"
        if name in ("index", "index_put_", "index_put"):
            masks = [part for part in args[1] if part is not None and part.dtype in (torch.bool, torch.uint8)]
            assert not masks, "indexing by a mask waits for the device"
        self.operators += 1
        output = func(*args, **(kwargs or {}))
        if isinstance(output, Tensor) and output.dtype == torch.float64:
            self.largest = max(self.largest, output.numel())
        return output


def test_nothing_waits_for_the_device() -> None:
    """From the choice of rows to the sums, no operator synchronises or draws a random number, and a layer needs about a hundred."""
    q, k = torch.randn(B, H, S, 8), torch.randn(B, H, K, 8)
    scores = torch.randn(B, H, S, K)
    query, key = random_modality(S, 14), random_modality(K, 15)
    mask = torch.ones(S, K).tril().bool()
    with Watch():
        choice = choose_rows(query, rows=15)
    for at_once in (True, False):
        with Watch() as watch:
            rows = rows_from_sdpa(
                q, k, attn_mask=mask, is_causal=False, scale=None, enable_gqa=False, index_BR=choice.index_BR, autocast_dtype=None
            )
            found = (
                describe(rows, choice, query_modality_BS=query, key_modality_BK=key)
                if at_once
                else finish_later(describe_later(rows, choice), query, key)
            )
        assert watch.operators < 200
        assert float(found.sums[COLUMNS.index("rows")]) > 0
    with Watch():
        rows = rows_from_softmax(scores, scores.clone(), index_BR=choice.index_BR)
        describe(rows, choice, query_modality_BS=None, key_modality_BK=None)


def test_autocast_around_does_not_reach_the_sums() -> None:
    """Inside a bfloat16 autocast region the sums are the same to the last digit."""
    query, key = random_modality(S, 16), random_modality(K, 17)
    choice = choose_rows(query, rows=15)
    rows = random_rows(choice, 18)
    plain = describe(rows, choice, query_modality_BS=query, key_modality_BK=key)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = describe(rows, choice, query_modality_BS=query, key_modality_BK=key)
        later = finish_later(describe_later(rows, choice), query, key)
    assert torch.equal(cast.sums, plain.sums)
    torch.testing.assert_close(later.sums, plain.sums, rtol=1e-6, atol=1e-9)
