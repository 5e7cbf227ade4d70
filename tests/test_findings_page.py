"""The page of findings."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from probe.findings.page import markdown_page
from probe.findings.rule import Rule
from probe.findings.rules import RULES

pytestmark = pytest.mark.pure  # of torch and probe alone: the same with every transformers

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "findings.md"


def test_the_page_is_up_to_date() -> None:
    """``docs/findings.md`` is what the rules say."""
    assert PAGE.read_text(encoding="utf-8") == markdown_page(RULES), "run: python -m probe.findings > docs/findings.md"


def test_the_command_prints_the_page() -> None:
    """``python -m probe.findings`` writes it to standard output."""
    printed = subprocess.run([sys.executable, "-m", "probe.findings"], cwd=ROOT, capture_output=True, text=True, check=True)
    assert printed.stdout == markdown_page(RULES)


def test_codes_are_unique_and_every_rule_is_filled() -> None:
    """Each finding is there once, named in words joined by hyphens, with meaning, advice and, where it has a bound, the reason."""
    codes = [rule.code for rule in RULES]
    assert len(set(codes)) == len(codes)
    for rule in RULES:
        assert re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", rule.code)
        for text in (rule.meaning, rule.advice, rule.threshold or "Nothing to choose."):
            assert text.endswith((".", "?", ")")), rule.code


def test_every_finding_has_its_anchor() -> None:
    """The heading of a finding is its code alone, so that a link to ``#code`` leads there, and the table links to it."""
    page = markdown_page(RULES)
    for rule in RULES:
        assert page.count(f"\n### {rule.code}\n") == 1
        assert f"| [{rule.code}](#{rule.code}) | {rule.severity} |" in page


def test_prose_is_not_taken_for_markup() -> None:
    """Underscores, asterisks and bars of prose are shown as they are, code in backticks stays code."""
    rule = Rule("made-up", "info", "a_b *c* | `d_e`.", "Do <this>.", lambda history: None)
    page = markdown_page((rule,))
    assert r"| [made-up](#made-up) | info | a\_b \*c\* \| `d_e`. |" in page
    assert r"*info.* a\_b \*c\* | `d_e`." in page
    assert r"Do \<this>." in page
    assert "How it is decided" not in page
