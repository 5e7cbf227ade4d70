"""What is read from a profiler's trace: events as Kineto writes them, made by hand, so that no GPU is needed to try the reading."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from benchmarks.gpu import collect, verdicts
from benchmarks.gpu.trace import Span, copies_to_host, kernels, launched, longest_gap_us, spans, waits
from benchmarks.gpu.verdicts import PART, STEP, Trace, judge
from benchmarks.units.workloads import llama

TO_PINNED = "Memcpy DtoH (Device -> Pinned)"
TO_PAGEABLE = "Memcpy DtoH (Device -> Pageable)"


class Recording:
    """A trace in the making: what the host asks for, and what then runs on the device, in microseconds."""

    def __init__(self) -> None:
        self.events: list[dict[str, Any]] = [{"ph": "M", "name": "process_name", "pid": 0, "args": {"name": "python"}}]
        self._correlation = 0

    def annotate(self, name: str, begin: float, end: float) -> None:
        """``record_function(name)`` on the host; the profiler repeats it on the device's rows."""
        for category in ("user_annotation", "gpu_user_annotation"):
            self.events.append({"ph": "X", "cat": category, "name": name, "pid": 1, "tid": 1, "ts": begin, "dur": end - begin})

    def launch(self, at: float, *, runs: float, takes: float, name: str = "vectorized_elementwise_kernel", stream: int = 7) -> None:
        """A kernel that the host launches ``at`` and that runs later."""
        self._pair("cudaLaunchKernel", at, "kernel", name, runs, takes, {"stream": stream})

    def copy(self, at: float, *, runs: float, name: str = TO_PINNED, nbytes: int = 1024, stream: int = 7) -> None:
        """A copy that the host asks for."""
        self._pair("cudaMemcpyAsync", at, "gpu_memcpy", name, runs, 2.0, {"stream": stream, "bytes": nbytes})

    def call(self, name: str, at: float) -> None:
        """A call of the host that has nothing on the device."""
        self._correlation += 1
        self._add("cuda_runtime", name, at, 1.0, {"correlation": self._correlation})

    def _pair(self, call: str, at: float, category: str, name: str, runs: float, takes: float, more: dict[str, Any]) -> None:
        self._correlation += 1
        self._add("cuda_runtime", call, at, 1.0, {"correlation": self._correlation})
        self._add(category, name, runs, takes, {"correlation": self._correlation, "device": 0, **more})

    def _add(self, category: str, name: str, at: float, takes: float, more: dict[str, Any]) -> None:
        self.events.append({"ph": "X", "cat": category, "name": name, "pid": 0, "tid": 7, "ts": at, "dur": takes, "args": more})


def plain_step() -> Recording:
    """A step of four kernels 10 us long, 2 us apart, after one before it, and the loss that the Trainer reads."""
    made = Recording()
    made.launch(1.0, runs=5.0, takes=10.0, name="of the step before")
    made.annotate(f"{STEP}6", 100.0, 200.0)
    for i in range(4):
        made.launch(110.0 + i, runs=150.0 + 12.0 * i, takes=10.0)
    made.copy(180.0, runs=205.0, name=TO_PAGEABLE, nbytes=4)
    made.call("cudaStreamSynchronize", 182.0)
    made.call("cudaDeviceSynchronize", 250.0)
    return made


def sampled_step(
    *, statistics_kernels: int = 1, gap: float = 2.0, copies: tuple[str, ...] = (TO_PINNED,), waits: tuple[str, ...] = ()
) -> Recording:
    """The same step with the probe's statistics of two tensors after the model's kernels, and its packed copy."""
    made = plain_step()
    for begin, runs in ((120.0, 207.0 + gap), (130.0, 223.0 + gap)):
        made.annotate(f"{PART}statistics", begin, begin + 5.0)
        for i in range(statistics_kernels):
            made.launch(begin + 1.0 + i * 0.1, runs=runs + i * 3.0, takes=2.0, name="fused_statistics")
    made.annotate(f"{PART}finish", 185.0, 190.0)
    for i, name in enumerate(copies):
        made.copy(186.0 + i, runs=283.0 + gap + 5.0 * i, name=name, nbytes=4096)
    for i, name in enumerate(waits):
        made.call(name, 188.0 + i * 0.1)
    return made


