"""Judges the traces of the same step without and with the probe; pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.gpu.trace import Event, Span, copies_to_host, kernels, longest_gap_us, spans, waits
from benchmarks.units.targets import Target

STEP = "benchmark step: "
PART = "probe part: "


@dataclass(frozen=True)
class Trace:
    """The events of one profiled training, and the number of the step that is judged."""

    events: Sequence[Event]
    step: int

    def span(self) -> Span:
        """Return where the step lies.

        Raises:
            ValueError: if it was not marked, or more than once.
        """
        found = [span for span in spans(self.events, STEP) if span.name == str(self.step)]
        if len(found) != 1:
            raise ValueError(f"step {self.step} is marked {len(found)} times in the trace")
        return found[0]

    def parts(self, name: str = "") -> list[Span]:
        """Return the probe's parts within the step, or those of one name."""
        step = self.span()
        return [part for part in spans(self.events, PART) if step.begin <= part.begin < step.end and name in ("", part.name)]


def judge(plain: Trace, sampled: Trace) -> list[Target]:
    """Compare waits and copies of a sampled step with the plain one, and look at kernels and gaps within the probe's parts."""
    return [_waiting(plain, sampled), _copying(plain, sampled), _launching(sampled), _gaps(plain, sampled)]


def _waiting(plain: Trace, sampled: Trace) -> Target:
    before, after = waits(plain.events, plain.span()), waits(sampled.events, sampled.span())
    more = after - before
    said = f"{after.total()} calls that wait, {before.total()} without the probe"
    why = ", ".join(f"{count} more {name}" for name, count in more.items())
    return Target("a sampled step: the host waits no more than without the probe", "none added", said, not more, why)


def _copying(plain: Trace, sampled: Trace) -> Target:
    before, after = copies_to_host(plain.events, plain.span()), copies_to_host(sampled.events, sampled.span())
    added = len(after) - len(before)
    pinned = sum(copy.pinned for copy in after) - sum(copy.pinned for copy in before)
    said = f"{added} copies to the host added, {pinned} of them to pinned memory; {sum(copy.nbytes for copy in after):,} bytes in all"
    met = added == 1 and pinned == 1
    why = "" if met else "the packed numbers should be the only copy, and go to pinned memory"
    return Target("a sampled step: one asynchronous copy to pinned memory", "1 more than without the probe", said, met, why)


def _launching(sampled: Trace) -> Target:
    counts = sorted(kernels(sampled.events, part) for part in sampled.parts("statistics"))
    if not counts:
        return Target("statistics: one fused kernel a tensor", "1 kernel", "no statistics in the trace", None, "nothing was marked")
    usual = counts[len(counts) // 2]
    said = f"{usual} kernels as a rule, {counts[0]} to {counts[-1]} over {len(counts)} calls (encoder and projector have their spread, too)"
    return Target("statistics: one fused kernel a tensor", "1 kernel", said, usual == 1, "" if usual == 1 else "the eager path ran")


def _gaps(plain: Trace, sampled: Trace) -> Target:
    inside = longest_gap_us(sampled.events, sampled.parts())
    usual = longest_gap_us(plain.events, [plain.span()])
    said = f"{inside:.0f} us inside hooks; {usual:.0f} us anywhere in the step without the probe"
    return Target("the device never waits long for the probe's host work", "no longer than the plain step's own longest gap", said,
                  inside <= usual, "" if inside <= usual else "the device had nothing to do while the host was in a hook")  # fmt: skip
