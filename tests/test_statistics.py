"""Statistics of a tensor: as exact as float64, for any dtype, strides and size, in bounded memory."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from costs import kernels, peak_mib
from probe.measure import statistics
from probe.measure.chunks import blocks, pieces
from probe.measure.statistics import COLUMNS_MAXIMA, COLUMNS_SUMS, Moments, finish, summarise

pytestmark = pytest.mark.pure  # of torch and probe alone: the same with every transformers

FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
OTHERS = (torch.int64, torch.int32, torch.uint8, torch.bool, torch.complex64, torch.float8_e4m3fn)


def measured(x: Tensor) -> Moments:
    sums, maxima = summarise(x)
    assert sums.dtype == maxima.dtype == torch.float64
    assert sums.shape == (3,)
    assert maxima.shape == (2,)
    count = x.numel() * (2 if x.is_complex() else 1)
    return finish(count, dict(zip(COLUMNS_SUMS, sums.tolist(), strict=True)), dict(zip(COLUMNS_MAXIMA, maxima.tolist(), strict=True)))


def assert_exact(x: Tensor, moments: Moments) -> None:
    """Compare with two passes in float64."""
    wide = (torch.view_as_real(x) if x.is_complex() else x).double()
    rms = wide.square().mean().sqrt().item()
    assert moments.nonfinite == 0
    assert moments.mean == pytest.approx(wide.mean().item(), rel=1e-6, abs=1e-6 * rms)
    assert moments.rms == pytest.approx(rms, rel=1e-6)
    assert moments.std == pytest.approx(wide.std(correction=0).item(), rel=1e-6, abs=1e-6 * rms)
    assert (moments.minimum, moments.maximum) == (wide.min().item(), wide.max().item())


@pytest.mark.parametrize("dtype", FLOATS + OTHERS)
def test_every_dtype_agrees_with_float64(dtype: torch.dtype) -> None:
    """Floats, integers, booleans and complex numbers give what float64 gives."""
    torch.manual_seed(1)
    x = (torch.randn(37, 3, 53, dtype=torch.complex64) if dtype.is_complex else 20 * torch.randn(37, 3, 53).abs()).to(dtype)
    assert_exact(x, measured(x))


@pytest.mark.parametrize("dtype", FLOATS)
def test_large_mean_and_many_elements(dtype: torch.dtype) -> None:
    """With 12 million elements (not a multiple of the chunk) around a mean of 1000 standard deviations nothing is lost."""
    torch.manual_seed(2)
    x = (torch.randn(12_000_007, dtype=torch.float64) * 0.125 + 125.0).to(dtype)
    moments = measured(x)
    assert_exact(x, moments)
    assert moments.std == pytest.approx(x.double().std(correction=0).item(), rel=1e-6)


@pytest.mark.parametrize("scale", [1e-38, 1e-22, 1e22, 1e37])
def test_squares_outside_float32(scale: float) -> None:
    """Values whose squares leave float32 have an rms, too."""
    torch.manual_seed(3)
    x = torch.randn(1000) * scale
    assert_exact(x, measured(x))


def test_large_float16() -> None:
    """float16 values near its maximum do not overflow."""
    torch.manual_seed(4)
    x = (torch.rand(5000) * 60000).half()
    assert_exact(x, measured(x))


LAYOUTS = {
    "transposed": lambda x: x.transpose(0, 2),
    "sliced": lambda x: x[:, :-1],
    "strided": lambda x: x[::2, 1:, ::3],
    "expanded": lambda x: x[:1].expand(5, -1, -1),
    "one row": lambda x: x[0, 0, ::2],
    "scalar": lambda x: x[0, 0, 0],
    "unit dimensions": lambda x: x[:1].permute(2, 0, 1),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("limit", [1, 7, 64, 10_000])
def test_pieces_hold_every_element_once(layout: str, limit: int) -> None:
    """Whatever the strides, pieces hold all elements, none twice, none more than the limit."""
    x = LAYOUTS[layout](torch.arange(6 * 5 * 8).view(6, 5, 8))
    found = list(pieces(x, limit))
    assert all(piece.dim() == 1 and 0 < piece.numel() <= limit for piece in found)
    assert torch.equal(torch.cat(found).sort().values, x.reshape(-1).sort().values)


@pytest.mark.parametrize("layout", ["transposed", "unit dimensions"])
def test_dense_pieces_are_views(layout: str) -> None:
    """A tensor whose elements lie side by side in another order is not copied."""
    x = LAYOUTS[layout](torch.arange(6 * 5 * 8).view(6, 5, 8))
    assert {piece.untyped_storage().data_ptr() for limit in (7, 1000) for piece in pieces(x, limit)} == {x.untyped_storage().data_ptr()}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("rows", [1, 7, 10_000])
def test_blocks_are_the_rows_in_order(layout: str, rows: int) -> None:
    """Whatever the strides, blocks hold the rows in row-major order and say where they begin."""
    x = LAYOUTS[layout](torch.arange(6 * 5 * 8).view(6, 5, 8))
    x = x if x.dim() else x[None]
    found = list(blocks(x, rows))
    assert all(0 < block.shape[0] <= rows for _, block in found)
    assert [start for start, _ in found] == [sum(block.shape[0] for _, block in found[:i]) for i in range(len(found))]
    assert torch.equal(torch.cat([block for _, block in found]), x.reshape(-1, x.shape[-1]))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_strides_do_not_matter(layout: str) -> None:
    """A view gives what its copy gives."""
    torch.manual_seed(5)
    x = LAYOUTS[layout](torch.randn(12, 11, 40))
    assert_exact(x, measured(x))


def test_views_that_are_lazy() -> None:
    """A conjugate and a negated view, which numpy does not take, give what their copies give."""
    torch.manual_seed(13)
    x = torch.randn(40, 30, dtype=torch.complex64)
    assert_exact(x.conj().clone(), measured(x.conj()))
    assert x.conj().imag.is_neg()
    assert_exact(x.conj().imag.clone(), measured(x.conj().imag))


@pytest.mark.parametrize("shape", [(0,), (3, 0, 5)])
def test_empty(shape: tuple[int, ...]) -> None:
    """An empty tensor adds nothing and finishes as unknown."""
    sums, maxima = summarise(torch.empty(shape))
    assert sums.tolist() == [0, 0, 0]
    assert maxima.tolist() == [-math.inf, -math.inf]
    assert measured(torch.empty(shape)) == Moments()


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("values", [[math.nan], [math.inf], [-math.inf, math.inf], [math.nan, math.inf, -math.inf]])
def test_nonfinite_values_are_counted(dtype: torch.dtype, values: list[float]) -> None:
    """NaN and Inf, in the first chunk or the last, are counted exactly, nothing else is claimed, and no warning is given."""
    torch.manual_seed(6)
    x = torch.randn(1_100_000).to(dtype)
    x[: len(values)] = torch.tensor(values, dtype=dtype)
    x[-len(values) :] = torch.tensor(values, dtype=dtype)
    assert measured(x) == Moments(nonfinite=2 * len(values))


def test_off_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    """The way that a tensor goes on a device whose values the host cannot read gives the same, with and without NaN and Inf."""
    torch.manual_seed(9)
    x = torch.randn(2_200_000)
    clean = summarise(x)
    monkeypatch.setattr(statistics, "_on_host", lambda x: False)
    for ours, theirs in zip(clean, summarise(x), strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-6, atol=1e-6 * x.norm().item())
    assert_exact(x, measured(x))
    assert_exact(x.bfloat16(), measured(x.bfloat16()))
    x[::1_000_000], x[5], x[-1] = math.nan, math.inf, -math.inf
    assert measured(x) == Moments(nonfinite=5)
    assert measured(x.bfloat16()) == Moments(nonfinite=5)


def hard_cases() -> dict[str, Tensor]:
    """Return float32 tensors whose statistics a plain sum in float32 gets wrong."""
    generator = torch.Generator().manual_seed(10)
    normal = torch.randn(4000, 256, generator=generator)
    two = (torch.rand(4000, 256, generator=generator) < 0.1).float()
    channel, first = normal.clone(), normal.clone()
    channel[:, 7] *= 1e4
    first[0, 0] = 1e7
    return {
        "mean 3": normal + 3,
        "mean -10": normal - 10,
        "mean 1e6": normal + 1e6,
        "absolute": normal.abs(),
        "one channel": channel,
        "one value": first,
        "two values": two * 0.1 + 0.1,  # each rounds in the same direction every time
        "one in ten": two * 0.1,
        "all but constant": torch.full((4000, 256), 0.1).index_fill_(0, torch.tensor([9]), 0.2),
        "constant": torch.full((4000, 256), 0.1),
        "tiny around tiny": normal * 1e-22 + 1e-20,
        "huge around huge": normal * 1e30 + 1e32,
        "tiny and zero": two * 1e-13,
        "zero": torch.zeros(4000, 256),
        "mean changes": torch.cat([normal + 100, normal - 100]),
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", hard_cases())
def test_hard_cases(name: str, dtype: torch.dtype) -> None:
    """Large means, outliers, systematic rounding, constants and values whose squares leave float32 cost no accuracy."""
    x = hard_cases()[name].to(dtype)
    x = x[:, :-1] if name == "mean -10" else x  # not dense
    assert_exact(x.clamp(-60000, 60000) if dtype == torch.float16 else x, measured(x.clamp(-60000, 60000) if dtype == torch.float16 else x))


@pytest.mark.parametrize("count", [1, 255, 256, 16_384, 16_385, 16_641, 70_001])
def test_sizes_around_the_borders(count: int) -> None:
    """Rows of 256 that do not come out even, and both sides of the border between small and large, are as good."""
    torch.manual_seed(11)
    for dtype in (torch.float32, torch.bfloat16, torch.float64, torch.int32):
        x = (torch.randn(count) * 5 - 4).to(dtype)
        assert_exact(x, measured(x))


def test_a_mean_that_a_sample_does_not_show(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the few values looked at first mislead, in either direction, the result is as good: the sums are checked."""
    x = hard_cases()["all but constant"]
    for answer in (True, False):
        monkeypatch.setattr(statistics, "_looks_centred", lambda piece, mean, answer=answer: answer)
        assert_exact(x, measured(x))
        assert_exact(x.bfloat16(), measured(x.bfloat16()))


