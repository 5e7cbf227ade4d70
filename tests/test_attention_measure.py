from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from attention_by_hand import B, Given, H, K, S, by_hand, random_modality, random_source
from costs import MIB, kernels, operations, peak_mib
from probe.measure import attention, blocks, walk
from probe.measure.attention import HeadMeanRows, finish_later, held_bytes, reduce_rows, sum_up
from probe.measure.blocks import NotObservable, RowSource
from probe.measure.prepared import prepare
from probe.measure.probabilities import FromScores, FromSoftmax
from probe.measure.quantities import COLUMNS, MASSES, QUANTITIES, SHAPE, WALKS, AttentionSums, weight_of
from probe.measure.rows import RowChoice, choose_all_valid, choose_rows
from probe.measure.scores import Scores
from probe.measure.sight import look
from probe.sites.modality import AUDIO, PADDING, REFERENCE, TEXT

pytestmark = pytest.mark.pure  # of torch and probe alone: the same with every transformers


def describe(source: RowSource, choice: RowChoice, **given: Any) -> AttentionSums:
    prepared = prepare(source, choice, **given)
    return sum_up([reduce_rows(source, prepared)], prepared)


def describe_later(source: RowSource, choice: RowChoice) -> HeadMeanRows:
    return attention.describe_later(source, prepare(source, choice, query_modality_BS=None, key_modality_BK=None))


def named(found: AttentionSums) -> dict[str, float]:
    assert found.sums_LC[0].dtype == torch.float64
    return dict(zip(COLUMNS, found.sums_LC[0].tolist(), strict=True))


def mean(found: AttentionSums, what: str) -> float:
    sums = named(found)
    return sums[what] / sums[weight_of(what)]


@pytest.mark.parametrize("self_attention", [False, True])
@pytest.mark.parametrize(("queries_known", "keys_known"), [(False, False), (False, True), (True, False), (True, True)])
@pytest.mark.parametrize("budget", [6, 15, 100])
def test_sums_are_those_of_the_definition(self_attention: bool, queries_known: bool, keys_known: bool, budget: int) -> None:
    """Every column and every head's numerator equals the definition worked out row by row, whatever is known, in any blocks."""
    for seed in range(5):
        query = random_modality(S, seed) if queries_known else None
        key = random_modality(K, seed + 10) if keys_known else None
        choice = choose_all_valid(B, S, budget, torch.device("cpu")) if query is None else choose_rows(query, rows=budget)
        source = random_source(seed + 20, sinks=seed % 2)
        found = describe(source, choice, query_modality_BS=query, key_modality_BK=key, self_attention=self_attention)
        expected = by_hand(source, choice, query, key, self_attention)
        sums, heads = named(found), dict(zip(QUANTITIES, found.per_head_LQH[0].tolist(), strict=True))
        assert sums["sampled"] == expected["sampled"]
        for name in QUANTITIES:
            numerators, weight = expected[name]
            assert sums[weight_of(name)] == pytest.approx(weight, rel=1e-6), name
            assert sums[name] == pytest.approx(sum(numerators) / H, rel=1e-6, abs=1e-9), name
            assert heads[name] == pytest.approx(numerators, rel=1e-6, abs=1e-9), name
        both = queries_known and keys_known
        assert found.headwise == (QUANTITIES if both else (*SHAPE, *MASSES))


def test_the_definitions_tell_apart() -> None:
    """The random calls above do have every quantity, in and out of the reference."""
    query, key = random_modality(S, 1), random_modality(K, 11)
    choice = choose_rows(query, rows=100)
    expected = by_hand(random_source(21, sinks=1), choice, query, key, True)
    assert all(expected[name][1] > 0 for name in QUANTITIES)
    assert len({expected[name][1] for name in MASSES}) > 4


