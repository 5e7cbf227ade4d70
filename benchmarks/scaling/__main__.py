"""Writes docs/scaling.md from the newest units file: ``python -m benchmarks.scaling [--units FILE] [--output FILE]``.

``tests`` has to be on the path, as ``make scaling`` puts it there.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

from benchmarks.scaling.launches import launches
from benchmarks.scaling.layouts import MODELS, Watched, audio_batch, columns, text_batch, watched
from benchmarks.scaling.page import TOKENS, Counted, page

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results"


def main() -> None:
    """Count, compute, write the page, and say where."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--units", type=Path, default=None, help="what benchmarks.units wrote (default: the newest in benchmarks/results)")
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "scaling.md", help="where the page is written")
    options = parser.parse_args()
    source = options.units or newest(RESULTS)
    report = json.loads(source.read_text(encoding="utf-8")) if source is not None else {"rows": {}}
    with tempfile.TemporaryDirectory(prefix="probe-scaling-") as folder:
        tempfile.tempdir = folder
        counted = count()
        tempfile.tempdir = None
    options.output.write_text(page(report, counted, source=source.name if source is not None else ""), encoding="utf-8")
    print(f"wrote {options.output} from {source or 'what is counted alone: benchmarks.units has not been run'}")


def newest(folder: Path) -> Path | None:
    """Return the newest units file, by the date in its name, of a CUDA device before that of a CPU; ``None`` if there is none."""
    found = sorted(folder.glob("units-*.json"), key=lambda path: (not path.stem.endswith("-cpu"), path.name))
    return found[-1] if found else None


def count() -> Counted:
    """Count the columns of each model, and what a micro-batch gives to read where a forward without data can be run."""
    batches = {"Whisper large": audio_batch(8, TOKENS // 64), list(MODELS)[1]: text_batch(TOKENS)}
    seen: dict[str, Watched] = {}
    counted = []
    for name, make in MODELS.items():
        model = make()
        counted.append(columns(name, model))
        if name in batches:
            seen[name] = watched(model, batches[name])
    return Counted(counted, seen, launches())


if __name__ == "__main__":
    main()
