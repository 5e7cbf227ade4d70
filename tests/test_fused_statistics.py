"""The fused kernel: as exact as float64 in Triton's interpreter, compiled as meant for two generations of GPUs, never an error."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from costs import kernels
from probe.capture.buffer import StepBuffer
from probe.capture.microbatch import MicroBatch
from probe.capture.observer import Call
from probe.capture.observers import statistics as observer
from probe.capture.observers.statistics import StatisticsWatcher, statistics_cell
from probe.measure import fused_statistics
from probe.measure.fused_statistics import FUSED, FusedStatistics
from probe.measure.statistics import COLUMNS_MAXIMA, COLUMNS_SUMS, Moments, finish, summarise
from probe.records import Site

pytestmark = pytest.mark.pure  # of torch and probe alone: the same with every transformers

WORKER = Path(__file__).parent / "workers" / "fused_statistics.py"
needs_triton = pytest.mark.skipif(not fused_statistics.installed(), reason="no Triton")
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


@pytest.fixture(scope="module")
def interpreted() -> Any:
    """Return what the interpreter gives: in a process of its own, since Triton must know before it is imported."""
    done = subprocess.run([sys.executable, str(WORKER)], capture_output=True, text=True, check=False, timeout=280)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def moments_of(count: int, columns: list[float]) -> Moments:
    return finish(count, dict(zip(COLUMNS_SUMS, columns[:3], strict=True)), dict(zip(COLUMNS_MAXIMA, columns[3:], strict=True)))


@needs_triton
def test_every_case_agrees_with_float64(interpreted: Any) -> None:
    """Mean and rms within 1e-6, std within 1e-6 of rms, extremes and the count of non-finite values exact, in every dtype and size."""
    for name, case in interpreted["cases"].items():
        if len(case["float64"]) == 1:
            assert case["fused"][2] == case["float64"][0], name
            continue
        found, expected = moments_of(case["count"], case["fused"]), moments_of(case["count"], case["float64"])
        assert expected.mean is not None and expected.rms is not None and expected.std is not None
        assert found.mean == pytest.approx(expected.mean, rel=1e-6, abs=1e-6 * expected.rms), name
        assert found.rms == pytest.approx(expected.rms, rel=1e-6, abs=0), name
        assert found.std == pytest.approx(expected.std, rel=0, abs=1e-6 * expected.rms), name
        assert (found.minimum, found.maximum, found.nonfinite) == (expected.minimum, expected.maximum, 0), name
    assert len(interpreted["cases"]) == 3 * 14 + 7


@needs_triton
def test_the_same_every_time(interpreted: Any) -> None:
    """A second launch gives the same to the last bit, because the counter is 0 again and the order is fixed."""
    assert interpreted["again"][0] == interpreted["again"][1]
    assert interpreted["counters"] == [0]
    assert interpreted["rounds"][0] == pytest.approx(interpreted["rounds"][1], rel=1e-14)


@needs_triton
def test_adds_to_running_columns(interpreted: Any) -> None:
    """Three parts added to one pair of vectors give what the whole gives; each call's own columns are returned as well."""
    assert interpreted["into"][0] == pytest.approx(interpreted["into"][1], rel=1e-6)
    assert interpreted["first of into"][0] == pytest.approx(interpreted["first of into"][1], rel=1e-6, abs=1e-3)


@needs_triton
def test_what_it_cannot_reduce_is_refused(interpreted: Any) -> None:
    """An empty, a strided or a wider tensor, and a subclass, are left to the other ways; that is no failure."""
    assert interpreted["refused"] == ["empty", "float64", "int", "strided", "parameter"]
    assert interpreted["failure"] is None


@needs_triton
@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize(("dtype", "loads"), [("fp32", 8), ("bf16", 4)])
def test_compiles_as_meant(capability: int, dtype: str, loads: int) -> None:
    """The loop loads 16 bytes a thread and instruction, nothing spills, and shared memory holds no more than a reduction's."""
    triton = pytest.importorskip("triton")
    compiler, backends = pytest.importorskip("triton.compiler"), pytest.importorskip("triton.backends.compiler")
    from probe.measure import statistics_kernel as kernel

    names = kernel.reduce_columns.arg_names
    kinds = {"x_ptr": f"*{dtype}", "n": "i32", "counter_ptr": "*i32", "ADD": "constexpr"}
    source = compiler.ASTSource(
        kernel.reduce_columns,
        {name: kinds.get(name, "*fp64") for name in names},
        constexprs={(names.index("ADD"),): True},
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in ("x_ptr", "partial_ptr", "counter_ptr", "out_ptr")},
    )
    target = backends.GPUTarget("cuda", capability, 32)
    compiled = triton.compile(source, target=target, options={**kernel.OPTIONS})
    assembly = compiled.asm["ptx"]
    assert len(re.findall(r"ld\.global\.v4\.b32", assembly)) == loads
    assert ".local" not in assembly
    assert re.search(r"atom\.\S*acq_rel\S*add", assembly)
    assert compiled.metadata.shared <= 1024


