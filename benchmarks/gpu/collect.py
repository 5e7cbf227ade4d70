"""Runs trainings on a device and collects what is judged: traces of a step, warnings of synchronising calls, errors of the strict mode."""

from __future__ import annotations

import json
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function
from transformers import TrainerCallback

import probe
from benchmarks.gpu.verdicts import STEP, Trace
from benchmarks.units.memory import marked
from benchmarks.units.parts import watched
from benchmarks.units.training import quiet, trainer
from benchmarks.units.workloads import Workload

EVERY, JUDGED, STEPS = 3, 6, 8
"""Steps 1, 3, 6 are sampled; step 6 is judged, when everything is warm; its record is published in step 7."""


class _EachStep(TrainerCallback):
    """Opens a context from the begin of each step to its end, after all that the probe does there."""

    def __init__(self, context: Callable[[int], Any]) -> None:
        self._context = context
        self._open = ExitStack()

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._open.enter_context(self._context(state.global_step + 1))

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._open.close()


def trace(workload: Workload, device: torch.device, *, observe: bool) -> Trace:
    """Profile a training and return its events; with the probe, its parts are marked."""
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
    with profile(activities=activities) as prof:
        _train(workload, device, observe=observe, context=lambda step: record_function(f"{STEP}{step}"), mark=True)
    with tempfile.TemporaryDirectory(prefix="probe-trace-") as folder:
        path = Path(folder) / "trace.json"
        prof.export_chrome_trace(str(path))
        return Trace(json.loads(path.read_text(encoding="utf-8"))["traceEvents"], JUDGED)


def warned(workload: Workload, device: torch.device, *, observe: bool) -> Counter[int]:
    """Count by step the synchronising calls that torch warns of between the step's begin and its end."""
    counts: Counter[int] = Counter()

    @contextmanager
    def noting(step: int) -> Iterator[None]:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            with debugging("warn"):
                yield
        counts[step] += sum("synchronizing CUDA operation" in str(one.message) for one in caught)

    _train(workload, device, observe=observe, context=noting)
    return counts


def strict(workload: Workload, device: torch.device, *, observe: bool) -> str:
    """Train with synchronising calls forbidden between each step's begin and its end; return the error, "" if there was none."""
    try:
        _train(workload, device, observe=observe, context=lambda step: debugging("error"), logging_nan_inf_filter=False)
    except RuntimeError as error:
        return str(error).splitlines()[0]
    finally:
        if device.type == "cuda":
            torch.cuda.set_sync_debug_mode("default")
    return ""


@contextmanager
def debugging(mode: str) -> Iterator[None]:
    """Set torch's debug mode of synchronising calls, which is the process's, for a while; does nothing without CUDA."""
    if not torch.cuda.is_available():
        yield
        return
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode(mode)
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


def _train(
    workload: Workload, device: torch.device, *, observe: bool, context: Callable[[int], Any], mark: bool = False, **arguments: Any
) -> None:
    model, batch = workload.make()
    bf16 = device.type == "cuda"
    with ExitStack() as stack:
        stack.enter_context(watched(marked) if mark else nullcontext())
        if observe:
            stack.enter_context(probe.attach(model, every=EVERY, settings=quiet()))
        trainer(model, batch, steps=STEPS, device=device, callbacks=[_EachStep(context)], bf16=bf16, **arguments).train()