def test_columns_add_up() -> None:
    """Two halves, combined as ranks are combined, give what the whole gives."""
    torch.manual_seed(7)
    x = torch.randn(2, 500) + 3
    parts = [summarise(part) for part in x]
    sums, maxima = parts[0][0] + parts[1][0], torch.maximum(parts[0][1], parts[1][1])
    assert torch.allclose(sums, summarise(x)[0], rtol=1e-12)
    assert torch.equal(maxima, summarise(x)[1])


def test_constant_has_no_spread() -> None:
    """A constant tensor has a standard deviation of exactly 0, although 0.1 has no finite binary form."""
    assert measured(torch.full((100_003,), 0.1)).std == 0.0


def test_sum_of_squares_beyond_float64() -> None:
    """Where the squares leave float64 the mean and the range are still told, rms and std are not."""
    x = torch.tensor([1e200, -1e200, 3e200], dtype=torch.float64)
    assert measured(x) == Moments(mean=1e200, minimum=-1e200, maximum=3e200)


@pytest.mark.parametrize("mean", [0.0, 10.0])
def test_memory_is_bounded(mean: float) -> None:
    """Large tensors, of any dtype, dense or not, take less than 16 MiB, whether they have to be centred or not."""
    x = torch.full((9 * (1 << 20),), mean, dtype=torch.bfloat16)
    x[::2] += 1
    assert peak_mib(lambda: summarise(x)) < 16
    assert peak_mib(lambda: summarise(x.view(-1, 256)[:, :-1])) < 16
    y = torch.full((1500, 25, 256), mean)
    y[:, ::2] += 1
    assert peak_mib(lambda: summarise(y)) < 16
    assert peak_mib(lambda: summarise(y[:, :-1])) < 16
    assert peak_mib(lambda: summarise(y[..., :-1])) < 16


