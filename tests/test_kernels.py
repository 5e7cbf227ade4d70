"""Calls of kernels that torch functions do not show: the rows against what the kernel itself returns for values that spell its weights."""

from __future__ import annotations

from collections.abc import Callable
from inspect import signature
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import modeling_flash_attention_utils as utils

import flash_stand_in
from flash_stand_in import REAL, VERSION, WINDOW_EXCESS
from probe.capture.kernels import from_flash, run_kernel
from probe.capture.tap import AttentionTap
from probe.foreign.attention_kernels import Convention, Kernel
from probe.foreign.flash_call import FlashCall, flash_call
from probe.foreign.function_modes import innermost
from probe.measure.blocks import NotObservable, RowSource
from probe.measure.output_check import CheckedRows
from probe.measure.probabilities import FromScores
from rows_together import together

if VERSION >= (4, 48):
    from transformers.integrations import flex_attention as flex_integration
SINCE_4_48 = pytest.mark.skipif(VERSION < (4, 48), reason="this transformers has no attention interface")
SINCE_4_55 = pytest.mark.skipif(VERSION < (4, 55), reason="this transformers does not ask what the kernel supports")

B, H, h, K = 2, 4, 2, 8
REAL_TOO = pytest.mark.parametrize(
    "flash", [False, pytest.param(True, marks=pytest.mark.skipif(not REAL, reason="no GPU, or no flash_attn"), id="real")], indirect=True
)


