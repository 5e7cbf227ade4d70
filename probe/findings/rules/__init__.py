"""The rules, one file a concern; ``RULES`` is all of them, in the order in which their findings are shown."""

from __future__ import annotations

from probe.findings.rule import Rule

RULES: tuple[Rule, ...] = ()