class Watched:
    """An observer of one site, its buffer, and calls of that site."""

    def __init__(self, devices: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(observer, "FusedStatistics", lambda: FusedStatistics(devices=devices))
        self.site = Site("layer", "custom", "named")
        self.watcher = StatisticsWatcher([self.site], keep=())
        self.buffer = StepBuffer(budget_bytes=1 << 20, sites=["layer"], cells=self.watcher.cells())
        self.buffer.open(1)

    def sees(self, output: Tensor) -> None:
        """Let the observer see one call that returned ``output``."""
        self.watcher.leave(Call(self.site, nn.Identity(), MicroBatch(0), (), {}, output=output), self.buffer)

    def columns(self) -> list[float]:
        """Return the running columns of the site."""
        cell = statistics_cell("layer")
        return [*self.buffer.totals.sums[cell].tolist(), *self.buffer.totals.maxima[cell].tolist()]


def test_a_call_costs_six_operations(monkeypatch: pytest.MonkeyPatch) -> None:
    """On the CPU all that the observer does to an output of a plain site launches work at most six times, float32 or bfloat16."""
    watched = Watched((), monkeypatch)
    for dtype, budget in ((torch.float32, 5), (torch.bfloat16, 6)):
        x = torch.randn(2, 1500, 384).to(dtype)
        watched.sees(x)  # the first call of a step makes the running vectors
        assert kernels(lambda x=x: watched.sees(x)) <= budget


def test_a_kernel_that_adds_by_itself_is_believed(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the kernel added is not added again, and a call's own columns are kept; nothing else is done to the tensor."""
    watched = Watched(("cpu",), monkeypatch)
    monkeypatch.setattr(FusedStatistics, "takes", lambda self, x: True)

    def launch(self: FusedStatistics, x: Tensor, into: tuple[Tensor, Tensor]) -> Tensor:
        columns = torch.cat(summarise(x))
        into[0].add_(columns[:3])
        torch.maximum(into[1], columns[3:], out=into[1])
        return columns

    monkeypatch.setattr(FusedStatistics, "_launch", launch)
    parts = torch.randn(2, 30_000)
    for part in parts:
        watched.sees(part)
    assert watched.columns() == pytest.approx(torch.cat(summarise(parts)).tolist(), rel=1e-6)
    assert [c.statistics() for c in watched.buffer["layer"]] == [moments_of(30_000, torch.cat(summarise(part)).tolist()) for part in parts]
    assert watched.buffer.totals.counts[statistics_cell("layer")] == [2, 60_000]
    assert watched.buffer.totals.reasons == {}


@needs_triton
def test_a_kernel_that_fails_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where nothing can be launched (here: no GPU) the statistics are the same, the reason is named, and no further call tries."""
    tried: list[int] = []
    launch = FusedStatistics._launch
    monkeypatch.setattr(FusedStatistics, "_launch", lambda self, x, into: tried.append(1) or launch(self, x, into))
    watched = Watched(("cpu",), monkeypatch)
    parts = torch.randn(2, 30_000)
    for part in parts:
        watched.sees(part)
    assert tried == [1]
    assert watched.columns() == pytest.approx(torch.cat(summarise(parts)).tolist(), rel=1e-6)
    assert "failed with" in watched.buffer.totals.reasons[FUSED]
    assert watched.watcher._fused.failure == watched.buffer.totals.reasons[FUSED]


def test_without_triton_nothing_is_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without Triton the kernel takes no tensor, which is no failure."""
    monkeypatch.setattr(fused_statistics.importlib.util, "find_spec", lambda name: None)
    fused = FusedStatistics(devices=("cpu",))
    assert not fused.available(torch.device("cpu"))
    assert fused(torch.randn(10)) is None
    assert fused.failure is None


def test_the_cpu_is_left_alone() -> None:
    """Unless it is told otherwise the kernel is for CUDA devices only."""
    fused = FusedStatistics()
    assert fused(torch.randn(10)) is None
    assert fused.failure is None


@needs_cuda
@needs_triton
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_on_the_device_as_without_the_kernel(dtype: torch.dtype) -> None:
    """On a CUDA device the kernel gives what the other way gives, of large and small tensors, and the same to the last bit again."""
    fused = FusedStatistics()
    for shape, mean in (((7,), 0.0), ((8, 1500, 512), 0.0), ((8, 1500, 511), 20.0), ((40_000_003,), 1.0)):
        x = (torch.randn(shape, device="cuda") + mean).to(dtype)
        columns = fused(x)
        assert columns is not None, fused.failure
        assert torch.equal(columns, torch.cat(summarise(x, fused=fused)))
        found, expected = moments_of(x.numel(), columns.tolist()), moments_of(x.numel(), torch.cat(summarise(x)).tolist())
        assert expected.rms is not None
        assert found.mean == pytest.approx(expected.mean, rel=1e-6, abs=1e-6 * expected.rms)
        assert found.rms == pytest.approx(expected.rms, rel=1e-6)
        assert found.std == pytest.approx(expected.std, rel=0, abs=1e-6 * expected.rms)
        assert (found.minimum, found.maximum) == (expected.minimum, expected.maximum)
        x.view(-1)[:: max(1, x.numel() // 5)] = math.nan
        columns = fused(x)
        assert columns is not None
        assert columns[2].item() == x.isnan().sum().item()


@needs_cuda
@needs_triton
def test_one_launch_a_call_on_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CUDA device a call of a plain site is one kernel, as the profiler sees it, and makes the host wait for nothing."""
    watched = Watched(("cuda",), monkeypatch)
    x = torch.randn(8, 1500, 512, device="cuda")
    watched.sees(x)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            watched.sees(x)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    ran = [event.name for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    assert len(ran) == 1 and "reduce_columns" in ran[0]
    assert watched.buffer.totals.reasons == {}


@needs_cuda
@needs_triton
def test_streams_do_not_share_a_counter() -> None:
    """Launches that run side by side on two streams of a CUDA device give what each gives alone."""
    fused = FusedStatistics()
    x = torch.randn(2, 20_000_000, device="cuda")
    alone = [fused(part) for part in x]
    torch.cuda.synchronize()
    found = []
    for part in x:
        with torch.cuda.stream(torch.cuda.Stream()):
            found.append(fused(part))
    torch.cuda.synchronize()
    assert all(a is not None and b is not None and torch.equal(a, b) for a, b in zip(alone, found, strict=True))
