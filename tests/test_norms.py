"""The squared norm of many tensors, and the private names of torch it stands on."""

from __future__ import annotations

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from costs import peak_mib
from probe.errors import ProbeValueError
from probe.foreign.torch_private import foreach_norm, in_backward, loss_scale
from probe.measure.norms import add_norms, norm_of, squares_by_group

pytestmark = pytest.mark.pure  # of torch and probe alone: the same with every transformers


def total_of(tensors: list[torch.Tensor]) -> torch.Tensor:
    """Return the squares of all tensors, as one group."""
    squares, nonfinite = squares_by_group(tensors, [0] * len(tensors), 1)
    assert squares.shape == nonfinite.shape == (1,)
    return squares[0]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.complex64])
def test_agrees_with_float64(dtype: torch.dtype) -> None:
    """Tensors of all shapes, an empty and a strided one among them, give the sum that float64 gives."""
    torch.manual_seed(1)
    tensors = [torch.randn(shape, dtype=torch.float32).to(dtype) for shape in [(7,), (300, 500), (), (0, 3), (1000, 3)]]
    tensors += [torch.randn(400, 300).to(dtype)[:, ::2], torch.randn(400, 300).to(dtype).t()]
    expected = sum(tensor.abs().double().square().sum().item() for tensor in tensors)
    total = total_of(tensors)
    assert total.dtype == torch.float64
    assert total.shape == ()
    assert total.item() == pytest.approx(expected, rel=1e-6)


def test_dtypes_mix() -> None:
    """Gradients of several dtypes are one norm."""
    tensors = [torch.full((3,), 2.0), torch.full((5,), 3.0, dtype=torch.bfloat16), torch.full((2,), 4.0, dtype=torch.float64)]
    assert total_of(tensors).item() == pytest.approx(12 + 45 + 32, rel=1e-6)


@pytest.mark.parametrize("seed", range(3))
def test_groups(seed: int) -> None:
    """Each group has the squares of its own tensors, in whatever order they come, large ones among them; an empty one has none."""
    torch.manual_seed(seed)
    tensors = [
        torch.randn(torch.randint(1, 100_000, ()).item()).to(torch.bfloat16 if index % 3 == 0 else torch.float32) for index in range(9)
    ]
    groups = [int(group) for group in torch.randint(0, 4, (9,))]
    squares, nonfinite = squares_by_group(tensors, groups, 6)
    for group in range(6):
        expected = sum(float(x.double().square().sum()) for x, mine in zip(tensors, groups) if mine == group)
        assert squares[group].item() == pytest.approx(expected, rel=1e-6)
    assert nonfinite.tolist() == [0] * 6


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_is_counted_and_left_out(bad: float) -> None:
    """One bad element marks its group; squares are those of the other tensors, and the other groups know nothing of it."""
    tensors = [torch.full((3,), 2.0), torch.tensor([1.0, bad]), torch.full((5,), 3.0)]
    squares, nonfinite = squares_by_group(tensors, [1, 1, 0], 2)
    assert squares.tolist() == pytest.approx([45, 12])
    assert nonfinite.tolist() == [0, 1]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.complex64])
def test_norm_of_one(dtype: torch.dtype) -> None:
    """The norm of one tensor, large, strided or empty, is that of float64."""
    torch.manual_seed(6)
    for x in (torch.randn(300_000), torch.randn(200, 30)[:, ::3], torch.empty(0), torch.tensor(3.0)):
        assert norm_of(x.to(dtype)).item() == pytest.approx(x.to(dtype).abs().double().norm().item(), rel=1e-6)
    assert norm_of(torch.tensor([1.0, float("nan")])).isnan()


def test_norms_of_several_dtypes_are_added() -> None:
    """Where norms come in float32 and float64, none is narrowed."""
    norms = [torch.tensor(3.0), torch.tensor(1 / 3, dtype=torch.float64)]
    assert add_norms(norms, [0, 1], 2).tolist() == [[9.0, (1 / 3) ** 2], [0.0, 0.0]]


def test_equals_the_norm_that_clipping_reports() -> None:
    """The root is the number that ``clip_grad_norm_`` returns."""
    torch.manual_seed(2)
    model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Linear(64, 3))
    model(torch.randn(8, 64)).square().sum().backward()
    ours = total_of([parameter.grad for parameter in model.parameters()]).sqrt().item()
    assert ours == pytest.approx(torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0).item(), rel=1e-6)


def test_many_elements() -> None:
    """Over 20 million float32 elements, where torch's own norm on a CPU is 3e-4 off, no accuracy is lost."""
    torch.manual_seed(3)
    x = torch.rand(20_000_000)
    assert total_of([x]).item() == pytest.approx(x.double().square().sum().item(), rel=1e-6)


def test_no_tensor_is_an_error() -> None:
    """An empty list has no norm, and a sparse gradient is named."""
    with pytest.raises(ProbeValueError, match="at least one"):
        squares_by_group([], [], 1)
    with pytest.raises(ProbeValueError, match="sparse"):
        total_of([torch.eye(3).to_sparse()])


def test_memory_is_bounded() -> None:
    """A large bf16 gradient is not widened whole."""
    x = torch.zeros(32 << 20, dtype=torch.bfloat16)
    assert peak_mib(lambda: total_of([x])) < 1


def test_no_sync() -> None:
    """On a device whose values the host cannot read, nothing is read."""
    assert total_of([torch.empty(5, device="meta"), torch.empty(7, device="meta")]).shape == ()


def test_devices_mix() -> None:
    """Tensors on the CPU and on a device meet on the device: the way there need not wait, the way back would."""
    assert total_of([torch.ones(3), torch.empty(7, device="meta")]).device.type == "meta"


def test_foreach_norm_widens_narrow_floats() -> None:
    """A bf16 norm would be 0.4 % coarse."""
    torch.manual_seed(4)
    x = torch.randn(4097).bfloat16()
    assert foreach_norm([x])[0].item() == pytest.approx(x.double().norm().item(), rel=1e-6)
    assert foreach_norm([torch.ones(4)])[0].dtype == torch.float32


@pytest.mark.parametrize("reentrant", [True, False])
def test_in_backward_tells_recompute_from_forward(reentrant: bool) -> None:
    """False in a forward, true in the recompute of a checkpoint and in a gradient hook, false after."""
    seen: list[bool] = []

    def layer(x: torch.Tensor) -> torch.Tensor:
        seen.append(in_backward())
        return x.sin()

    x = torch.ones(3, requires_grad=True)
    x.register_hook(lambda gradient: seen.append(in_backward()))
    checkpoint(layer, x, use_reentrant=reentrant).sum().backward()
    assert seen == [False, True, True]
    assert not in_backward()


def test_loss_scale() -> None:
    """The scale once the scaler was used; None without one, before its first use, and for a disabled one."""
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    assert loss_scale(None) is None
    assert loss_scale(scaler) is None
    scaler.scale(torch.ones(()))
    scale = loss_scale(scaler)
    assert scale is not None
    assert scale.item() == 1024.0
    assert loss_scale(torch.amp.GradScaler("cpu", enabled=False)) is None
