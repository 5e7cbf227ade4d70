"""Spread over time and over the batch: as float64 has it, exactly 0 where an encoder has collapsed."""

from __future__ import annotations

import pytest
import torch

from costs import kernels, peak_mib
from probe.errors import ProbeValueError
from probe.measure import spread as module
from probe.measure.spread import spread, standard_deviation

pytestmark = pytest.mark.pure  # of torch and probe alone: the same with every transformers


@pytest.fixture(params=["the host's way", "the devices' way"])
def _both_ways(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run a test as on the CPU and as on any other device."""
    if request.param != "the host's way":
        monkeypatch.setattr(module, "_host_sums", lambda x_BTD: None)


def reference(x: torch.Tensor) -> tuple[float, float]:
    wide = x.double()
    return wide.var(1, correction=0).sum().item(), wide.var(0, correction=0).sum().item()


@pytest.mark.usefixtures("_both_ways")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("mean", [0.0, 1000.0])
def test_agrees_with_float64(dtype: torch.dtype, mean: float) -> None:
    """Both sums agree with float64 variances, at a mean of 1000 standard deviations too."""
    torch.manual_seed(1)
    x = (torch.randn(4, 50, 24, dtype=torch.float64) + mean).to(dtype)
    sums, counts = spread(x)
    assert sums.dtype == torch.float64
    assert sums.tolist() == pytest.approx(reference(x), rel=1e-5)
    assert counts == (4 * 24, 50 * 24)


@pytest.mark.usefixtures("_both_ways")
def test_first_frame_far_off() -> None:
    """A first frame far from all others, which everything is compared with, costs no accuracy."""
    torch.manual_seed(2)
    x = torch.randn(3, 40, 8)
    x[:, 0] += 1e4
    x[0] += 1e3
    assert spread(x)[0].tolist() == pytest.approx(reference(x), rel=1e-5)


@pytest.mark.usefixtures("_both_ways")
def test_identical_frames_are_exactly_zero() -> None:
    """Identical frames of different clips: 0 over time and not over the batch; identical clips: the other way round."""
    torch.manual_seed(3)
    frames = (torch.randn(5, 1, 16) * 0.1 + 7).expand(5, 333, 16).contiguous()
    clips = (torch.randn(1, 20, 16) * 0.1 + 7).expand(3, 20, 16).contiguous()
    assert spread(frames)[0][0].item() == spread(frames[:, :1].expand(5, 333, 16))[0][0].item() == 0.0
    assert spread(frames)[0][1].item() > 0
    assert spread(clips)[0][1].item() == 0.0
    assert spread(clips)[0][0].item() > 0


@pytest.mark.usefixtures("_both_ways")
def test_two_dimensions_are_one_clip() -> None:
    """(T, D) is one clip: measured over time, not over the batch."""
    torch.manual_seed(4)
    x = torch.randn(30, 6)
    sums, counts = spread(x)
    assert counts == (6, 0)
    assert sums.tolist() == pytest.approx([x.double().var(0, correction=0).sum().item(), 0.0], rel=1e-5)


@pytest.mark.parametrize(
    ("shape", "counts"), [((1, 1, 4), (0, 0)), ((0, 5, 4), (0, 0)), ((3, 1, 4), (0, 4)), ((2, 0, 4), (0, 0)), ((2, 5, 0), (0, 0))]
)
def test_nothing_to_compare(shape: tuple[int, ...], counts: tuple[float, float]) -> None:
    """Without two frames (two clips) there is no row, and the sum is 0."""
    sums, found = spread(torch.ones(shape))
    assert found == counts
    assert sums.tolist() == [0, 0]


def test_wrong_rank_is_an_error() -> None:
    """Four dimensions are no (batch, time, width): the message names the shape."""
    with pytest.raises(ProbeValueError, match=r"\(2, 3, 4, 5\)"):
        spread(torch.ones(2, 3, 4, 5))


@pytest.mark.parametrize("limit", [1, 30, 100, 1000])
def test_chunks_do_not_matter(monkeypatch: pytest.MonkeyPatch, limit: int) -> None:
    """However small the chunk, cut along the rows or along the width, the sums are the same."""
    torch.manual_seed(5)
    x = torch.randn(6, 9, 10)
    monkeypatch.setattr(module, "_host_sums", lambda x_BTD: None)
    monkeypatch.setattr(module, "per_chunk", lambda item_bytes: limit)
    assert spread(x)[0].tolist() == pytest.approx(reference(x), rel=1e-5)


@pytest.mark.parametrize("batch", [1, 2, 3, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_any_number_of_clips(batch: int, dtype: torch.dtype) -> None:
    """Both sums agree with float64 for one clip and for many, of a tensor that is contiguous and of one that is not."""
    torch.manual_seed(7)
    x = (torch.randn(batch, 30, 48) * torch.rand(48) + 5).to(dtype)
    for values in (x, x[:, 1:], x.transpose(1, 2).contiguous().transpose(1, 2)):
        sums, (_, batch_rows) = spread(values)
        time, over_batch = reference(values)
        assert sums.tolist() == pytest.approx([time, over_batch if batch_rows else 0.0], rel=1e-5)


def test_collapsed_but_for_rounding() -> None:
    """Frames that differ by one unit in the last place have the spread that float64 says, not that of a rounded mean."""
    x = torch.full((3, 100, 16), 1.1)
    x[:, ::7] = torch.nextafter(x[:, ::7], torch.tensor(2.0))
    x[1, :, ::3] = torch.nextafter(x[1, :, ::3], torch.tensor(2.0))
    assert spread(x)[0].tolist() == pytest.approx(reference(x), rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_memory_is_bounded(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """A tensor of 96 MiB is worked through with a few chunks of 8 MiB."""
    x = torch.zeros(8, 3000, 1024)
    assert peak_mib(lambda: spread(x)) < 17
    y = torch.randn(3, 1700, 512).to(dtype)
    assert peak_mib(lambda: spread(y)) < 17
    monkeypatch.setattr(module, "_host_sums", lambda x_BTD: None)
    assert peak_mib(lambda: spread(y)) < 17


def test_few_operations() -> None:
    """On the CPU two operations that launch work over time, one over two clips, one and one a clip over more."""
    torch.manual_seed(8)
    for batch, budget in ((1, 2), (2, 3), (8, 2 + 9)):
        x = torch.randn(batch, 150, 38)
        assert kernels(lambda x=x: spread(x)) <= budget


def test_few_operations_off_the_host() -> None:
    """On another device a tensor of one chunk costs six operations each way."""
    for batch, frames, budget in ((2, 1500, 13), (1, 1500, 7), (2, 1, 7)):
        x = torch.empty(batch, frames, 384, device="meta")
        assert kernels(lambda x=x: spread(x)) <= budget


@pytest.mark.usefixtures("_both_ways")
def test_tiny_and_large_values() -> None:
    """Values far from 1, near the borders of what float32 squares can be, have their spread, too."""
    torch.manual_seed(6)
    for scale in (1e-17, 1e17):
        x = torch.randn(3, 40, 8) * scale
        assert spread(x)[0].tolist() == pytest.approx(reference(x), rel=1e-5)


def test_no_sync() -> None:
    """On a device whose values the host cannot read, nothing is read."""
    sums, counts = spread(torch.empty(2, 8, 4, device="meta"))
    assert sums.shape == (2,)
    assert counts == (8, 32)


@pytest.mark.usefixtures("_both_ways")
def test_nan_stays_visible() -> None:
    """NaN gives NaN, which finishes as unknown; finite sums finish as the root of the mean."""
    x = torch.zeros(2, 3, 4)
    x[0, 0, 0] = torch.nan
    variance = spread(x)[0][0].item()
    assert variance != variance
    assert standard_deviation(variance, 8) is None
    assert standard_deviation(8.0, 2) == 2.0
    assert standard_deviation(0.0, 0) is None
