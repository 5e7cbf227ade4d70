"""In which sampled steps the counterfactual passes are made, and how long they took."""

from __future__ import annotations

import time

import pytest
import torch

from probe.capture.schedule import PassCadence, is_sampled
from probe.counterfactual.cost import Stopwatch
from probe.errors import ProbeTypeError, ProbeValueError
from probe.settings import Settings

pytestmark = pytest.mark.pure  # of torch and probe alone: the same with every transformers


def made(cadence: PassCadence, *, first: int = 1, last: int = 1200) -> list[int]:
    """Return the sampled steps in which passes are made."""
    sampled = cadence.sampled or (cadence.every,)
    steps = [step for step in range(first, last + 1) if is_sampled(step, cadences=sampled, first=first)]
    return [step for step in steps if cadence.has(step, first=first)]


@pytest.mark.parametrize(
    ("cadence", "first", "expected"),
    [
        (PassCadence(100), 1, [100, 500, 1000]),  # 100 is the first sampled step that 20 steps lie before
        (PassCadence(50), 1, [50, 250, 500, 750, 1000]),
        (PassCadence(100), 601, [700, 1000]),  # a resumed training
        (PassCadence(100, sampled=(30, 100)), 1, [30, 500, 1000]),
        (PassCadence(100, own=300), 1, [300, 600, 900, 1200]),
        (PassCadence(100, own=150), 1, [300, 600, 900, 1200]),  # of these every second is sampled
        (PassCadence(100, own=1), 1, [1, *range(100, 1201, 100)]),
        (PassCadence(100, own=0), 1, []),
    ],
)
def test_steps_of_the_passes(cadence: PassCadence, first: int, expected: list[int]) -> None:
    """Those that 5 · every divides and an early one, or those that the user's number divides; never with 0."""
    assert made(cadence, first=first) == expected


def test_the_early_one_follows_twenty_steps() -> None:
    """With a small cadence it is the first sampled step before which 20 steps were made, counted from the first of this training."""
    assert made(PassCadence(1), last=30) == [5, 10, 15, 20, 21, 25, 30]
    assert made(PassCadence(3), first=100, last=140) == [105, 120, 135]
    assert made(PassCadence(7), first=100, last=140) == [105, 126, 140]


@pytest.mark.parametrize("cadence", [PassCadence(3), PassCadence(100, sampled=(30, 100)), PassCadence(4, own=6), PassCadence(5, own=1)])
def test_the_next_step_is_the_one_that_comes(cadence: PassCadence) -> None:
    """What is said to be next is the next sampled step of the passes, from every step of the run."""
    steps = made(cadence, first=2, last=400)
    for step in range(2, steps[-1]):
        assert cadence.after(step, first=2) == next(later for later in steps if later > step)
    assert PassCadence(5, own=0).after(3, first=1) == 0


def test_settings_are_checked() -> None:
    """Wrong types and numbers are refused with what was expected."""
    assert Settings().counterfactual_every is None
    assert Settings(counterfactual_every=0, conditions=("speaker",), group_by="lang").group_by == "lang"
    with pytest.raises(ProbeValueError, match="counterfactual_every=-1"):
        Settings(counterfactual_every=-1)
    with pytest.raises(ProbeTypeError, match=r"counterfactual_every=2\.5"):
        Settings(counterfactual_every=2.5)  # type: ignore[arg-type]
    with pytest.raises(ProbeTypeError, match="conditions='speaker': expected a tuple"):
        Settings(conditions="speaker")  # type: ignore[arg-type]
    with pytest.raises(ProbeTypeError, match="group_by=None"):
        Settings(group_by=None)  # type: ignore[arg-type]


def test_time_on_a_cpu_is_the_clock() -> None:
    """From the making to the stop, in milliseconds; nothing before it was stopped."""
    watch = Stopwatch(torch.device("cpu"))
    time.sleep(0.02)
    assert watch.milliseconds() is None
    watch.stop()
    taken = watch.milliseconds()
    assert taken is not None and 20 <= taken < 2000
    assert watch.milliseconds() == taken


def test_time_on_cuda_is_between_events(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two events on the current stream, waited for only when the time is asked for."""
    waited: list[str] = []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing
            self.at = 0.0

        def record(self, stream: str) -> None:
            assert stream == "stream"
            self.at = time.perf_counter()

        def synchronize(self) -> None:
            waited.append("end")

        def elapsed_time(self, end: Event) -> float:
            return 1000 * (end.at - self.at)

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: "stream")
    watch = Stopwatch(torch.device("cuda"))
    time.sleep(0.01)
    watch.stop()
    assert waited == []
    taken = watch.milliseconds()
    assert taken is not None and 10 <= taken < 2000
    assert waited == ["end"]
