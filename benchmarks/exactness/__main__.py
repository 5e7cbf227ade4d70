"""Measures how exact the probe is and writes the tables: ``python -m benchmarks.exactness [--output FILE]``, with ``tests`` on the path."""

from __future__ import annotations

import argparse
from pathlib import Path

from benchmarks.exactness.attention import attention_rows
from benchmarks.exactness.audit import audit_rows
from benchmarks.exactness.heads import head_rows, size_rows
from benchmarks.exactness.memory import memory_rows
from benchmarks.exactness.page import page

PAGE = Path(__file__).parents[2] / "docs" / "exactness.md"


def main() -> None:
    """Measure, write the page, and say where."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=PAGE, help="where the page is written (default docs/exactness.md)")
    options = parser.parse_args()
    options.output.write_text(page(attention_rows(), memory_rows(), head_rows(), size_rows(), audit_rows()), encoding="utf-8")
    print(f"wrote {options.output}")


if __name__ == "__main__":
    main()