def test_memory_off_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    """On other devices as well."""
    monkeypatch.setattr(statistics, "_on_host", lambda x: False)
    x, y = torch.zeros(9 * (1 << 20), dtype=torch.bfloat16), torch.zeros(1500, 25, 256)
    assert peak_mib(lambda: summarise(x)) < 16
    assert peak_mib(lambda: summarise(y[..., :-1])) < 16


@pytest.mark.parametrize(
    ("dtype", "shape", "budget"),
    [
        (torch.float32, (8, 1500, 512), 3),
        (torch.float32, (8, 1024, 1024), 3),
        (torch.float32, (7, 11, 13), 0),
        (torch.bfloat16, (5, 1500, 512), 4),
        (torch.float16, (5, 1500, 512), 4),
        (torch.bfloat16, (7, 11, 13), 1),
        (torch.float64, (8, 1500, 512), 0),
    ],
)
def test_few_operations(dtype: torch.dtype, shape: tuple[int, ...], budget: int) -> None:
    """On the CPU a tensor costs at most four operations that launch work."""
    torch.manual_seed(12)
    x = torch.randn(shape).to(dtype)
    assert kernels(lambda: summarise(x)) <= budget


def test_more_chunks_more_operations() -> None:
    """Beyond 3.9 Mi elements of bfloat16 each chunk costs four operations; a tensor that has to be centred a few more."""
    x = torch.randn(3 * 15 * (1 << 18)).bfloat16()
    assert kernels(lambda: summarise(x)) <= 12
    assert kernels(lambda: summarise(x + 10)) <= 12 + 3 + 1  # the sum itself


def test_few_operations_off_the_host() -> None:
    """Off the CPU a chunk of 0.9 Mi float32 elements costs at most seven operations and an allocation."""
    one, four = torch.zeros(900 << 10, device="meta"), torch.zeros(3600 << 10, device="meta")
    assert kernels(lambda: summarise(one)) <= 7 + 1 + 1  # one buffer
    assert kernels(lambda: summarise(four)) <= 4 * 8 + 1 + 3  # three that put the chunks together


def test_no_sync_off_the_host() -> None:
    """On a device whose values the host cannot read, nothing is read."""
    sums, maxima = summarise(torch.empty(3, 1 << 20, device="meta"))
    assert sums.shape == (3,)
    assert maxima.shape == (2,)
    assert sums.dtype == torch.float64


def test_autocast_and_grad_leave_it_alone() -> None:
    """Inside autocast, of a tensor that needs a gradient, the result is the same and is no part of the graph."""
    torch.manual_seed(8)
    x = torch.randn(100, 100, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        sums, _ = summarise(x)
    assert not sums.requires_grad
    assert torch.equal(sums, summarise(x.detach())[0])
