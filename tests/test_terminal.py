"""Sections on the terminal."""

from __future__ import annotations

import io
import pickle
import re
import sys
from typing import Any

import pytest
from rich.cells import cell_len
from tqdm import tqdm

from probe.records import Inputs, InputSample, StepRecord
from probe.sections import attention, inputs, outputs, verification
from probe.sections.blocks import Column, Comparison, Fact, Facts, Note, Section, Table, TokenPair
from probe.sinks.terminal import TerminalSink
from records_factory import speech_record, text_record, whisper_record

pytestmark = pytest.mark.pure  # of torch and probe alone: the same with every transformers

CODES = re.compile(r"\x1b\[[0-9;]*m")


class Tty(io.StringIO):
    """A terminal that remembers."""

    def isatty(self) -> bool:
        return True


class Narrow(io.TextIOWrapper):
    """An output of another encoding than UTF-8."""

    def __init__(self, encoding: str) -> None:
        self.bytes = io.BytesIO()
        super().__init__(self.bytes, encoding=encoding, errors="strict", newline="")

    def text(self) -> str:
        self.flush()
        return self.bytes.getvalue().decode(self.encoding)


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Make a coloured terminal of some width."""

    def make(width: int, **environment: str) -> Tty:
        for name in ("NO_COLOR", "FORCE_COLOR", "COLORTERM"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setenv("COLUMNS", str(width))
        monkeypatch.setenv("TERM", "xterm-256color")
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        return Tty()

    return make


def sections(record: StepRecord) -> list[Section]:
    return [module.section(record) for module in (inputs, outputs, attention, verification)]


def shown(file: Any, *blocks: Any) -> str:
    TerminalSink(file=file).show([Section("Title", 1, blocks)])
    text: str = file.getvalue()
    return text


@pytest.mark.parametrize("width", [60, 80, 120, 160])
@pytest.mark.parametrize("record", [whisper_record(), speech_record(), text_record()])
def test_fits_the_terminal(terminal: Any, width: int, record: StepRecord) -> None:
    """No line is wider than the terminal, at 80 and 120 columns and beyond, and nothing measured is cut away."""
    file = terminal(width)
    TerminalSink(file=file).show(sections(record))
    text = CODES.sub("", file.getvalue())
    assert max(map(cell_len, text.splitlines())) <= width
    plain = "".join(text.split())
    for tensor in record.inputs.tensors if record.inputs else ():
        assert tensor.name in plain
        assert "".join(str(list(tensor.shape)).split()) in plain
    for head in record.heads:
        assert head.site in plain
    for reason in record.not_measured.values():
        assert "".join(reason.split()) in plain


def test_wide_output_is_a_table_narrow_output_is_stacked(terminal: Any) -> None:
    """The inputs stand in columns at 120, row below row at 80; numbers of the attention stay in columns at both."""
    wide, narrow = terminal(120), terminal(80)
    TerminalSink(file=narrow).show(sections(whisper_record()))
    assert "shape [2, 80, 3000] · dtype float32 · range -1.5 … 1.812" in CODES.sub("", narrow.getvalue())
    assert re.search(r"layer +entropy +eff\. keys +top", CODES.sub("", narrow.getvalue()))
    wide = terminal(120)
    TerminalSink(file=wide).show(sections(whisper_record()))
    assert re.search(r"input_features +\[2, 80, 3000\] +float32 +-1.5 … 1.812", CODES.sub("", wide.getvalue()))


def test_plain_where_there_is_no_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """A file gets plain text, 120 wide, without an escape code whatever the environment says, and without trailing blanks."""
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "60")
    file = io.StringIO()
    TerminalSink(file=file).show(sections(whisper_record()))
    lines = file.getvalue().splitlines()
    assert "\x1b" not in file.getvalue()
    assert max(map(len, lines)) == 120
    assert all(line == line.rstrip() for line in lines)
    assert lines[0].startswith("Input · step 100 ──")


def test_data_is_shown_never_obeyed(terminal: Any) -> None:
    """Escape sequences, markup, line breaks and changes of direction from data are visible and have no effect, wherever they stand."""
    evil = "\x1b[31mred\x1b]0;title\x07 [bold]loud[/bold] [/] :smile: \r\n\t\x9b2J \u202eltr\u2066 \u2028 \ud800 \x00"
    seen = r"\x1b[31mred\x1b]0;title\x07 [bold]loud[/bold] [/] :smile: \r\n\t\x9b2J \u202eltr\u2066 \u2028 \ud800 \x00"
    table = Table(evil, (Column(evil, flexible=True), Column("b", True)), ((evil, "1"),), evil, evil)
    blocks = (
        Facts((Fact("label", evil), Fact(evil, "value")), evil),
        table,
        Note(evil),
        Comparison(evil, (TokenPair(0, evil, evil, False),)),
    )
    for file in (io.StringIO(), terminal(160)):
        text = shown(file, *blocks)
        assert "".join(seen.split()) in "".join(CODES.sub("", text).split())
        assert not set(CODES.sub("", text)) & set("\x1b\x07\r\t\x9b\u202e\u2066\u2028\ud800\x00")
        assert set(CODES.findall(text)).isdisjoint({"\x1b[31m"})
    file = terminal(160)
    TerminalSink(file=file).say(evil)
    assert CODES.sub("", file.getvalue()) == f"probe: {seen}\n"


def test_decoded_text_is_escaped_end_to_end() -> None:
    """What a tokenizer decodes reaches the terminal through the whole way of a record without being obeyed."""
    record = text_record(inputs=Inputs(1, 1, shown=(InputSample(0, (1,), "a\x1b[31mb [bold]c[/bold]"),)))
    file = io.StringIO()
    TerminalSink(file=file).show(sections(record))
    assert r"a\x1b[31mb [bold]c[/bold]" in file.getvalue()


def test_wrong_tokens_stand_out(terminal: Any) -> None:
    """With colours a wrong token is bold, red and underlined; without, a "^" stands below each of its digits and below no other."""
    pairs = (TokenPair(0, "111", "111", True), TokenPair(1, "222", "2345", False), TokenPair(2, "7", "7", True))
    coloured = shown(terminal(120), Comparison("tokens", pairs))
    assert re.search(r"\x1b\[1;4;31m2345\x1b\[0m", coloured)
    assert not re.search(r"\x1b\[1;4;31m(111|7)\x1b", coloured)
    assert "^" not in coloured
    for text in (
        shown(io.StringIO(), Comparison("tokens", pairs)),
        CODES.sub("", shown(terminal(120, NO_COLOR="1"), Comparison("tokens", pairs))),
    ):
        predicted, marks = text.splitlines()[4:6]
        start = predicted.index("2345")
        assert marks == " " * start + "^^^^"


PIECES = (("the", "the"), (" qu\n", " qu\n"), (" 你", " box"), (" fox", ""), (" jumps", " jump"))


def test_texts_stand_below_each_other(terminal: Any) -> None:
    """Pieces of text read on, each below its target, whatever their width; a "^" stands below each wrong one where there is no colour."""
    pairs = tuple(TokenPair(position, *pair, pair[0] == pair[1]) for position, pair in enumerate(PIECES))
    target, predicted, marks = shown(io.StringIO(), Comparison("text", pairs, joined=True)).splitlines()[2:5]
    assert target == "   target     the qu\\n 你  fox jumps"
    assert predicted == "   predicted  the qu\\n box     jump"
    assert marks == "                       ^^^^    ^^^^"
    coloured = shown(terminal(120), Comparison("text", pairs, joined=True))
    assert "\x1b[1;4;31m box\x1b[0m" in coloured
    assert "^" not in coloured


def test_texts_break_into_lines(terminal: Any) -> None:
    """A text that is wider than the terminal goes on in further lines, and loses no piece."""
    pairs = tuple(TokenPair(position, f" {position:03}", f" {position:03}", True) for position in range(60))
    text = CODES.sub("", shown(terminal(80), Comparison("text", pairs, joined=True)))
    for head in ("target", "predicted"):
        found = [line for line in text.splitlines() if line.strip().startswith(head)]
        assert len(found) > 2
        assert all(cell_len(line) <= 80 for line in found)
        assert "".join(line.strip().removeprefix(head) for line in found).split() == [f"{position:03}" for position in range(60)]


def test_tokens_break_into_lines(terminal: Any) -> None:
    """Tokens stay below each other in lines that fit; a gap in the positions begins a new line."""
    pairs = tuple(TokenPair(position, str(position * 7919), str(position * 7919), True) for position in (*range(10), *range(90, 100)))
    for width, lines in ((120, 2), (60, 4)):
        text = CODES.sub("", shown(terminal(width), Comparison("tokens", pairs)))
        targets = [line.split()[1:] for line in text.splitlines() if line.strip().startswith("target")]
        assert len(targets) == lines
        assert [token for line in targets for token in line] == [pair.target for pair in pairs]
        assert str(90 * 7919) in [line[0] for line in targets]


def test_reasons_are_dim_yellow(terminal: Any) -> None:
    """What was not measured looks different from what was."""
    text = shown(terminal(120), Facts((Fact("a", "not measured: why", "missing"), Fact("b", "fine"))))
    assert "\x1b[2;33mnot measured: why" in text
    assert re.search(r"(?<!m)fine", text)


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252"])
def test_degrades_to_what_the_output_can_write(encoding: str) -> None:
    """An output without our characters gets ASCII of the same layout, and data as backslash escapes."""
    file = Narrow(encoding)
    sink = TerminalSink(file=file)
    record = text_record(inputs=Inputs(1, 1, shown=(InputSample(0, (1,), "grüße 世界 …"),)), metrics={"probe/attention/entropy": 0.5})
    sink.show([*sections(record), *sections(whisper_record())])
    sink.say("größe")
    text = file.text()
    assert sink.failure == ""
    assert text.isascii()
    assert r"gr\xfc\xdfe \u4e16\u754c ..." in text
    assert r"probe: gr\xf6\xdfe" in text
    assert "Input - step 100 ----" in text
    assert "-1.5 ... 1.812" in text
    assert "text -> audio" in text
    assert max(map(len, text.splitlines())) <= 120


def test_a_lying_encoding_is_caught() -> None:
    """An output that claims UTF-8 and refuses it still gets its text, escaped."""

    class Liar(io.StringIO):
        encoding = "utf-8"

        def write(self, text: str) -> int:
            text.encode("ascii")
            return super().write(text)

    file = Liar()
    TerminalSink(file=file).say("größe")
    assert file.getvalue() == "probe: gr\\xf6\\xdfe\n"


def test_a_closed_output_does_not_raise() -> None:
    """Training goes on when the output was closed, is a broken pipe, or is not there at all; the sink says why nothing arrived."""

    class Broken(io.StringIO):
        def write(self, text: str) -> int:
            raise BrokenPipeError(32, "Broken pipe")

    closed = io.StringIO()
    closed.close()
    for file, word in ((closed, "closed"), (Broken(), "Broken pipe")):
        sink = TerminalSink(file=file)
        sink.show(sections(whisper_record()))
        assert word in sink.failure
        sink.say("still here")
        assert word in sink.failure


def test_standard_output_is_looked_up_each_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a file the sink follows ``sys.stdout``, also when that is gone for a while."""
    sink = TerminalSink()
    for file in (io.StringIO(), io.StringIO()):
        monkeypatch.setattr(sys, "stdout", file)
        sink.say("hello")
        assert file.getvalue() == "probe: hello\n"
    monkeypatch.setattr(sys, "stdout", None)
    sink.say("hello")
    assert sink.failure == "there is no standard output"


def test_above_the_progress_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    """A running bar is cleared before the sections are written and drawn again below them."""
    screen = Tty()
    monkeypatch.setattr(sys, "stdout", screen)
    monkeypatch.setattr(sys, "stderr", screen)
    with tqdm(total=10, file=screen, ncols=60, ascii=True) as bar:
        bar.update(3)
        bar.refresh()
        screen.truncate(0)
        screen.seek(0)
        TerminalSink().say("above")
        text = CODES.sub("", screen.getvalue())
    before, after = text.split("probe: above\n")
    assert before.strip() == ""
    assert before.startswith("\r")
    assert "3/10" in after
    assert "probe" not in after


def test_messages_are_one_line(terminal: Any) -> None:
    """A message is never wrapped nor split, so that it can be searched for."""
    message = "x " * 300
    for file in (io.StringIO(), terminal(60)):
        TerminalSink(file=file).say(message + "\nend")
        assert CODES.sub("", file.getvalue()) == f"probe: {message}\\nend\n"


def test_the_sink_can_be_pickled() -> None:
    """Whoever holds the sink can be copied and saved as before."""
    assert pickle.loads(pickle.dumps(TerminalSink())).failure == ""
