"""Prints the page of findings: ``python -m probe.findings > docs/findings.md``."""

from __future__ import annotations

import sys

from probe.findings.page import markdown_page
from probe.findings.rules import RULES

if __name__ == "__main__":
    sys.stdout.write(markdown_page(RULES))