def test_known_values() -> None:
    """Uniform attention has relative entropy 1, K effective keys and its mass as the keys are shared; a spike has entropy 0."""
    query, key = torch.full((B, S), TEXT, dtype=torch.int8), torch.full((B, K), TEXT, dtype=torch.int8)
    key[:, 2:5], key[:, 5], key[:, 9] = AUDIO, REFERENCE, PADDING
    choice = choose_rows(query, rows=1000)
    visible = torch.ones(B, S, K, dtype=torch.bool)
    uniform = describe(Given(torch.full((B, H, S, K), 1 / K), visible), choice, query_modality_BS=query, key_modality_BK=key)
    sums = named(uniform)
    assert sums["sampled"] == sums["entropy_nats_weight"] == sums["padding_weight"] == B * S
    shares = {"entropy": 1.0, "entropy_nats": math.log(K), "effective_keys": K, "top": 0.1, "padding": 0.1, "first_token": 0.1}
    masses = {"text_to_audio": 0.4, "text_to_text": 0.5, "text_to_reference": 0.1, "coverage": 1.0, "monotonicity": 0.0}
    for what, value in {**shares, **masses}.items():
        assert mean(uniform, what) == pytest.approx(value, abs=1e-6), what
    assert sums["audio_to_text_weight"] == sums["audio_to_audio"] == sums["sink_weight"] == 0.0
    spike = torch.zeros(B, H, S, K).index_fill_(-1, torch.tensor([0]), 1.0)
    sums = named(describe(Given(spike, visible), choice, query_modality_BS=query, key_modality_BK=key))
    assert sums["entropy"] == sums["entropy_nats"] == 0.0
    assert sums["first_token"] == sums["effective_keys"] == sums["top"] == B * S
    assert (sums["coverage"], sums["monotonicity"]) == (0.0, 0.0), "nothing on audio covers nothing and has no order"


@pytest.mark.parametrize(("order", "tau"), [(1, 1.0), (-1, -1.0)])
def test_reading_aloud_is_monotone(order: int, tau: float) -> None:
    """Text that looks at one frame after another has tau 1 and covers all frames; backwards it has tau -1; padding is left out."""
    query, key = torch.full((1, 20), TEXT, dtype=torch.int8), torch.full((1, 50), AUDIO, dtype=torch.int8)
    query[0, 10:], key[0, 40:] = PADDING, PADDING
    p = torch.zeros(1, 2, 20, 50)
    for row in range(10):
        at = row if order > 0 else 9 - row
        p[:, :, row, 4 * at : 4 * at + 4] = 0.25
    source = Given(p, torch.ones(1, 20, 50, dtype=torch.bool))
    found = describe(source, choose_rows(query, rows=64), query_modality_BS=query, key_modality_BK=key, self_attention=False)
    assert mean(found, "monotonicity") == tau
    assert mean(found, "coverage") == pytest.approx(1.0)
    assert mean(found, "band") == pytest.approx(1.0 if order > 0 else 0.1)
    assert named(found)["distance_weight"] == 0.0


def test_rounding_is_no_order() -> None:
    """Centres of attention that differ by rounding alone tie: uniform attention with noise in the last digits has tau 0."""
    query, key = torch.full((1, 20), TEXT, dtype=torch.int8), torch.full((1, 50), AUDIO, dtype=torch.int8)
    p = torch.full((1, 2, 20, 50), 0.02) + 1e-8 * torch.rand(1, 2, 20, 50, generator=torch.Generator().manual_seed(1))
    source = Given(p, torch.ones(1, 20, 50, dtype=torch.bool))
    found = describe(source, choose_rows(query, rows=64), query_modality_BS=query, key_modality_BK=key, self_attention=False)
    assert named(found)["monotonicity"] == 0.0 < named(found)["monotonicity_weight"]


