"""The code in the documentation runs: the Python blocks of README.md and docs/*.md, and the demo, short."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "docs" / "examples"
# design.md is left out: its one block lists the public surface line by line and is no session.
PAGES = sorted({ROOT / "README.md", *(ROOT / "docs").glob("*.md")} - {ROOT / "docs" / "design.md"})
NO_RUN = re.compile(r"<!--\s*no-run:\s*(?P<reason>\S.*?)\s*-->")
FENCE = re.compile(r"(?P<indent>[ ]*)(?P<ticks>`{3,})(?P<info>.*)")


@dataclass(frozen=True)
class Block:
    """A fenced block of Python: its code, the line of the page it starts at, and whether it says why it is not run."""

    code: str
    line: int
    skipped: bool


def python_blocks(text: str) -> list[Block]:
    """Return the Python blocks of a Markdown page; a line ``<!-- no-run: reason -->`` right above a block takes it out."""
    lines = text.splitlines()
    blocks = []
    at = 0
    while at < len(lines):
        opening = FENCE.fullmatch(lines[at])
        if opening is None:
            at += 1
            continue
        end = next(
            (n for n in range(at + 1, len(lines)) if re.fullmatch(rf"[ ]*{opening['ticks']}`*\s*", lines[n])),
            len(lines),
        )
        if opening["info"].split()[:1] in (["python"], ["py"]):
            indent = len(opening["indent"])
            skipped = at > 0 and NO_RUN.fullmatch(lines[at - 1].strip()) is not None
            blocks.append(Block("\n".join(line[indent:] for line in lines[at + 1 : end]), at + 2, skipped))
        at = end + 1
    return blocks


def run_page(page: Path, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run all blocks of a page in order in one namespace, in a process of its own; line numbers in errors are those of the page."""
    script = [f"import sys; sys.path.insert(0, {str(EXAMPLES)!r}); names = {{'__name__': '__main__'}}"]
    for block in python_blocks(page.read_text(encoding="utf-8")):
        if not block.skipped:
            code = "\n" * (block.line - 1) + block.code
            script.append(f"exec(compile({code!r}, {str(page)!r}, 'exec'), names)")
    return run_python(["-c", "\n".join(script)], folder)


def run_python(arguments: list[str], folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run Python in ``folder`` with the checkout importable."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": path, **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def runnable(page: Path) -> bool:
    return any(not block.skipped for block in python_blocks(page.read_text(encoding="utf-8")))


@pytest.mark.parametrize("page", [page for page in PAGES if runnable(page)], ids=lambda page: page.name)
def test_the_blocks_of_a_page_run(page: Path, tmp_path: Path) -> None:
    """Every Python block that does not say otherwise runs, in order."""
    done = run_page(page, tmp_path)
    assert done.returncode == 0, f"{page.name}:\n{done.stdout[-2000:]}\n{done.stderr[-6000:]}"


def test_getting_started_is_among_the_pages() -> None:
    """The page that promises to run is run, with all of its blocks."""
    blocks = python_blocks((ROOT / "docs" / "getting-started.md").read_text(encoding="utf-8"))
    assert len(blocks) >= 5
    assert not any(block.skipped for block in blocks)


def test_blocks_are_found_where_markdown_has_them() -> None:
    """Only Python fences count, a fence within a longer fence is text, and a no-run mark needs a reason."""
    page = "\n".join(
        [
            "```sh",
            "make demo",
            "```",
            "```python",
            "a = 1",
            "```",
            "````text",
            "```python",
            "not = code",
            "```",
            "````",
            "<!-- no-run: a is yours -->",
            "```python",
            "b = a",
            "```",
            "<!-- no-run: -->",
            "  ```py",
            "  c = 2",
            "  ```",
        ]
    )
    assert python_blocks(page) == [Block("a = 1", 5, False), Block("b = a", 14, True), Block("c = 2", 18, False)]


def test_a_failing_block_is_reported_at_its_line(tmp_path: Path) -> None:
    """A block that raises fails the run, and the traceback names the page and the line in it."""
    page = tmp_path / "page.md"
    page.write_text("# Title\n\n```python\na = 1\n```\n\n```python\nassert a == 2\n```\n", encoding="utf-8")
    done = run_page(page, tmp_path)
    assert done.returncode == 1
    assert f'"{page}", line 8' in done.stderr


def demo(folder: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run the demo with few and small steps."""
    script = str(EXAMPLES / "finetune_whisper.py")
    return run_python([script, "--steps", "4", "--every", "2", "--batch-size", "4", "--clips", "12", *arguments], folder, **environment)


def test_the_demo_trains_and_its_run_folder_is_read_back(tmp_path: Path) -> None:
    """Without espeak-ng the demo uses the synthesiser, says so, trains, and leaves a run folder that read_run.py shows."""
    done = demo(tmp_path, PATH="")
    assert done.returncode == 0, done.stderr[-6000:]
    assert "Speech: 12 sentences from our own synthesiser in 6 voices" in done.stdout
    assert "clips held out" in done.stdout

    shown = run_python([str(EXAMPLES / "read_run.py"), "demo-output"], tmp_path)
    assert shown.returncode in (0, 1), shown.stderr[-6000:]  # 1: so few steps may not raise the accuracy
    assert "probe/text/token_accuracy" in shown.stdout, shown.stderr[-6000:]
    assert re.search(r"^  step +1 +2 +4$", shown.stdout, re.MULTILINE)


def test_the_demo_runs_with_the_probe_turned_off(tmp_path: Path) -> None:
    """PROBE=0 leaves an ordinary training script, which writes no run folder; where espeak-ng is installed, it speaks."""
    done = demo(tmp_path, PROBE="0")
    assert done.returncode == 0, done.stderr[-6000:]
    source = "spoken by espeak-ng" if shutil.which("espeak-ng") else "from our own synthesiser"
    assert f"Speech: 12 sentences {source} in 6 voices" in done.stdout
    assert "clips held out" in done.stdout
    assert not (tmp_path / "demo-output" / "_probe").exists()
