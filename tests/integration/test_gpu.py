"""On a CUDA device: a sampled step waits no more, copies once, and launches one kernel a tensor of statistics. Skipped without one."""

from __future__ import annotations

import pytest
import torch

from benchmarks.gpu.__main__ import strict_target, warnings_target
from benchmarks.gpu.collect import trace
from benchmarks.gpu.verdicts import judge
from benchmarks.units.statistics import bandwidths, target
from benchmarks.units.workloads import whisper

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
LOAD = whisper("tiny", clips=2)


def test_the_trace_of_a_sampled_step_meets_every_target() -> None:
    """No wait more than without the probe, one pinned copy more, one kernel a tensor."""
    device = torch.device("cuda")
    found = judge(trace(LOAD, device, observe=False), trace(LOAD, device, observe=True))
    assert [one for one in found[:3] if not one.met] == []


def test_no_synchronising_call_is_added() -> None:
    """Under the warning mode as many calls as without the probe, step by step; under the error mode none."""
    device = torch.device("cuda")
    assert warnings_target(LOAD, device).met
    assert strict_target(LOAD, device).met is not False


def test_statistics_reach_the_bandwidth() -> None:
    """At least 80 % of the measured copy bandwidth for large tensors."""
    device = torch.device("cuda")
    found = target(bandwidths(device), device)
    assert found.met, found