def trace(made: Recording) -> Trace:
    return Trace(made.events, 6)


def test_what_was_launched_within_a_span_is_found_by_its_correlation() -> None:
    """A kernel belongs to the span in which the host launched it, whenever it ran, and on the device's own row."""
    made = plain_step()
    step = Trace(made.events, 6).span()
    assert kernels(made.events, step) == 4
    assert [e["name"] for e in launched(made.events, Span("", 0.0, 50.0))] == ["of the step before"]
    assert [span.name for span in spans(made.events, STEP)] == ["6"]  # that of the device's rows is not a second one


def test_copies_tell_page_locked_memory_from_ordinary() -> None:
    """Only copies from the device to the host within the step count, with their bytes and the kind of memory."""
    made = sampled_step(copies=(TO_PINNED, TO_PAGEABLE, "Memcpy HtoD (Pinned -> Device)", "Memcpy DtoD (Device -> Device)"))
    found = copies_to_host(made.events, trace(made).span())
    assert [(copy.nbytes, copy.pinned) for copy in found] == [(4, False), (4096, True), (4096, False)]


def test_only_waits_within_the_step_count() -> None:
    """The synchronisation after the step is not its own."""
    made = plain_step()
    assert waits(made.events, trace(made).span()) == {"cudaStreamSynchronize": 1}


def test_the_longest_gap_is_that_before_what_the_hooks_launched() -> None:
    """Idle time on the busiest stream counts if the kernel that ends it was launched in a hook; other gaps and streams do not."""
    made = sampled_step(gap=30.0)
    made.launch(121.0, runs=9000.0, takes=1.0, stream=13)
    assert longest_gap_us(made.events, trace(made).parts()) == pytest.approx(58.0)  # before the packed copy
    assert longest_gap_us(made.events, trace(made).parts("statistics")) == pytest.approx(30.0)
    assert longest_gap_us(made.events, []) == 0.0
    assert longest_gap_us(plain_step().events, [trace(plain_step()).span()]) == pytest.approx(135.0)


def test_a_healthy_step_meets_every_target() -> None:
    """One kernel a tensor, one pinned copy more, no wait more, no gap longer than the plain step's."""
    made = sampled_step()
    assert [target.met for target in judge(trace(plain_step()), trace(made))] == [True] * 4


@pytest.mark.parametrize(
    ("change", "missed"),
    [
        ({"waits": ("cudaStreamSynchronize",)}, 0),
        ({"copies": (TO_PAGEABLE,)}, 1),
        ({"copies": (TO_PINNED, TO_PINNED)}, 1),
        ({"copies": ()}, 1),
        ({"statistics_kernels": 4}, 2),
        ({"gap": 140.0}, 3),
    ],
)
def test_each_fault_misses_its_own_target(change: dict[str, Any], missed: int) -> None:
    """A wait more, a copy to ordinary memory, two or none of them, several kernels, a long gap: each is seen, and the others stand."""
    found = judge(trace(plain_step()), trace(sampled_step(**change)))
    assert [target.met for target in found].index(False) == missed
    assert [target.met for target in found].count(False) == 1
    assert found[missed].why


def test_a_step_that_is_not_marked_is_an_error() -> None:
    """Nothing is judged by a trace in which the step cannot be found."""
    with pytest.raises(ValueError, match="marked 0 times"):
        Trace(plain_step().events, 5).span()


def test_collecting_works_on_the_cpu_as_far_as_it_goes() -> None:
    """A real profile of a tiny training holds the judged step once and the probe's parts in it; with no device there is nothing else."""
    load = llama(vocabulary=64, rows=1, tokens=8, width=32, layers=1)
    found = collect.trace(load, torch.device("cpu"), observe=True)
    assert {"statistics", "attention", "heads", "gradients", "finish"} <= {part.name for part in found.parts()}
    bare = collect.trace(load, torch.device("cpu"), observe=False)
    assert bare.parts() == []
    assert copies_to_host(found.events, found.span()) == []
    assert verdicts.judge(bare, found)[0].met is True
