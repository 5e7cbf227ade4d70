"""What a rule itself found in the record before: so that a finding keeps its site and its standard of comparison while it lasts."""

from __future__ import annotations

from probe.findings.rule import History
from probe.records import Finding


def open_before(history: History, code: str) -> tuple[Finding, ...]:
    """Return the findings of a rule that were open after the record before the last one; empty if there is none."""
    found = history.records[-2].findings if len(history.records) > 1 else ()
    return tuple(finding for finding in found if finding.code == code)