def tensors(samples: int, queries: int, keys: int, *, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Return q (B, S, H, K), k and v (B, K, h, K): widths equal the number of keys, so that v can be the identity and P·v is P."""
    generator = torch.Generator().manual_seed(seed)
    q = torch.randn(samples, queries, H, keys, generator=generator, requires_grad=True)
    k = torch.randn(samples, keys, h, keys, generator=generator, requires_grad=True)
    return q, k, torch.eye(keys)[None, :, None].expand(samples, -1, h, -1).clone()


def rows_of(source: RowSource) -> Tensor:
    """Return P (B, H, S, K) without the sink, and check that what is visible is what has probability."""
    samples, _, queries, keys = source.shape
    rows = together(source, torch.arange(queries, device=source.device).expand(samples, queries))
    assert torch.equal(rows.visible_BRK.cpu(), (rows.p_BHRK[..., :keys] > 0).any(1))
    return rows.p_BHRK[..., :keys]


def assert_weights(source: RowSource, output: Tensor) -> Tensor:
    """Fail unless the rows are the kernel's output (B, S, H, K), which the values spelt as weights; return them."""
    p = rows_of(source)
    torch.testing.assert_close(
        p, output.detach().float().cpu().transpose(1, 2), atol=1e-6 if output.dtype == torch.float32 else 1e-2, rtol=0
    )
    return p


def tapped(kernel: Kernel, *args: Any, **kwargs: Any) -> tuple[list[RowSource], list[Exception], Any]:
    """Run a kernel inside a tap."""
    sources: list[RowSource] = []
    errors: list[Exception] = []
    with AttentionTap(sources.append, errors.append):
        result = run_kernel(kernel, args, kwargs)
    return sources, errors, result


def reason_of(kernel: Kernel, *args: Any, **kwargs: Any) -> str:
    """Return why the one call could not be read."""
    sources, errors, _ = tapped(kernel, *args, **kwargs)
    assert sources == []
    assert [type(error) for error in errors] == [NotObservable]
    return str(errors[0])


def mask_of(*rows: str) -> Tensor:
    return torch.tensor([[int(place) for place in row] for row in rows])


Flash = Callable[..., tuple[FromScores, Tensor]]
NAMED = (
    {"attn_implementation": "flash_attention_2"} if "attn_implementation" in signature(utils._flash_attention_forward).parameters else {}
)


@pytest.fixture
def flash(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Flash:
    """Return a function that runs transformers' flash attention; it returns what was reported, and the output.

    It calls the stand-in, or with ``REAL_TOO`` the real kernel.
    """
    real = getattr(request, "param", False)
    if not real:
        flash_stand_in.install(monkeypatch)

    def there(value: Any) -> Any:
        if not real or not isinstance(value, Tensor):
            return value
        return value.to("cuda", torch.bfloat16 if value.is_floating_point() else None)

    def run(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, **options: Any) -> tuple[FromScores, Tensor]:
        given = {"query_length": q.shape[1], "is_causal": False, **NAMED, **{name: there(value) for name, value in options.items()}}
        kernel = Kernel("flash_attention_2", "flash", utils._flash_attention_forward)
        (source,), errors, output = tapped(kernel, there(q), there(k), there(v), there(mask), **given)
        assert errors == []
        assert isinstance(source, FromScores)
        assert output.grad_fn is not None
        return source, output

    return run


RIGHT, LEFT, HOLES = mask_of("11111111", "11111000"), mask_of("11111111", "00011111"), mask_of("11011011", "01110100")
CAUSAL: dict[str, Any] = {"is_causal": True}
WINDOW: dict[str, Any] = {"sliding_window": 3}
DENSE: dict[str, tuple[int, dict[str, Any]]] = {
    "everything": (8, {}),
    "causal": (8, CAUSAL),
    "causal, fewer queries": (5, CAUSAL),
    "one query": (1, CAUSAL),
    "cross": (5, {}),
    "window": (8, WINDOW),
    "causal window": (8, {**CAUSAL, **WINDOW}),
    "causal window, fewer queries": (5, {**CAUSAL, **WINDOW}),
    "window of all keys": (8, {**CAUSAL, "sliding_window": 8}),
    "scale": (8, {**CAUSAL, "softmax_scale": 0.7}),
    "softcap": (8, {**CAUSAL, "softcap": 1.5, "softmax_scale": 1.0}),
    "window of nothing": (8, {**CAUSAL, "sliding_window": 0}),
    "softcap of nothing": (8, {**CAUSAL, "softcap": 0.0}),
}


@REAL_TOO
@pytest.mark.parametrize("case", DENSE)
def test_flash_without_padding(case: str, flash: Flash) -> None:
    """The rows are the kernel's weights: causality aligned at the last query and key, windows as the kernel is told, softcap, scale."""
    queries, options = DENSE[case]
    source, output = flash(*tensors(B, queries, K), None, **options)
    assert_weights(source, output)


def test_windows_are_those_of_the_kernel(flash: Flash) -> None:
    """A query sees ``sliding_window`` keys, one more where transformers tells the kernel so; without causality as many after it."""
    source, _ = flash(*tensors(1, K, K), None, **CAUSAL, **WINDOW)
    assert (rows_of(source)[0, 0] > 0).sum(-1).max() == 3 + WINDOW_EXCESS
    source, _ = flash(*tensors(1, K, K), None, **WINDOW)
    assert (rows_of(source)[0, 0] > 0).sum(-1).max() == 2 * (2 + WINDOW_EXCESS) + 1


@REAL_TOO
@pytest.mark.parametrize("options", [CAUSAL, {}, {**CAUSAL, **WINDOW}, WINDOW], ids=["causal", "full", "causal window", "window"])
@pytest.mark.parametrize("queries", [K, 5, 1])
@pytest.mark.parametrize("mask", [RIGHT, LEFT, HOLES], ids=["right", "left", "holes"])
def test_flash_with_padding(mask: Tensor, queries: int, options: dict[str, Any], flash: Flash) -> None:
    """Padding keys are hidden, queries that the kernel does not compute see nothing, and windows count unpadded places."""
    source, output = flash(*tensors(B, queries, K), mask, **options)
    assert_weights(source, output)


def test_one_query_that_is_padding_over_one_key(flash: Flash) -> None:
    """As many queries as keys, be it one: the mask is of both."""
    source, output = flash(*tensors(B, 1, 1), mask_of("1", "0"), **CAUSAL)
    assert assert_weights(source, output).flatten(1).tolist() == [[1.0] * H, [0.0] * H]


@SINCE_4_55
def test_keys_beyond_the_mask_do_not_exist(flash: Flash) -> None:
    """A static cache has more keys than the mask has places: the rows have the mask's."""
    q, k, v = tensors(B, K, K)
    more_k, more_v = (F.pad(part, (0, 0, 0, 0, 0, 3), value=9.0) for part in (k, v))
    source, output = flash(q, more_k, more_v, LEFT, **CAUSAL)
    assert source.shape == (B, H, K, K)
    assert_weights(source, output)


PACKED = torch.tensor([[0, 1, 2, 0, 1, 0, 1, 2]])
PACKED_OPTIONS = pytest.mark.parametrize(
    "options", [CAUSAL, {**CAUSAL, **WINDOW}, {}, WINDOW], ids=["causal", "causal window", "full", "window"]
)


@REAL_TOO
@PACKED_OPTIONS
def test_sequences_packed_by_positions(options: dict[str, Any], flash: Flash) -> None:
    """Where positions restart a sequence begins, and its tokens see none of the others'."""
    source, output = flash(*tensors(1, K, K), None, position_ids=PACKED, **options)
    p = assert_weights(source, output)
    assert p[0, 0, 3:5, :3].max() == 0


@pytest.mark.parametrize("position_ids", [torch.arange(K)[None], torch.arange(K)[None] + 2, torch.tensor([[0, 1, 2, 3, 5, 6, 8, 9]])])
def test_positions_of_one_sequence_pack_nothing(position_ids: Tensor, flash: Flash) -> None:
    """Positions that only grow, from wherever, tell one sequence."""
    source, output = flash(*tensors(1, K, K), None, position_ids=position_ids, **CAUSAL)
    p = assert_weights(source, output)
    assert p[0, 0, -1].min() > 0


@pytest.mark.parametrize("queries", [5, 1])
def test_positions_of_fewer_queries_than_keys(queries: int, flash: Flash) -> None:
    """Queries that go on after keys of before (a prefix, a cache) are of one sequence with them."""
    position_ids = torch.arange(K - queries, K)[None]
    source, output = flash(*tensors(1, queries, K), None, position_ids=position_ids, **CAUSAL)
    assert_weights(source, output)


@pytest.mark.parametrize("position_ids", [PACKED.expand(B, -1), torch.tensor([[0, 0, 0, 1, 2, 3, 4, 5], [0, 1, 2, 3, 4, 5, 6, 7]])])
def test_positions_in_a_batch_of_several_rows(position_ids: Tensor, flash: Flash) -> None:
    """Packing in a batch of several rows is seen exactly where the installed transformers acts on it."""
    source, output = flash(*tensors(B, K, K), None, position_ids=position_ids, **CAUSAL)
    assert_weights(source, output)


@pytest.mark.skipif(VERSION < (4, 48), reason="this transformers takes no lengths")
@REAL_TOO
@PACKED_OPTIONS
@pytest.mark.parametrize("ends", [((0, 3, 5, 8), (0, 3, 5, 8)), ((0, 2, 3, 5), (0, 3, 5, 8)), ((0, 5), (0, 8)), ((0, 3, 5), (0, 3, 5))])
def test_sequences_packed_by_lengths(ends: tuple[tuple[int, ...], tuple[int, ...]], options: dict[str, Any], flash: Flash) -> None:
    """``cu_seq_lens`` tell the sequences, of queries and of keys; causality and windows are aligned at each sequence's end."""
    cu_q, cu_k = (torch.tensor(part, dtype=torch.int32) for part in ends)
    lengths = {"cu_seq_lens_q": cu_q, "cu_seq_lens_k": cu_k, "max_length_q": 5, "max_length_k": 8}
    queries = 5 if ends[0][-1] == 5 and ends[1][-1] == 8 else 8  # of the last, three tokens are in no sequence
    positions = torch.arange(queries)[None]
    source, output = flash(*tensors(1, queries, K), None, position_ids=positions, **lengths, **options)
    assert_weights(source, output)


@SINCE_4_55
@pytest.mark.parametrize("supported", [True, False])
def test_sinks_count_where_the_kernel_takes_them(supported: bool, flash: Flash, monkeypatch: pytest.MonkeyPatch) -> None:
    """A learned sink takes its share of the rows; a kernel without sinks is not told of them, and has none."""
    flash_stand_in.install(monkeypatch, sinks=supported)
    source, output = flash(*tensors(B, K, K), LEFT, **CAUSAL, s_aux=torch.tensor([0.0, 1.0, -1.0, 2.0]))
    assert source.sinks == int(supported)
    p = assert_weights(source, output)
    total = p[0].sum(-1)
    assert (total < 0.95).any() if supported else torch.allclose(total, torch.ones(()))


@pytest.mark.skipif(VERSION < (4, 48), reason="4.46 casts before it calls")
def test_float32_is_rounded_as_it_is_for_the_kernel(flash: Flash) -> None:
    """q and k in float32 that are cast on their way give the rows of the cast values; those in bfloat16 stay as they are."""
    q, k, v = tensors(B, K, K)
    with torch.no_grad():
        q.mul_(3)
    source, output = flash(q, k, v, None, **CAUSAL, target_dtype=torch.bfloat16)
    assert output.dtype == torch.bfloat16
    exact, _ = flash(q.bfloat16().double(), k.bfloat16().double(), v.double(), None, **CAUSAL)
    torch.testing.assert_close(rows_of(source), rows_of(exact), atol=1e-5, rtol=0)
    unrounded, _ = flash(q, k, v, None, **CAUSAL)
    assert (rows_of(source) - rows_of(unrounded)).abs().max() > 1e-3
    beyond = 2.0**17  # the largest float16 is smaller
    given, _ = flash(q.bfloat16() * beyond, k.bfloat16() / beyond, v.bfloat16(), None, **CAUSAL, target_dtype=torch.float16)
    torch.testing.assert_close(rows_of(given), rows_of(exact), atol=1e-5, rtol=0)


def test_causality_of_old_kernels_is_aligned_at_the_start() -> None:
    """With the top-left mask of old kernels row i sees the keys 0 to i; with padding the first i + 1 that are none."""
    q, k, _ = tensors(B, 5, K)
    source = from_flash(FlashCall(q, k, causal=True, top_left=True))
    assert torch.equal(source.visible(torch.arange(5).expand(B, 5)), torch.ones(5, K).tril().bool().expand(B, -1, -1))
    source = from_flash(FlashCall(q, k, mask_BM=mask_of("11111111", "01111111"), causal=True, top_left=True))
    seen = source.visible(torch.arange(5).expand(B, 5))[1]
    assert seen.int().tolist() == [[0, *(int(j <= i) for j in range(7))] for i in range(5)]
    square = [from_flash(FlashCall(k.repeat_interleave(2, 2), k, mask_BM=LEFT, causal=True, top_left=old)) for old in (False, True)]
    assert torch.equal(*(part.visible(torch.arange(K).expand(B, K)) for part in square))


@pytest.mark.parametrize(
    ("more", "why"),
    [
        ({"paged": True}, "cache of its own"),
        ({"mask_BM": torch.ones(B, 3)}, "3 places for 5 queries"),
        ({"cu_seq_lens": (torch.tensor([0, 5]), torch.tensor([0, 8]))}, "batch of 2"),
    ],
)
def test_flash_calls_that_cannot_be_read_say_why(more: dict[str, Any], why: str) -> None:
    """A paged call, a mask shorter than the queries and lengths over several rows are named, not guessed."""
    q, k, _ = tensors(B, 5, K)
    with pytest.raises(NotObservable, match=why):
        from_flash(FlashCall(q, k, **more))


def test_positions_that_count_only_if_they_fall() -> None:
    """Where a version asks for a fall in the positions, repeated ones alone pack nothing."""
    q, k, _ = tensors(1, K, K)
    for position_ids, sequences in ((torch.tensor([[0, 0, 0, 1, 2, 3, 4, 5]]), 1), (PACKED, 3)):
        source = from_flash(FlashCall(q, k, position_ids=position_ids, if_decreasing=True))
        assert source.scores.segment_BS is not None
        assert source.scores.segment_BS.unique().numel() == sequences
        source = from_flash(FlashCall(q, k, position_ids=position_ids))
        assert source.scores.segment_BS is not None
        assert source.scores.segment_BS.unique().numel() == 3


@SINCE_4_55
def test_what_the_kernel_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """A block table means a paged call; where transformers has no rule of its own for a kernel, the documented one holds."""
    q, k, v = tensors(1, K, K)
    arguments = (q, k, v, None, K, True)
    flash_stand_in.install(monkeypatch)
    assert flash_call(utils._flash_attention_forward, arguments, {"block_table": torch.zeros(1)}).paged
    plain = flash_call(utils._flash_attention_forward, arguments, WINDOW)
    assert not plain.paged
    monkeypatch.setattr(utils, "_process_flash_kwargs_fn", dict)
    told = flash_call(utils._flash_attention_forward, arguments, WINDOW)
    assert (told.causal, told.window) == (plain.causal, plain.window) == (True, (2 + WINDOW_EXCESS,) * 2)


def test_positions_of_several_axes_are_not_taken_for_packing() -> None:
    """Positions with an axis of their own (height, width) are named."""
    q, k, _ = tensors(1, K, K)
    with pytest.raises(NotObservable, match="position_ids of shape"):
        from_flash(FlashCall(q, k, position_ids=torch.zeros(3, 1, K)))


# ---------------------------------------------------------------------------------------------------------------- flex attention


def flex_kernel() -> Kernel:
    return Kernel("flex_attention", "flex", flex_integration.flex_attention_forward)


@pytest.fixture
def eager_flex(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Run torch's own flex attention uncompiled, and note which tap is entered meanwhile."""
    from torch.nn.attention.flex_attention import flex_attention

    taps: list[Any] = []

    def run(query: Tensor, key: Tensor, value: Tensor, training: bool = False, **options: Any) -> Any:
        taps.append(innermost(AttentionTap))
        return flex_attention(query.detach(), key.detach(), value.detach(), **options)  # it cannot train on a CPU

    name = "compile_friendly_flex_attention" if VERSION >= (4, 50) else "flex_attention"
    monkeypatch.setattr(flex_integration, name, run)
    return taps


def block_mask(function: Callable[..., Tensor], queries: int = K, keys: int = K) -> Any:
    from torch.nn.attention.flex_attention import create_block_mask

    return create_block_mask(function, B, None, queries, keys, device="cpu")


def padded_causal(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
    return (q >= k) & LEFT.bool()[b, k]


def banded(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
    return (q - k).abs() < 2 + h % 2


SEGMENTS = torch.tensor([[0, 0, 0, 1, 1, 2, 2, 2], [0, 1, 1, 1, 1, 1, 1, 2]])


def packed(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
    return (q >= k) & (SEGMENTS[b, q] == SEGMENTS[b, k])


@SINCE_4_48
@pytest.mark.parametrize("function", [padded_causal, banded, packed])
@pytest.mark.parametrize("options", [{}, {"softcap": 1.5, "scaling": 1.0}])
def test_flex_with_a_block_mask(function: Callable[..., Tensor], options: dict[str, Any], eager_flex: list[Any]) -> None:
    """The rows are flex attention's weights under the mask's own function; the tap's function mode is left while it runs."""
    if VERSION < (4, 50):
        pytest.skip("this transformers gives flex attention no block mask")
    q, k, v = (part.transpose(1, 2) for part in tensors(B, K, K))
    (source,), errors, (output, *_) = tapped(flex_kernel(), nn.Module(), q, k, v, block_mask(function), **options)
    assert errors == []
    assert eager_flex == [None]
    assert_weights(source, output)


@SINCE_4_48
def test_flex_with_an_added_mask(eager_flex: list[Any]) -> None:
    """An added 4-D mask counts with its first head only, and keys of the mask beyond the call's are cut off."""
    q, k, v = (part.transpose(1, 2) for part in tensors(B, 5, K))
    mask = torch.randn(B, 1, 5, K + 2)
    mask[0, 0, :, 2] = torch.finfo(torch.float32).min
    mask = torch.cat((mask, torch.zeros_like(mask)), 1)
    (source,), errors, (output, *_) = tapped(flex_kernel(), nn.Module(), q, k, v, mask, scaling=0.5)
    assert errors == []
    assert_weights(source, output)
    (source,), _, (output, *_) = tapped(flex_kernel(), nn.Module(), q, k, v, attention_mask=None)
    assert_weights(source, output)


@pytest.mark.skipif(VERSION < (5, 0), reason="this transformers has no position bias")
def test_flex_with_a_position_bias(eager_flex: list[Any]) -> None:
    """A position bias is added for each head."""
    q, k, v = (part.transpose(1, 2) for part in tensors(B, K, K))
    bias = torch.randn(B, H, K, K)
    (source,), _, (output, *_) = tapped(flex_kernel(), nn.Module(), q, k, v, block_mask(padded_causal), position_bias=bias)
    assert_weights(source, output)


@SINCE_4_48
def test_flex_masks_that_do_not_tell_what_they_hide(eager_flex: list[Any]) -> None:
    """A bool mask (added as 0 and 1) and a block mask without a function are named."""
    q, k, v = (part.transpose(1, 2) for part in tensors(B, K, K))
    assert "as 0 and 1" in reason_of(flex_kernel(), nn.Module(), q, k, v, torch.ones(B, 1, K, K).bool())
    if VERSION >= (4, 50):
        from torch.nn.attention.flex_attention import BlockMask

        counts, indices = torch.ones(B, 1, 1, dtype=torch.int32), torch.zeros(B, 1, 1, 1, dtype=torch.int32)
        mask = BlockMask.from_kv_blocks(counts, indices, BLOCK_SIZE=128, seq_lengths=(K, K))
        assert "without a function" in reason_of(flex_kernel(), nn.Module(), q, k, v, mask)


# ------------------------------------------------------------------------------------------------------------ registered kernels


def blind_attention(scale_by: float = 1.0) -> Callable[..., Any]:
    """Return a kernel of the interface's documented convention that no function mode sees into; ``scale_by`` makes it lie."""

    def attention(
        module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, scaling: Any = None, dropout: Any = 0.0, **more: Any
    ) -> tuple[Tensor, None]:
        def compute(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            mask, causal = attention_mask, False
            if mask is None or mask.dim() == 2:
                causal = more.get("is_causal", getattr(module, "is_causal", False))
                shape = (q.shape[2], k.shape[2])
                may = torch.ones(shape).tril(shape[1] - shape[0]).bool() if causal else torch.ones(shape).bool()
                mask = may if mask is None else may & mask[:, None, None, :].bool()
            scale = (q.shape[3] ** -0.5 if scaling is None else scaling) * scale_by
            return F.scaled_dot_product_attention(q, k, v, mask, scale=scale, enable_gqa=True).transpose(1, 2).nan_to_num()

        return flash_stand_in.Blind.apply(compute, query, key, value), None

    return attention


def unknown(function: Callable[..., Any], name: str = "my_kernel", convention: Convention = "interface") -> Kernel:
    return Kernel(name, convention, function)


MASKS: dict[str, tuple[int, Any, dict[str, Any]]] = {
    "none, causal module": (K, None, {}),
    "none, not causal by keyword": (K, None, {"is_causal": False}),
    "none, fewer queries": (5, None, {"scaling": 0.9}),
    "2-D": (K, LEFT, {}),
    "4-D bool": (5, torch.rand(B, 1, 5, K, generator=torch.Generator().manual_seed(3)) > 0.4, {}),
    "4-D added": (5, torch.randn(B, H, 5, K, generator=torch.Generator().manual_seed(3)), {}),
}


@pytest.mark.parametrize("case", MASKS)
def test_an_honest_registered_kernel_is_measured_and_agrees(case: str) -> None:
    """A kernel that keeps the interface's convention is measured; its output agrees with the rows to rounding."""
    queries, mask, options = MASKS[case]
    q, k, v = (part.transpose(1, 2) for part in tensors(B, queries, K))
    module = SimpleNamespace(is_causal=True)
    (source,), errors, (output, _) = tapped(unknown(blind_attention()), module, q, k, v, mask, **options, dropout=0.0)
    assert errors == []
    assert isinstance(source, CheckedRows)
    every_row = torch.arange(queries).expand(B, queries)
    assert source.check.mismatch(source, every_row) < 1e-5
    kept = (mask.bool() if case == "2-D" else torch.ones(B, queries, dtype=torch.bool))[:, None, :, None]
    p = together(source, every_row).p_BHRK
    torch.testing.assert_close(p * kept, output.transpose(1, 2) * kept, atol=1e-6, rtol=0)


@pytest.mark.parametrize("case", MASKS)
def test_a_kernel_that_does_something_else_is_found_out(case: str) -> None:
    """A kernel that scales otherwise than it was told differs from the rows by far more than rounding."""
    queries, mask, options = MASKS[case]
    q, k, v = (part.transpose(1, 2) for part in tensors(B, queries, K))
    (source,), _, _ = tapped(unknown(blind_attention(1.5)), SimpleNamespace(is_causal=True), q, k, v, mask, **options)
    assert isinstance(source, CheckedRows)
    assert source.check.mismatch(source, torch.arange(queries).expand(B, queries)) > 0.05


def test_a_registered_kernel_with_window_softcap_sinks_and_bias() -> None:
    """What the interface documents beside the mask is taken from the call."""
    q, k, v = (part.transpose(1, 2) for part in tensors(1, K, K))
    bias, sinks = torch.randn(1, H, K, K), torch.randn(H)

    def attention(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **more: Any) -> tuple[Tensor, None]:
        scores = torch.einsum("bhsd,bhkd->bhsk", query, key.repeat_interleave(2, 1)) * more["scaling"]
        scores = more["softcap"] * torch.tanh(scores / more["softcap"]) + more["position_bias"]
        side = more["sliding_window"] - 1 + WINDOW_EXCESS
        may = torch.ones(K, K).tril().triu(-side).bool()
        scores = torch.cat((scores.masked_fill(~may, float("-inf")), more["s_aux"][None, :, None, None].expand(1, H, K, 1)), -1)
        return (scores.exp() / scores.exp().sum(-1, keepdim=True))[..., :K].transpose(1, 2), None

    options = {"scaling": 0.8, "softcap": 2.0, "sliding_window": 3, "position_bias": bias, "s_aux": sinks}
    (source,), errors, (output, _) = tapped(unknown(attention), SimpleNamespace(is_causal=True), q, k, v, None, **options)
    assert errors == []
    assert isinstance(source, CheckedRows)
    assert source.sinks == 1
    assert_weights(source, output)
    assert source.check.mismatch(source, torch.arange(K)[None]) < 1e-5


@pytest.mark.parametrize("lengths", [False, True])
def test_a_registered_kernel_for_packed_sequences(lengths: bool) -> None:
    """Without a mask, positions and lengths tell packed sequences as they tell flash attention; a 4-D mask is taken as it is."""
    q, k, v = (part.transpose(1, 2) for part in tensors(1, K, K))
    ends = torch.tensor([0, 3, 5, 8])
    packing = {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends} if lengths else {"position_ids": PACKED}
    segment = torch.tensor([0, 0, 0, 1, 1, 2, 2, 2])
    block = segment[:, None].eq(segment).tril()[None, None]

    def attention(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **more: Any) -> tuple[Tensor, None]:
        return blind_attention()(module, query, key, value, block if mask is None else mask)

    module = SimpleNamespace(is_causal=True)
    (source,), errors, (output, _) = tapped(unknown(attention), module, q, k, v, None, softcap=0.0, **packing)
    assert errors == []
    assert_weights(source, output)
    full = torch.ones(1, 1, K, K).bool()
    (source,), errors, (output, _) = tapped(unknown(attention), module, q, k, v, full, sliding_window=3, **packing)
    assert errors == []
    assert_weights(source, output)


MISFITS = ((B, 3, K, K), (B, 0, K, K), (1, h, K, K), (B, h, K - 1, K))


@pytest.mark.parametrize(
    ("returns", "options", "why"),
    [
        (lambda output: (output.transpose(1, 2), None), {}, "did not return (batch, queries, heads, width)"),
        (lambda output: {"output": output}, {}, "did not return"),
        (lambda output: (output, None), {"dropout": 0.1}, "dropout 0.1"),
        (lambda output: (output, None), {"attention_mask": torch.ones(B, 5, K)}, "neither 2-D nor 4-D"),
        (lambda output: (output, None), {"attention_mask": "causal"}, "neither 2-D nor 4-D"),
        (lambda output: (output, None), {"key": torch.randn(B, h, K)}, "four dimensions"),
        *((lambda output: (output, None), {"value": torch.randn(shape)}, "do not fit") for shape in MISFITS),
    ],
)
def test_a_registered_kernel_that_cannot_be_read_is_named(returns: Any, options: dict[str, Any], why: str) -> None:
    """A result, a mask or shapes that are not the interface's, and dropout, are named with the kernel."""
    q, k, v = (part.transpose(1, 2) for part in tensors(B, 5, K))
    kernel = unknown(lambda module, query, key, value, attention_mask, **more: returns(torch.zeros(B, 5, H, K)), "their_kernel")
    given = {"module": nn.Module(), "query": q, "key": k, "value": v, "attention_mask": None, **options}
    reason = reason_of(kernel, **given)
    assert "'their_kernel'" in reason
    assert why in reason


def test_a_paged_kernel_is_named() -> None:
    """A kernel that keeps keys and values in a cache of its own is named."""
    reason = reason_of(unknown(lambda *args, **kwargs: (None, None), "paged_attention", "paged"), nn.Module(), None, None, None, None)
    assert "'paged_attention'" in reason
    assert "cache of its own" in reason


# ---------------------------------------------------------------------------------------------------------------------- the seam


def test_the_first_to_deliver_wins_a_call() -> None:
    """A kernel that calls what is seen anyway, or another watched kernel, is reported once, by the innermost."""
    q, k, v = (part.transpose(1, 2) for part in tensors(B, K, K))

    def visible_inside(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **more: Any) -> Any:
        return F.scaled_dot_product_attention(query, key, value, scale=0.3, enable_gqa=True).transpose(1, 2), None

    (source,), errors, _ = tapped(unknown(visible_inside), nn.Module(), q, k, v, None)
    assert isinstance(source, FromScores)
    assert source.scores.scale == 0.3

    def watched_inside(*args: Any, **kwargs: Any) -> Any:
        return run_kernel(unknown(blind_attention(), "inner"), args, {**kwargs, "scaling": 0.4})

    (source,), errors, _ = tapped(unknown(watched_inside, "outer"), nn.Module(), q, k, v, None)
    assert errors == []
    assert isinstance(source, CheckedRows)
    assert source.rows.scores.scale == 0.4


def test_the_kernels_result_and_errors_pass() -> None:
    """The caller gets the very object that the kernel returned, and its exception; without a tap nothing else happens."""
    answer = object()
    kernel = unknown(lambda *args, **kwargs: answer)
    assert run_kernel(kernel, (), {}) is answer
    _, errors, result = tapped(kernel)
    assert result is answer
    assert "'my_kernel'" in str(errors[0])

    def broken(*args: Any, **kwargs: Any) -> Any:
        raise ZeroDivisionError("in the kernel")

    for convention in ("interface", "flex"):
        with pytest.raises(ZeroDivisionError, match="in the kernel"):
            tapped(unknown(broken, convention=convention))  # type: ignore[arg-type]
        assert innermost(AttentionTap) is None


def test_nothing_is_reported_while_compile_traces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Inside a trace of ``torch.compile`` the kernel runs and nothing else."""
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    sources, errors, result = tapped(unknown(lambda: 7))
    assert (sources, errors, result) == ([], [], 7)
