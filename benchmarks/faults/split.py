"""The split of faults and healthy runs into a part to set thresholds on and a part to test on, by a rule that looks at names only."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Literal

from benchmarks.faults.faults import KINDS
from benchmarks.faults.healthy import HEALTHY

Part = Literal["development", "test"]
FILE = Path(__file__).with_name("split.json")


def divide(names: Iterable[str]) -> dict[str, Part]:
    """Put every third name, in the order of their SHA-256, into the test part (the second, the fifth, …)."""
    ordered = sorted(set(names), key=lambda name: hashlib.sha256(name.encode()).hexdigest())
    return {name: "test" if place % 3 == 1 else "development" for place, name in enumerate(ordered)}


def computed() -> dict[str, dict[str, dict[str, Part]]]:
    """Return the part of every kind, by area; a kind lies in one part with all its models."""
    tables: dict[str, dict[str, dict[str, Part]]] = {"faults": {}, "healthy": {}}
    for table, pairs in (("faults", [(k.area, k.name) for k in KINDS]), ("healthy", [(h.area, h.kind) for h in HEALTHY])):
        for area in dict(pairs):
            tables[table][area] = divide(name for other, name in pairs if other == area)
    return tables


def part_of(table: str, area: str, kind: str) -> Part:
    """Return the part that the committed file says."""
    tables: dict[str, dict[str, dict[str, Part]]] = json.loads(FILE.read_text(encoding="utf-8"))
    return tables[table][area][kind]


if __name__ == "__main__":
    FILE.write_text(json.dumps(computed(), indent=2, sort_keys=True) + "\n", encoding="utf-8")
