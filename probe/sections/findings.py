"""How findings are shown: the section of what has just opened, changed or closed, and one short line for each that is open."""

from __future__ import annotations

from collections.abc import Sequence

from probe.records import Finding, StepRecord
from probe.sections.blocks import Block, Fact, Facts, Note, Section, Tone
from probe.sections.numbers import counted

TITLE = "Findings"
_PAGE = "docs/findings.md"
_TONES: dict[str, Tone] = {"critical": "critical", "warning": "warning", "info": "plain"}
_SHOWN_OPEN = 8


def events_section(step: int, events: Sequence[Finding]) -> Section:
    """Return the section of the events of one step: what was seen and what to do, or that it is over."""
    return Section(TITLE, step, (Facts(tuple(row for event in events for row in _event(event))),))


def open_findings(record: StepRecord) -> tuple[Block, ...]:
    """Return one line for each open finding of a record, the first ones; their order is that of the record."""
    lines = [Note(_line(finding), _TONES[finding.severity]) for finding in record.findings[:_SHOWN_OPEN]]
    left = len(record.findings) - len(lines)
    return (*lines, *([Note(f"and {counted(left, 'open finding')} more in the record")] if left else []))


def _event(event: Finding) -> list[Fact]:
    if event.state == "closed":
        return [Fact("closed", f"{_name(event)} ({event.severity}, since step {event.since_step:,})")]
    since = f", since step {event.since_step:,}" if event.state == "changed" else ""
    rows = [Fact(event.state, f"{event.severity}, {_name(event)}{since}: {event.message}", _TONES[event.severity])]
    return [*rows, Fact("  what to do", f"{event.advice} ({_PAGE}#{event.code})".lstrip())]


def _line(finding: Finding) -> str:
    return f"{finding.severity} finding since step {finding.since_step:,}, {_name(finding)}: {finding.message}"


def _name(finding: Finding) -> str:
    return f"{finding.code} at {finding.site}" if finding.site else finding.code
