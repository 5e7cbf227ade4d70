r"""Sections on the terminal: rich text above the progress bar, plain text where the output is no terminal. The only user of rich.

Whatever comes from data is shown, never obeyed: no markup is read, and control characters (an escape sequence in a decoded text, a change
of the writing direction) stand as ``\x1b`` in the output.
"""

from __future__ import annotations

import io
import os
import random
import re
import shutil
import sys
from collections.abc import Iterable, Sequence
from typing import TextIO

from tqdm.std import tqdm  # type: ignore[import-untyped]

from probe.sections.blocks import Block, Column, Comparison, Fact, Facts, Section, Table, TokenPair, Tone
from probe.sections.numbers import MISSING

# Loading rich draws from Python's generator (rich.style makes an id of 24 random bits), which would change the run of whoever attaches.
_state = random.getstate()
from rich.console import Console, Group, RenderableType  # noqa: E402
from rich.padding import Padding  # noqa: E402
from rich.rule import Rule  # noqa: E402
from rich.table import Table as RichTable  # noqa: E402
from rich.text import Text  # noqa: E402

random.setstate(_state)

_PLAIN_WIDTH = 120
_WIDTHS = (60, 160)
_INDENT = 2
_FLEXIBLE = 16
_STYLES: dict[Tone, str] = {"plain": "", "missing": "dim yellow", "warning": "bold yellow", "critical": "bold red"}
_WRONG = "bold red underline"
# Control characters, surrogates, line separators, and what changes the writing direction: all that could make a line read as another one.
_INVISIBLE = re.compile("[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ufeff\ud800-\udfff]")
_ASCII = str.maketrans({"…": "...", "→": "->", "·": "-", "─": "-"})


class TerminalSink:
    """Shows sections and one-line messages. A closed or narrow-minded output never raises: what cannot be written is escaped or dropped.

    Args:
        file: Where to write; ``None`` is ``sys.stdout`` as it is at the time of each call.

    Attributes:
        failure: Why the last write did not arrive, or "".
    """

    def __init__(self, *, file: TextIO | None = None) -> None:
        self._file = file
        self.failure = ""

    def show(self, sections: Sequence[Section]) -> None:
        """Write sections, one below the other, in one go."""
        page = self._page()
        self._write(page.file, "".join(page.render(page.section(section)) + "\n" for section in sections))

    def say(self, message: str) -> None:
        """Write one line, "probe: …", not wrapped."""
        page = self._page()
        line = Text.assemble(("probe: ", "bold cyan"), page.text(message))
        self._write(page.file, page.render(line, wrap=False))

    def _page(self) -> _Page:
        return _Page(self._file if self._file is not None else sys.stdout)

    def _write(self, file: TextIO | None, text: str) -> None:
        """Write above every progress bar of this process. Errors of the output are kept in ``failure``."""
        self.failure = ""
        if file is None:
            self.failure = "there is no standard output"
            return
        try:
            with tqdm.external_write_mode(file=file):
                _put(file, text)
        except (OSError, ValueError) as error:
            self.failure = f"{type(error).__name__}: {error}"


def _put(file: TextIO, text: str) -> None:
    try:
        file.write(text)
    except UnicodeEncodeError as error:
        file.write(text.encode(error.encoding, "backslashreplace").decode(error.encoding))
    file.flush()


def _encoding(file: TextIO | None) -> str:
    """Return the encoding to lay out for: that of the file if it can write our own characters, else ASCII."""
    encoding = getattr(file, "encoding", None) or "utf-8"
    try:
        "…→·─".encode(encoding)
    except (UnicodeError, LookupError):
        return "ascii"
    return encoding


def _is_terminal(file: TextIO | None) -> bool:
    try:
        return file is not None and file.isatty()
    except (OSError, ValueError, AttributeError):
        return False


