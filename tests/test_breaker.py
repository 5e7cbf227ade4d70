"""The breaker: errors are said once, with their place, and go no further."""

from __future__ import annotations

import pytest

from probe.capture.breaker import Breaker

pytestmark = pytest.mark.pure  # of torch and probe alone: the same with every transformers


def test_an_error_is_said_once_with_its_place_and_switches_the_part_off() -> None:
    """The one line names the part, the error, the site and the file; a second error says nothing."""
    said: list[str] = []
    breaker = Breaker(said.append)
    for _ in range(2):
        with breaker.guard("heads", "lm_head"):
            raise KeyError("labels")
    assert breaker.is_off("heads")
    assert not breaker.is_off("attention")
    assert len(said) == 1
    assert said[0].startswith("heads switched off after KeyError: 'labels' at lm_head (")
    assert "test_breaker.py:" in said[0]
    assert said[0].endswith("training goes on")
    assert "KeyError" in breaker.failures["heads"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit])
def test_what_is_no_error_passes(error: type[BaseException]) -> None:
    """A user's Ctrl-C is never swallowed."""
    breaker = Breaker(lambda line: None)
    with pytest.raises(error), breaker.guard("heads"):
        raise error
    assert not breaker.is_off("heads")
