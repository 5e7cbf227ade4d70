"""The meter: every moment of the probe counts once, for the right part; device time comes from events that are never waited for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from probe.capture import meter as module
from probe.capture.meter import EventPool, Meter

pytestmark = pytest.mark.pure  # of torch and probe alone: the same with every transformers

CUDA = torch.device("cuda", 0)


class Clock:
    """Seconds that pass only when the test lets them."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class Event:
    """A device event that is recorded at the device's own time, and passed when the test says so."""

    made: list[Event]
    device = Clock()

    def __init__(self) -> None:
        self.at = 0.0
        self.done = False
        self.made.append(self)

    def record(self, stream: Any) -> None:
        self.at, self.done = self.device.now, False

    def query(self) -> bool:
        return self.done

    def elapsed_time(self, other: Event) -> float:
        assert self.done and other.done, "reading an event that has not passed would wait or fail"
        return 1000.0 * (other.at - self.at)


@pytest.fixture
def on_cuda(monkeypatch: pytest.MonkeyPatch) -> Callable[[Clock], Meter]:
    """Return what makes a meter whose device is a CUDA one, with events of this test."""
    Event.made, Event.device = [], Clock()
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: None)
    monkeypatch.setattr(module, "_timing_event", Event)
    return lambda clock: Meter(CUDA, clock=clock)


def test_sections_add_up_by_part() -> None:
    """A part's seconds are those between begin and end of its sections; what lies between sections counts for nobody."""
    clock = Clock()
    meter = Meter(clock=clock)
    for seconds in (1.0, 2.0):
        with meter.section("heads"):
            clock.now += seconds
        clock.now += 10.0
    with meter.section("inputs"):
        clock.now += 0.5
    spent = meter.take()
    assert spent.parts == {"heads": 3.0, "inputs": 0.5}
    assert spent.wall == 23.5


def test_nested_sections_count_once() -> None:
    """Time inside an inner section is the inner part's alone, also inside itself: the parts add up to the time of the outermost."""
    clock = Clock()
    meter = Meter(clock=clock)
    with meter.section("hooks"):
        clock.now += 1.0
        with meter.section("heads", launches=True):
            clock.now += 2.0
            with meter.section("heads", launches=True):
                clock.now += 4.0
        clock.now += 8.0
    spent = meter.take()
    assert spent.parts == {"hooks": 9.0, "heads": 6.0}
    assert sum(spent.parts.values()) == spent.wall == 15.0


def test_waiting_is_not_counted() -> None:
    """While the host waits for numbers that are under way the probe costs nothing, and the section round it stands still."""
    clock = Clock()
    meter = Meter(clock=clock)
    with meter.section("publication"):
        clock.now += 1.0
        with meter.waiting():
            clock.now += 100.0
        clock.now += 1.0
    spent = meter.take()
    assert spent.parts == {"publication": 2.0}
    assert spent.wall == 102.0


def test_taking_inside_a_section_divides_it() -> None:
    """A record is made within its own publication: what comes after belongs to the next record, and nothing is lost between them."""
    clock = Clock()
    meter = Meter(clock=clock)
    with meter.section("publication"):
        clock.now += 1.0
        first = meter.take()
        clock.now += 3.0
    clock.now += 6.0
    second = meter.take()
    assert (first.parts, first.wall) == ({"publication": 1.0}, 1.0)
    assert (second.parts, second.wall) == ({"publication": 3.0}, 9.0)
    assert meter.take().parts == {}


def test_an_error_closes_the_section() -> None:
    """An exception passes through, and what runs after it is not counted."""
    clock = Clock()
    meter = Meter(clock=clock)
    with pytest.raises(KeyError), meter.section("hooks"), meter.section("heads"):
        clock.now += 1.0
        raise KeyError
    clock.now += 5.0
    assert meter.take().parts == {"heads": 1.0, "hooks": 0.0}


def test_on_cuda_the_device_tells(on_cuda: Callable[[Clock], Meter]) -> None:
    """Of what launches work the device's time counts and not the host's; of everything else the host's; a part adds up both."""
    clock, device = Clock(), Event.device
    meter = on_cuda(clock)
    with meter.section("hooks"):
        clock.now += 1.0
        with meter.section("heads", launches=True):
            clock.now += 50.0
            device.now += 0.25
        clock.now += 1.0
    with meter.section("heads"):
        clock.now += 0.5
    for event in Event.made:
        event.done = True
    assert meter.take().parts == {"hooks": 2.0, "heads": 0.75}


def test_on_cuda_nested_work_counts_once(on_cuda: Callable[[Clock], Meter]) -> None:
    """Inside a section that launches work no other one counts, neither the device's time nor the host's."""
    clock, device = Clock(), Event.device
    meter = on_cuda(clock)
    with meter.section("packing", launches=True):
        device.now += 1.0
        with meter.section("heads", launches=True):
            device.now += 2.0
            clock.now += 7.0
        with meter.section("hooks"):
            clock.now += 9.0
        device.now += 4.0
    for event in Event.made:
        event.done = True
    assert {part: seconds for part, seconds in meter.take().parts.items() if seconds} == {"packing": 7.0}
    assert len(Event.made) == 2


def test_events_are_read_when_they_have_passed(on_cuda: Callable[[Clock], Meter]) -> None:
    """What the device has not reached is asked for and left; a later record has it. Events are used again."""
    clock, device = Clock(), Event.device
    meter = on_cuda(clock)
    for seconds in (1.0, 2.0):
        with meter.section("heads", launches=True):
            device.now += seconds
    Event.made[0].done = Event.made[1].done = True
    assert meter.take().parts == {"heads": 1.0}
    with meter.section("inputs", launches=True):
        device.now += 4.0
    assert len(Event.made) == 4
    for event in Event.made:
        event.done = True
    assert meter.take().parts == {"heads": 2.0, "inputs": 4.0}


def test_an_end_without_a_begin_is_no_pair() -> None:
    """An end that no begin belongs to records nothing."""
    Event.made = []
    pool = EventPool(CUDA, new=Event)
    pool.end("heads")
    assert Event.made == []
    assert pool.passed() == []


def test_a_restart_forgets_what_came_before() -> None:
    """Wall time and parts begin anew."""
    clock = Clock()
    meter = Meter(clock=clock)
    with meter.section("hooks"):
        clock.now += 1.0
    meter.restart()
    clock.now += 2.0
    spent = meter.take()
    assert (spent.parts, spent.wall) == ({}, 2.0)