class _Page:
    """The layout for one output: its width, its colours, the characters it can write."""

    def __init__(self, file: TextIO | None) -> None:
        self.file = file
        self._encoding = _encoding(file)
        terminal = _is_terminal(file)
        width = shutil.get_terminal_size((_PLAIN_WIDTH, 24)).columns if terminal else _PLAIN_WIDTH
        self._width = min(max(width, _WIDTHS[0]), _WIDTHS[1])
        self._console = Console(
            file=io.StringIO(),
            width=self._width,
            force_terminal=terminal,
            color_system="auto" if terminal else None,
            markup=False,
            emoji=False,
            highlight=False,
            force_jupyter=False,
            legacy_windows=False,
            no_color="NO_COLOR" in os.environ or None,
        )
        self._coloured = terminal and self._console.color_system is not None and not self._console.no_color

    def render(self, content: RenderableType, *, wrap: bool = True) -> str:
        """Return ``content`` as lines of text, each ended by a newline, with escape codes on a terminal only."""
        with self._console.capture() as capture:
            self._console.print(content, soft_wrap=not wrap)
        return "".join(f"{line.rstrip()}\n" for line in capture.get().splitlines())

    def text(self, value: str, style: str = "") -> Text:
        """Return a string as what can safely be shown: never markup, no control character, only what the output can encode."""
        if self._encoding == "ascii":
            value = value.translate(_ASCII)
        visible = _INVISIBLE.sub(lambda match: match[0].encode("unicode_escape", "surrogatepass").decode("ascii"), value)
        return Text(visible.encode(self._encoding, "backslashreplace").decode(self._encoding), style)

    def section(self, section: Section) -> RenderableType:
        labels = max((len(self.text(row.label)) for block in section.blocks if isinstance(block, Facts) for row in block.rows), default=0)
        labels = min(labels, self._width // 3)
        title = self.text(f"{section.title} · step {section.step:,}", "bold cyan")
        rule = Rule(title, align="left", characters=self.text("─").plain, style="cyan")
        return Group(rule, *(Padding(self._block(block, labels), (0, 0, 0, 1)) for block in section.blocks))

    def _block(self, block: Block, labels: int) -> RenderableType:
        if isinstance(block, Facts):
            return self._titled(block.title, "", self._facts(block.rows, labels))
        if isinstance(block, Table):
            return self._titled(block.title, block.caption, self._table(block), *([self.text(block.footer, "dim")] if block.footer else []))
        if isinstance(block, Comparison):
            return self._titled(block.title, "", *(self._passage(block.pairs) if block.joined else self._comparison(block.pairs)))
        return self.text(block.text, _STYLES[block.tone])

    def _titled(self, title: str, caption: str, *content: RenderableType) -> RenderableType:
        if not title:
            return Group(*content)
        below = [self.text(caption, "dim"), *content] if caption else content
        return Group(self.text(title, "bold"), *(Padding(part, (0, 0, 0, _INDENT)) for part in below))

    def _facts(self, rows: Iterable[Fact], labels: int) -> RichTable:
        grid = RichTable.grid(padding=(0, 2, 0, 0))
        grid.add_column(width=labels, overflow="fold")
        grid.add_column(overflow="fold")
        for row in rows:
            grid.add_row(self.text(row.label, "cyan"), self.text(row.value, _STYLES[row.tone]))
        return grid

    def _table(self, table: Table) -> RenderableType:
        """Lay a table out in columns, with the heads of numbers broken into lines if need be; row below row if that is still too wide."""
        cells = [[self.text(cell) for cell in row] for row in table.rows]
        for broken in (False, True):
            heads = [self.text(column.name) for column in table.columns]
            if broken:
                heads = [Text("\n".join(head.plain.split())) if column.numeric else head for head, column in zip(heads, table.columns)]
            widths = [max(map(_cells, column)) for column in zip(heads, *cells)]
            needed = sum(min(width, _FLEXIBLE) if column.flexible else width for width, column in zip(widths, table.columns))
            if needed + 2 * len(widths) + _INDENT < self._width:
                return self._columns(table.columns, heads, cells)
        return self._stacked(table)

    def _columns(self, columns: Sequence[Column], heads: Sequence[Text], cells: Sequence[Sequence[Text]]) -> RichTable:
        grid = RichTable(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim", show_edge=False)
        for column, head in zip(columns, heads):
            grid.add_column(head, justify="right" if column.numeric else "left", overflow="fold", no_wrap=not column.flexible)
        for row in cells:
            grid.add_row(*row)
        return grid

    def _stacked(self, table: Table) -> RenderableType:
        """Each row as its first cell, and below it the others with the names of their columns, as many in a line as go."""
        lines: list[RenderableType] = []
        for row in table.rows:
            line = Text()
            below: list[Text] = [line]
            for column, cell in zip(table.columns[1:], row[1:]):
                item = self.text(f"{column.name} ", "dim").append_text(self.text(cell))
                if line and line.cell_len + item.cell_len + 3 > self._width - 3 * _INDENT:
                    line = Text()
                    below.append(line)
                if cell and cell != MISSING:
                    line.append_text(self.text(" · " if line else "", "dim")).append_text(item)
            lines += [*([self.text(row[0])] if row[0] else []), *(Padding(text, (0, 0, 0, _INDENT)) for text in below if text)]
        return Group(*lines)

    def _comparison(self, pairs: Sequence[TokenPair]) -> list[RenderableType]:
        """Lay the tokens out in columns, as many lines as the width asks for; without colours a "^" marks each wrong one."""
        heads = ("position", "target", "predicted", "")
        lines: list[RenderableType] = []
        for chunk in _chunks(pairs, self._width - 16):
            texts = [Text(f"{head:<9}", "cyan") for head in heads]
            for pair, width in chunk:
                mark = "" if pair.correct else "^" * len(pair.predicted)
                cells = (str(pair.position), pair.target, pair.predicted, mark)
                styles = ("dim", "", "green" if pair.correct else _WRONG, "bold")
                for text, cell, style in zip(texts, cells, styles):
                    text.append(" " * (2 + width - len(cell))).append_text(self.text(cell, style))
            wrong = any(not pair.correct for pair, _ in chunk)
            lines += texts if wrong and not self._coloured else texts[:3]
        return lines

    def _passage(self, pairs: Sequence[TokenPair]) -> list[RenderableType]:
        """Lay pieces of text out as text, each over its target, as many lines as the width asks for; without colours "^" marks errors."""
        rows: list[list[Text]] = []
        for pair in pairs:
            cells = [self.text(pair.target, "dim"), self.text(pair.predicted, "" if pair.correct else _WRONG)]
            mark = "" if pair.correct else _mark(cells[1].plain, cells[1].cell_len)
            cells.append(self.text(mark, "bold"))
            width = max(cell.cell_len for cell in cells)
            if not rows or rows[-1][0].cell_len + width > self._width - 2 * _INDENT:
                rows.append([Text(f"{head:<11}", "cyan") for head in ("target", "predicted", "")])
            for text, cell in zip(rows[-1], cells):
                text.append_text(cell).append(" " * (width - cell.cell_len))
        return [line for row in rows for line in (row[:2] if self._coloured or "^" not in row[2].plain else row)]


def _mark(piece: str, width: int) -> str:
    """Return "^" below a piece of text, but for the spaces that it begins with; one even if there is nothing else."""
    spaces = min(len(piece) - len(piece.lstrip(" ")), max(width - 1, 0))
    return " " * spaces + "^" * max(width - spaces, 1)


def _cells(text: Text) -> int:
    """Return the columns that the longest line of a text takes."""
    return max(line.cell_len for line in text.split("\n", allow_blank=True))


def _chunks(pairs: Sequence[TokenPair], room: int) -> list[list[tuple[TokenPair, int]]]:
    """Split tokens into lines of at most ``room`` columns, and where positions are left out: each token with its width."""
    lines: list[list[tuple[TokenPair, int]]] = []
    used = 0
    previous = -1
    for pair in pairs:
        width = max(len(str(pair.position)), len(pair.target), len(pair.predicted))
        if not lines or used + width + 2 > room or pair.position != previous + 1:
            lines.append([])
            used = 0
        lines[-1].append((pair, width))
        used += width + 2
        previous = pair.position
    return lines