def test_an_unused_slot_sees_nothing_for_the_others() -> None:
    """The audio that is covered is that which rows see that count: an unused slot's text row widens it by nothing."""
    query, key = torch.full((1, 3), TEXT, dtype=torch.int8), torch.full((1, 8), AUDIO, dtype=torch.int8)
    visible = torch.arange(8) < torch.tensor([4, 4, 8])[:, None]
    p = visible / visible.sum(-1, keepdim=True)
    choice = RowChoice(torch.tensor([[0, 1, 2]]), torch.tensor([[1.0, 1.0, 0.0]]), 3)
    found = describe(Given(p[None, None].float(), visible[None]), choice, query_modality_BS=query, key_modality_BK=key)
    assert mean(found, "coverage") == pytest.approx(1.0)


def test_visible_keys_are_counted_exactly_under_autocast() -> None:
    """bfloat16 would count 1001 keys as 1000."""
    choice = choose_all_valid(1, 2, 64, torch.device("cpu"))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        key = torch.full((1, 1001), TEXT, dtype=torch.int8)
        sight = look(lambda r: torch.ones(1, 2, 1001, dtype=torch.bool)[:, r], choice, 1001, None, key, walks=False)
    assert sight.kinds_BRM.tolist() == [[[1001.0, 0.0, 0.0]] * 2]
    assert sight.visible_BR.tolist() == [[1001.0] * 2]


@pytest.mark.parametrize("known", [False, True])
@pytest.mark.parametrize("sinks", [0, 1])
def test_later_is_the_same_as_at_once(known: bool, sinks: int) -> None:
    """Sums finished when the modality is known equal those taken at once; masses of each head and walks are not there, and say so."""
    query, key = (random_modality(S, 1), random_modality(K, 2)) if known else (None, None)
    choice = choose_all_valid(B, S, 15, torch.device("cpu"))
    source = random_source(3, sinks=sinks)
    now = describe(source, choice, query_modality_BS=query, key_modality_BK=key)
    later = finish_later(describe_later(source, choice), query, key)
    at_once, afterwards = named(now), named(later)
    for what in (*SHAPE, *MASSES):
        assert afterwards[what] == pytest.approx(at_once[what], rel=1e-6, abs=1e-9), what
        assert afterwards[weight_of(what)] == at_once[weight_of(what)]
    assert all(afterwards[name] == afterwards[weight_of(name)] == 0.0 for name in WALKS)
    torch.testing.assert_close(later.per_head_LQH[0][: len(SHAPE)], now.per_head_LQH[0][: len(SHAPE)])
    assert later.headwise == SHAPE
    assert later.per_head_LQH[0].shape == now.per_head_LQH[0].shape
    assert not later.per_head_LQH[0][len(SHAPE) :].any()


def test_held_rows_tell_their_size_beforehand_and_hold_no_heads() -> None:
    """``held_bytes`` covers what is held, which is the rows without their heads."""
    choice = choose_all_valid(B, S, 15, torch.device("cpu"))
    source = random_source(4)
    held = describe_later(source, choice)
    owned = (held.p_BRK, held.visible_BRK, held.raw_QBHR, held.choice.index_BR, held.choice.weight_BR)
    assert held_bytes(source.shape, choice) >= sum(tensor.untyped_storage().nbytes() for tensor in owned)
    assert held.p_BRK.numel() * H * S == source.p_BHSK.numel() * choice.index_BR.shape[1]


def layer(samples: int, heads: int, rows: int, keys: int, width: int = 64) -> tuple[FromScores, RowChoice, Tensor]:
    q, k = torch.randn(samples, heads, rows, width).bfloat16(), torch.randn(samples, keys, heads, width).bfloat16().transpose(1, 2)
    modality = torch.randint(1, 4, (samples, keys)).to(torch.int8)
    return FromScores(Scores(q, k, causal_offset=keys - rows)), choose_rows(modality[:, :rows], rows=64), modality


