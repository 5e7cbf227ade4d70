"""Which steps are sampled."""

from __future__ import annotations

import pytest

from probe.capture.schedule import in_cadence, is_sampled

pytestmark = pytest.mark.pure  # of torch and probe alone: the same with every transformers


@pytest.mark.parametrize(
    ("cadences", "first", "expected"),
    [
        ((100,), 1, [1, 100, 200]),
        ((1,), 1, list(range(1, 251))),
        ((100,), 151, [151, 200]),
        ((100, 60), 1, [1, 60, 100, 120, 180, 200, 240]),
        ((), 1, []),
    ],
)
def test_the_first_step_and_every_multiple_of_any_cadence(cadences: tuple[int, ...], first: int, expected: list[int]) -> None:
    """The union of the cadences, and the first step of the train() call, resumed or not."""
    assert [step for step in range(first, 251) if is_sampled(step, cadences=cadences, first=first)] == expected


def test_one_cadence_shows_its_own_steps_only() -> None:
    """A callback shows its own multiples and the first step, whatever else is sampled."""
    assert [step for step in range(1, 13) if in_cadence(step, every=4, first=1)] == [1, 4, 8, 12]
