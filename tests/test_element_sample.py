"""The fixed sample of elements: shared out evenly, without preference for a column, the same each time, taken in one operation."""

from __future__ import annotations

import random

import pytest
import torch

from probe.measure.element_sample import Spot, can_take, choose_spots, elements, share_out, take
from waiting import NoWaiting

pytestmark = pytest.mark.pure  # of torch and probe alone: the same with every transformers


@pytest.mark.parametrize("seed", range(20))
def test_shares(seed: int) -> None:
    """Shares never exceed sizes nor, together, the bound; whoever gets less than its size gets no less than anybody else (but one)."""
    draw = random.Random(seed)
    sizes = [draw.choice([0, 1, 5, 100, 10_000]) + draw.randrange(5) for _ in range(draw.randrange(1, 30))]
    most = draw.choice([0, 3, 50, 3_000, 1_000_000])
    shares = share_out(sizes, most)
    assert all(0 <= share <= size for share, size in zip(shares, sizes))
    assert sum(shares) == min(most, sum(sizes))
    short = [share for share, size in zip(shares, sizes) if share < size]
    assert not short or min(short) >= max(shares) - 1


@pytest.mark.parametrize("seed", range(20))
def test_spots_lie_in_their_tensors(seed: int) -> None:
    """Positions are distinct, inside the tensor, spread over all of it, and no more in all than the bound."""
    draw = random.Random(seed)
    sizes = [draw.choice([1, 7, 64, 1_000, 65_536, 1_000_003]) for _ in range(draw.randrange(1, 12))]
    groups = [draw.randrange(3) for _ in sizes]
    most = draw.choice([10, 200, 5_000])
    spots = choose_spots(sizes, groups, most=most)
    assert spots == choose_spots(sizes, groups, most=most)
    assert sum(spot.count for spot in spots) <= most
    for size, spot in zip(sizes, spots):
        positions = [spot.offset + spot.stride * index for index in range(spot.count)]
        assert all(0 <= position < size for position in positions)
        if spot.count > 1:
            assert positions[0] < spot.stride
            assert size - positions[-1] <= spot.stride


def test_groups_are_treated_alike() -> None:
    """A group of one large tensor gets as many elements as one of many small ones together, nearly."""
    sizes = [1_000_003] + [10_007] * 10
    spots = choose_spots(sizes, [0] + [1] * 10, most=4_000)
    large, small = spots[0].count, sum(spot.count for spot in spots[1:])
    assert 1_900 < large <= 2_000
    assert 1_900 < small <= 2_000


def test_no_column_is_preferred() -> None:
    """In a matrix the columns that are sampled are as many as the sample allows, whatever the width."""
    for rows, columns in ((512, 512), (768, 3_072), (1_024, 96), (4_096, 1_024)):
        (spot,) = choose_spots([rows * columns], [0], most=2_000)
        seen = {(spot.offset + spot.stride * index) % columns for index in range(spot.count)}
        assert len(seen) == min(columns, spot.count)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.complex64])
def test_what_is_taken_is_what_is_there(dtype: torch.dtype) -> None:
    """Values are those at the chosen places of memory, exactly, in float64, tensor after tensor; also of transposed and sliced ones."""
    torch.manual_seed(0)
    base = torch.randn(40, 30).to(dtype)
    tensors = [base, torch.randn(13).to(dtype), base.t(), base[3:17], torch.randn(()).to(dtype), torch.empty(0, dtype=dtype)]
    spots = choose_spots([elements(tensor) for tensor in tensors], range(len(tensors)), most=500)
    expected = []
    for tensor, spot in zip(tensors, spots):
        assert can_take(tensor)
        flat = torch.view_as_real(tensor) if dtype.is_complex else tensor
        memory = flat.permute(sorted(range(flat.dim()), key=flat.stride, reverse=True)).reshape(-1)
        expected += [memory[spot.offset + spot.stride * index].double() for index in range(spot.count)]
    taken = take(tensors, spots)
    assert taken.dtype == torch.float64
    assert torch.equal(taken, torch.stack(expected))


@pytest.mark.filterwarnings("ignore:Sparse CSR")
def test_what_strides_do_not_reach_is_told() -> None:
    """A tensor with gaps in memory, an expanded one and a sparse one cannot be taken."""
    x = torch.randn(6, 8)
    assert can_take(x)
    assert can_take(x.t())
    assert can_take(x[2:4])
    assert not can_take(x[:, ::2])
    assert not can_take(x[:1].expand(3, 8))
    assert not can_take(x.to_sparse())
    assert not can_take(x.to_sparse_csr())


def test_mixed_dtypes_stay_exact() -> None:
    """bfloat16 beside float32 is widened, not narrowed."""
    wide, narrow = torch.tensor([1.0000001, 3.0]), torch.tensor([1.0078125], dtype=torch.bfloat16)
    taken = take([wide, narrow], [Spot(2, 1, 0), Spot(1, 1, 0)])
    assert torch.equal(taken, torch.tensor([1.0000001, 3.0], dtype=torch.float32).double().new_tensor([*wide.double(), 1.0078125]))


def test_views_and_one_concatenation() -> None:
    """A hundred tensors cost views, one concatenation and one conversion; nothing waits."""
    tensors = [torch.empty(50, 7, device="meta") for _ in range(100)]
    spots = choose_spots([350] * 100, range(100), most=1_000)
    with NoWaiting() as mode:
        take(tensors, spots)
    assert mode.operators == 100 + 2  # as_strided is a view