@pytest.mark.parametrize("later", [False, True])
@pytest.mark.parametrize(("heads", "keys"), [(8, 1500), (16, 2048)])
def test_the_peak_is_a_twentieth_of_the_full_matrix(heads: int, keys: int, later: bool) -> None:
    """64 rows of 8 heads over 1500 keys, or of 16 over 2048, need at most a twentieth of what the matrix of the layer would take."""
    source, choice, modality = layer(1, heads, keys, keys)

    def measure() -> None:
        if later:
            finish_later(describe_later(source, choice), modality, modality)
        else:
            describe(source, choice, query_modality_BS=modality, key_modality_BK=modality)

    assert peak_mib(measure) <= heads * keys * keys * 4 / MIB / 20


@pytest.mark.parametrize("sizes", [(1, 4, 64, 65_536, 16), (1_000, 2, 8, 1_500, 8)])
def test_the_peak_is_bounded_whatever_the_keys_and_the_batch(sizes: tuple[int, int, int, int, int]) -> None:
    """With 65,536 keys, and with 1,000 samples, two chunks and 4 bytes a key of each sample are enough: the rows alone would take more."""
    samples, heads, rows, keys, width = sizes
    source, choice, modality = layer(samples, heads, rows, keys, width)
    query = modality[:, :rows]
    assert choice.index_BR.numel() == max(64, samples)
    peak = peak_mib(lambda: describe(source, choice, query_modality_BS=query, key_modality_BK=modality, self_attention=False))
    assert peak <= (2 * blocks.CHUNK_BYTES + 4 * samples * keys) / MIB


@pytest.mark.parametrize("keys", [1 << 15, 1 << 18])
def test_squares_of_long_rows_are_not_rounded_away(keys: int) -> None:
    """The effective number of keys is within 1e-6 of float64, however many keys there are."""
    p = torch.rand(1, 1, 4, keys, generator=torch.Generator().manual_seed(keys))
    p /= p.double().sum(-1, keepdim=True)
    text = torch.full((1, 4), TEXT, dtype=torch.int8)
    found = describe(
        Given(p, torch.ones(1, 4, keys, dtype=torch.bool)), choose_rows(text, rows=4), query_modality_BS=text, key_modality_BK=None
    )
    assert mean(found, "effective_keys") == pytest.approx(float((1 / p.double().square().sum(-1)).mean()), rel=1e-6)


def test_chunks_change_no_value(monkeypatch: pytest.MonkeyPatch) -> None:
    """However small the limit, the sums are the same: of what is seen, of blocks, of pairs of rows, of what was held."""
    query, key = random_modality(S, 5), random_modality(K, 6)
    choice = choose_rows(query, rows=100)
    source = FromScores(Scores(torch.randn(B, H, S, 8), torch.randn(B, H, K, 8), causal_offset=1, sinks_H=torch.randn(H)))

    def both() -> tuple[AttentionSums, AttentionSums]:
        now = describe(source, choice, query_modality_BS=query, key_modality_BK=key)
        return now, finish_later(describe_later(source, choice), query, key)

    whole = both()
    for limit in (1, 2_000):
        monkeypatch.setattr(blocks, "CHUNK_BYTES", limit)
        for found, expected in zip(both(), whole):
            torch.testing.assert_close(found.sums_LC[0], expected.sums_LC[0])
            torch.testing.assert_close(found.per_head_LQH[0], expected.per_head_LQH[0])


def test_padding_rows_may_hold_anything() -> None:
    """NaN in a row that is padding or unused spoils nothing; NaN in a row that counts shows, in every quantity it enters."""
    query, key = random_modality(S, 8), random_modality(K, 9)
    choice = choose_all_valid(B, S, 1000, torch.device("cpu"))
    source = random_source(12, hidden=-1.0)
    source.visible_BSK.fill_(True)
    assert (query == PADDING).any()
    source.p_BHSK.masked_fill_((query == PADDING)[:, None, :, None], float("nan"))
    found = describe(source, choice, query_modality_BS=query, key_modality_BK=key)
    assert found.sums_LC[0].isfinite().all()
    assert found.per_head_LQH[0].isfinite().all()
    query[query == PADDING] = TEXT
    shown = named(describe(source, choice, query_modality_BS=query, key_modality_BK=key))
    for what in ("entropy_nats", "effective_keys", "top", "distance", "text_to_audio", "monotonicity", "coverage"):
        assert not math.isfinite(shown[what]), what


