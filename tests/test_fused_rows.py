"""The kernels of attention rows: the same sums in Triton's interpreter, compiled for two generations of GPUs, never an error."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from costs import kernels
from probe.measure import fused_rows
from probe.measure.attention import reduce_rows, sum_up
from probe.measure.fused_rows import FusedRows
from probe.measure.fused_statistics import installed
from probe.measure.prepared import Prepared, prepare
from probe.measure.probabilities import FromScores
from probe.measure.rows import choose_rows
from probe.measure.scores import Scores
from probe.sites.modality import AUDIO, TEXT

pytestmark = pytest.mark.pure  # of torch and probe alone: the same with every transformers

WORKER = Path(__file__).parent / "workers" / "fused_rows.py"
needs_triton = pytest.mark.skipif(not installed(), reason="no Triton")
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


@pytest.fixture(scope="module")
def interpreted() -> Any:
    """Return what the interpreter gives: in a process of its own, since Triton must know before it is imported."""
    done = subprocess.run([sys.executable, str(WORKER)], capture_output=True, text=True, check=False, timeout=280)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@needs_triton
def test_every_case_agrees_with_the_other_way(interpreted: Any) -> None:
    """All sums, over heads and of each head, within 1e-6: dtypes, layouts, masks, softcap, blind rows, cross-attention, many samples."""
    for name, case in interpreted["cases"].items():
        assert case["taken"], name
        for found, expected in (case["sums"], case["heads"]):
            if case["finite"]:
                assert found == pytest.approx(expected, rel=1e-6, abs=1e-6), name
            else:
                assert [math.isfinite(value) for value in found] == [math.isfinite(value) for value in expected], name
    assert [name for name, case in interpreted["cases"].items() if not case["finite"]] == ["not finite"]
    assert len(interpreted["cases"]) == 12


@needs_triton
def test_what_the_kernels_cannot_do_is_left_to_the_other_way(interpreted: Any) -> None:
    """Bias, sinks, masks of each head, float64, rounding by autocast and very wide heads are refused, which is no failure."""
    assert set(interpreted["refused"].values()) == {False}
    assert len(interpreted["refused"]) == 6


@needs_triton
@pytest.mark.parametrize(("capability", "dtype"), [(80, "fp32"), (90, "bf16")])
@pytest.mark.parametrize("name", ["reduce_rows", "add_up_rows"])
def test_compiles_without_a_gpu(name: str, dtype: str, capability: int) -> None:
    """Compilers for Ampere and Hopper take both kernels with all switched on, at the width of Whisper's heads; nothing is spilled."""
    triton = pytest.importorskip("triton")
    compiler, backends = pytest.importorskip("triton.compiler"), pytest.importorskip("triton.backends.compiler")
    from probe.measure import rows_kernel

    kernel = getattr(rows_kernel, name)
    switches = {"ADDED": True, "SOFTCAP": True, "IN_KEYS": True, "GROUPS": True, "WIDE": 64}
    kinds = {"q_ptr": f"*{dtype}", "k_ptr": f"*{dtype}", "index_ptr": "*i64", "blind_ptr": "*i1", "code_ptr": "*i8", "first_ptr": "*i64"}
    floats = ("scale", "softcap", "band")
    signature = {
        each: "constexpr"
        if each in switches
        else kinds.get(each, "*fp32")
        if each.endswith("_ptr")
        else "fp32"
        if each in floats
        else "i32"
        for each in kernel.arg_names
    }
    constants = {(kernel.arg_names.index(each),): value for each, value in switches.items() if each in kernel.arg_names}
    source = compiler.ASTSource(kernel, signature, constexprs=constants)
    compiled = triton.compile(source, target=backends.GPUTarget("cuda", capability, 32), options=rows_kernel.OPTIONS)
    assert ".local" not in compiled.asm["ptx"]
    assert compiled.metadata.shared <= 48 * 1024
    assert len(compiled.asm["cubin"]) > 0


def sums(source: FromScores, prepared: Prepared, fused: FusedRows | None = None) -> Tensor:
    return sum_up([reduce_rows(source, prepared, fused=fused)], prepared).sums_LC


def call(device: str = "cpu") -> tuple[FromScores, Prepared]:
    q, k = torch.randn(2, 4, 60, 64, device=device), torch.randn(2, 4, 80, 64, device=device)
    query, key = (torch.full((2, length), code, dtype=torch.int8, device=device) for length, code in ((60, TEXT), (80, AUDIO)))
    source = FromScores(Scores(q, k))
    given = {"query_modality_BS": query, "key_modality_BK": key, "self_attention": False}
    return source, prepare(source, choose_rows(query, rows=64), **given)


@needs_triton
def test_a_kernel_that_fails_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where nothing can be launched (here: no GPU) the sums are the same, the reason is kept, and no further call tries."""
    tried: list[int] = []
    launch = fused_rows._launch
    monkeypatch.setattr(fused_rows, "_launch", lambda *args: tried.append(1) or launch(*args))
    fused = FusedRows(devices=("cpu",))
    source, prepared = call()
    expected = sums(source, prepared)
    for _ in range(2):
        assert torch.equal(sums(source, prepared, fused), expected)
    assert tried == [1]
    assert fused.failure is not None and "failed with" in fused.failure


def test_without_triton_and_on_the_cpu_nothing_is_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernels are for CUDA devices with Triton; elsewhere they take no call, which is no failure."""
    source, prepared = call()
    assert not FusedRows().takes(source, prepared)
    monkeypatch.setattr(fused_rows, "installed", lambda: False)
    fused = FusedRows(devices=("cpu",))
    assert not fused.takes(source, prepared)
    assert fused.failure is None


def test_few_operations_are_left(monkeypatch: pytest.MonkeyPatch) -> None:
    """A layer with walks launches nothing of its own beside the kernels: all is left to the sum over layers."""
    empty = torch.empty(0)

    def launch(given: Scores, prepared: Prepared, groups: int, covered: bool) -> tuple[Tensor, Tensor | None]:
        return empty, empty if covered else None

    monkeypatch.setattr(fused_rows, "_launch", launch)
    monkeypatch.setattr(FusedRows, "takes", lambda self, source, prepared: True)
    source, prepared = call()
    assert prepared.sight.text_audio_BK is not None
    assert kernels(lambda: reduce_rows(source, prepared, fused=FusedRows())) == 0


@needs_cuda
@needs_triton
def test_on_the_device_as_without_the_kernels() -> None:
    """On a CUDA device the kernels give the sums of the other way, without a wait."""
    source, prepared = call("cuda")
    fused = FusedRows()
    expected = sums(source, prepared)
    sums(source, prepared, fused)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = sums(source, prepared, fused)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert fused.failure is None
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
