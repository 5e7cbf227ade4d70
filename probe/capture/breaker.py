"""The breaker: an error inside a part of the probe is said once and switches that part off; training goes on."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from types import TracebackType


class Breaker:
    """Parts of the probe by name, each on until its first error.

    Only ``Exception`` is caught (an out-of-memory error of the device is one): ``KeyboardInterrupt`` and ``SystemExit`` pass.
    """

    def __init__(self, say: Callable[[str], None]) -> None:
        """Start with every part on; ``say`` receives one line when a part is switched off."""
        self.say = say
        self.failures: dict[str, str] = {}

    def is_off(self, part: str) -> bool:
        """Tell whether a part has been switched off."""
        return part in self.failures

    def guard(self, part: str, where: str = "") -> Guard:
        """Return a context in which an exception is caught, said once, and switches ``part`` off."""
        return Guard(self, part, where)

    def trip(self, part: str, error: BaseException, where: str = "") -> None:
        """Switch a part off because of an error, and say so if it was on."""
        if part in self.failures:
            return
        frames = traceback.extract_tb(error.__traceback__)
        place = f" ({frames[-1].filename}:{frames[-1].lineno})" if frames else ""
        site = f" at {where}" if where else ""
        reason = f"switched off after {type(error).__name__}: {error}{site}{place}"
        self.failures[part] = reason
        self.say(f"{part} {reason}; training goes on")


class Guard:
    """The context that :meth:`Breaker.guard` returns."""

    __slots__ = ("_breaker", "_part", "_where")

    def __init__(self, breaker: Breaker, part: str, where: str) -> None:
        self._breaker, self._part, self._where = breaker, part, where

    def __enter__(self) -> None:
        """Enter; nothing is done."""

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> bool:
        """Swallow an ``Exception`` after tripping the breaker; let everything else pass."""
        if not isinstance(error, Exception):
            return False
        self._breaker.trip(self._part, error, self._where)
        return True