def test_calls_and_facts_that_do_not_fit_are_told() -> None:
    """A choice or a modality of another call raises NotObservable with both shapes, now and later."""
    query, key = random_modality(S, 11), random_modality(K, 12)
    choice = choose_rows(query, rows=15)
    source = random_source(13)
    other = choose_all_valid(B, S + 1, 15, torch.device("cpu"))
    with pytest.raises(NotObservable, match=r"\(3, 13\) queries, the call has \(3, 12\)"):
        describe(source, other, query_modality_BS=query, key_modality_BK=key)
    with pytest.raises(NotObservable, match="queries"):
        describe_later(source, other)
    with pytest.raises(NotObservable, match=r"\(3, 10\) tokens is known, the call has \(3, 12\) queries"):
        describe(source, choice, query_modality_BS=key, key_modality_BK=key)
    with pytest.raises(NotObservable, match="keys"):
        finish_later(describe_later(source, choice), query, query)


def test_walks_are_left_out_where_nobody_wants_them() -> None:
    """Without ``walks`` they have weight 0, and cost nothing."""
    query, key = random_modality(S, 14), random_modality(K, 15)
    source, choice = random_source(16), choose_rows(query, rows=100)
    without = describe(source, choice, query_modality_BS=query, key_modality_BK=key, walks=False)
    assert all(named(without)[weight_of(name)] == 0.0 for name in WALKS)
    assert without.headwise == (*SHAPE, *MASSES)
    counted = [
        operations(lambda walks=walks: describe(source, choice, query_modality_BS=query, key_modality_BK=key, walks=walks))
        for walks in (False, True)
    ]
    assert counted[0] + 50 < counted[1]


def prepared_call(kind: str, seed: int = 0) -> tuple[RowSource, RowChoice, dict[str, Any]]:
    generator = torch.Generator().manual_seed(seed)
    q, k = (torch.randn(2, 6, 64, 64, generator=generator) for _ in range(2))
    text, audio = (torch.full((2, 64), code, dtype=torch.int8) for code in (TEXT, AUDIO))
    query, key = (audio if kind == "encoder" else text), (text if kind == "decoder" else audio)
    source, choice = FromScores(Scores(q, k, causal_offset=0 if kind == "decoder" else None)), choose_rows(query, rows=64)
    cross = kind == "cross"
    return source, choice, {"query_modality_BS": query, "key_modality_BK": key, "self_attention": not cross, "walks": cross}


@pytest.mark.parametrize(("kind", "bound", "together"), [("encoder", 26, 17), ("decoder", 29, 17), ("cross", 29, 76)])
def test_a_layer_launches_little_work(kind: str, bound: int, together: int) -> None:
    """Beside what layers share, a call costs some 30 operations if its rows fit into one block; summing up costs no more for many."""
    source, choice, given = prepared_call(kind)
    prepared = prepare(source, choice, **given)
    assert kernels(lambda: prepare(source, choice, **given)) <= 105
    assert kernels(lambda: reduce_rows(source, prepared)) <= bound
    calls = [reduce_rows(source, prepared) for _ in range(12)]
    assert kernels(lambda: sum_up(calls, prepared)) <= together


@pytest.mark.parametrize("kind", ["encoder", "decoder", "cross"])
def test_calls_are_summed_up_together_as_alone(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each call's sums are those that it has alone, also where only some of them bring their coverage worked out."""
    _, choice, given = prepared_call(kind)
    sources = [prepared_call(kind, seed)[0] for seed in range(3)]
    prepared = prepare(sources[0], choice, **given)
    calls = [reduce_rows(source, prepared) for source in sources]
    if kind == "cross":
        monkeypatch.setattr(walk, "_TOGETHER_BYTES", blocks.CHUNK_BYTES)
        calls[1] = reduce_rows(sources[1], prepared)
        assert [call.walked.dim() for call in calls if call.walked is not None] == [3, 2, 3]
    found = sum_up(calls, prepared)
    assert found.sums_LC.shape == (3, len(COLUMNS))
    assert not torch.equal(found.sums_LC[0], found.sums_LC[1])
    for number, call in enumerate(calls):
        alone = sum_up([call], prepared)
        torch.testing.assert_close(found.sums_LC[number], alone.sums_LC[0], rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(found.per_head_LQH[number], alone.per_head_LQH[0], rtol=1e-12, atol=1e-12)
        assert found.headwise == alone.headwise


class Watch(TorchDispatchMode):
    """Fails on what waits for the device or draws random numbers; counts operators."""

    FORBIDDEN = ("_local_scalar_dense", "nonzero", "masked_select", "item", "is_nonzero", "equal", "random", "rand", "bernoulli", "unique")

    def __init__(self) -> None:
        super().__init__()
        self.operators = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        assert name.rstrip("_") not in self.FORBIDDEN, f"{name} waits for the device or draws random numbers"
        if name in ("index", "index_put_", "index_put"):
            masks = [part for part in args[1] if part is not None and part.dtype in (torch.bool, torch.uint8)]
            assert not masks, "indexing by a mask waits for the device"
        self.operators += 1
        return func(*args, **(kwargs or {}))


def test_nothing_waits_for_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """From the choice of rows to the sums, no operator synchronises or draws a random number."""
    q, k = torch.randn(B, H, S, 8), torch.randn(B, H, K, 8)
    scores = torch.randn(B, H, S, K)
    query, key = random_modality(S, 14), random_modality(K, 15)
    segments = torch.zeros(B, S, dtype=torch.int64), torch.zeros(B, K, dtype=torch.int64)
    plain = Scores(q, k, mask=torch.ones(S, K).tril().bool())
    everything = Scores(
        q, k, None, 30.0, torch.randn(B, 1, S, K), torch.randn(1, H, S, K), 0, (5, 5), key > 0, *segments,
        lambda b, h, q, k: q >= k, torch.randn(H),
    )  # fmt: skip
    with Watch():
        choice = choose_rows(query, rows=15)
    for given, limit in ((plain, blocks.CHUNK_BYTES), (everything, blocks.CHUNK_BYTES), (everything, 5_000)):
        monkeypatch.setattr(blocks, "CHUNK_BYTES", limit)
        with Watch() as watch:
            describe(FromScores(given), choice, query_modality_BS=query, key_modality_BK=key)
            finish_later(describe_later(FromScores(given), choice), query, key)
        if given is plain:
            assert watch.operators < 750  # views are counted, and everything that later layers share
    with Watch():
        describe(FromSoftmax(scores, scores.clone(), 1), choice, query_modality_BS=None, key_modality_BK=None)


def test_autocast_and_gradients_around_do_not_reach_the_sums() -> None:
    """Inside a bfloat16 autocast region the sums are the same to the last digit, and no graph is built."""
    query, key = random_modality(S, 16), random_modality(K, 17)
    choice = choose_rows(query, rows=15)
    source = FromScores(Scores(torch.randn(B, H, S, 8, requires_grad=True), torch.randn(B, H, K, 8)))
    plain = describe(source, choice, query_modality_BS=query, key_modality_BK=key)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = describe(source, choice, query_modality_BS=query, key_modality_BK=key)
        later = finish_later(describe_later(source, choice), query, key)
    assert torch.equal(cast.sums_LC, plain.sums_LC)
    assert not plain.sums_LC.requires_grad
    shape = len(SHAPE) + 1
    torch.testing.assert_close(later.sums_LC[:, :shape], plain.sums_LC[:, :shape], rtol=1e-6, atol=1e-9)
