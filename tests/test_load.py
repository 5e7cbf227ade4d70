"""Reading a run folder back."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from probe.errors import ProbeValueError, RunFolderError
from probe.records_json import SCHEMA_MAJOR, to_json
from probe.runs.load import load
from records_factory import finding, whisper_record


def make(path: Path, *records: object, facts: object = None, findings: tuple[object, ...] = ()) -> Path:
    """Write a run folder by hand, independent of the sink that writes real ones."""
    path.mkdir(parents=True)
    (path / "records-rank00000.jsonl").write_text("".join(f"{to_json(record)}\n" for record in records))
    (path / "run.json").write_text(json.dumps({"schema": {"major": SCHEMA_MAJOR, "minor": 0}} if facts is None else facts))
    if findings:
        (path / "findings.jsonl").write_text("".join(f"{to_json(line)}\n" for line in findings))
    return path


def test_the_three_ways_to_name_a_run(tmp_path: Path) -> None:
    """The run folder, the output folder that holds it, and its ``run.json`` all name the run, as path or string."""
    path = make(tmp_path / "out" / "_probe", whisper_record(1))
    for name in (path, tmp_path / "out", path / "run.json", str(path)):
        run = load(name)
        assert run.path == path
        assert run.records == (whisper_record(1),)


@pytest.mark.parametrize(
    ("written", "read"),
    [
        ([1, 100, 200], [0, 1, 2]),
        ([1, 100, 200, 200], [0, 1, 3]),
        ([1, 100, 200, 300, 151, 200], [0, 1, 4, 5]),
        ([1, 100, 200, 1, 100], [3, 4]),
        ([1, 5, 1], [2]),
    ],
)
def test_only_the_newest_training_is_read(tmp_path: Path, written: list[int], read: list[int]) -> None:
    """Where a resume, or a new run in the same folder, goes back to a step, the lines from that step on stand no more."""
    lines = [whisper_record(step, metrics={"probe/loss": float(i)}) for i, step in enumerate(written)]
    run = load(make(tmp_path / "run", *lines))
    assert [record.metrics["probe/loss"] for record in run.records] == read
    assert [record.step for record in run.records] == [written[i] for i in read]


def test_series(tmp_path: Path) -> None:
    """A metric as two arrays, over the steps that have it."""
    steps = (1, 100, 200, 300)
    records = [whisper_record(step, metrics={"probe/loss": step / 7} if step != 200 else {}) for step in steps]
    found, values = load(make(tmp_path / "run", *records)).series("probe/loss")
    assert found.dtype == np.int64
    assert values.dtype == np.float64
    assert found.tolist() == [1, 100, 300]
    assert values.tolist() == [1 / 7, 100 / 7, 300 / 7]


def test_series_of_an_unknown_metric(tmp_path: Path) -> None:
    """A name in no record is an error with the nearest names that are there, and with the reason if a record has one."""
    run = load(make(tmp_path / "run", whisper_record(1), whisper_record(2)))
    with pytest.raises(ProbeValueError, match="probe/text/token_accuracy"):
        run.series("probe/text/token_acuracy")
    with pytest.raises(ProbeValueError, match="one clip in every batch"):
        run.series("probe/audio_encoder/batch_std")
    with pytest.raises(ProbeValueError, match="no record"):
        load(make(tmp_path / "empty")).series("probe/loss")


def test_cut_off_at_every_length(tmp_path: Path) -> None:
    """Whatever is left of the last line, the run loads with all lines before it, and says that one was cut off."""
    path = make(tmp_path / "run", whisper_record(1), whisper_record(2, inputs=None, attention=(), heads=()))
    whole = (path / "records-rank00000.jsonl").read_bytes()
    first = whole.index(b"\n") + 1
    for length in range(first, len(whole) + 1, 7):
        (path / "records-rank00000.jsonl").write_bytes(whole[:length])
        run = load(path)
        assert run.records[0] == whisper_record(1)
        assert run.truncated == (first < length < len(whole) - 1)
        assert len(run.records) == (2 if length >= len(whole) - 1 else 1)
        assert run.broken_lines == 0


def test_broken_lines_in_the_middle(tmp_path: Path) -> None:
    """Lines that cannot be read are left out and counted, whatever is in them; blank lines are none."""
    path = make(tmp_path / "run")
    broken = [b"{", b"[]", b"\xff\xfe\x00", b'{"step": "x", "time": 0, "ranks": 1}', b'{"step": NaN}', b"[" * 100_000]
    lines = [to_json(whisper_record(1)).encode(), *broken, b"", to_json(whisper_record(2)).encode()]
    (path / "records-rank00000.jsonl").write_bytes(b"\n".join(lines) + b"\n")
    run = load(path)
    assert [record.step for record in run.records] == [1, 2]
    assert run.broken_lines == len(broken)
    assert not run.truncated


def test_findings(tmp_path: Path) -> None:
    """The history of findings is read in order, with what a later version writes beside it ignored."""
    path = make(tmp_path / "run", whisper_record(1), findings=(finding(), finding()))
    with (path / "findings.jsonl").open("a") as file:
        file.write(to_json(finding())[:-1] + ',"later":"unknown"}\n{"code":')
    run = load(path)
    assert run.findings == (finding(),) * 3
    assert run.truncated


def test_findings_of_a_training_that_was_given_up(tmp_path: Path) -> None:
    """Where a resume, or a new run in the folder, went back to an earlier step, findings from that step on stand no more."""
    steps = [(100, 1.0), (200, 2.0), (300, 3.0), (200, 12.0), (300, 13.0)]
    records = [whisper_record(step, time=time) for step, time in steps]
    made = [(100, 1.0, True), (200, 2.0, False), (300, 3.0, False), (200, 12.0, True), (300, 13.0, True)]
    lines = [replace(finding(), step=step, time=time) for step, time, _ in made]
    run = load(make(tmp_path / "run", *records, findings=tuple(lines)))
    assert run.findings == tuple(line for line, (_, _, stands) in zip(lines, made) if stands)


def test_newer_schema(tmp_path: Path) -> None:
    """A newer major schema is refused in clear words; a newer minor one is read."""
    newer = {"schema": {"major": SCHEMA_MAJOR + 1, "minor": 0}, "versions": {"probe": "9.1"}}
    with pytest.raises(
        RunFolderError, match=rf"schema {SCHEMA_MAJOR + 1} \(trainer-probe 9\.1\).*up to schema {SCHEMA_MAJOR}.*newer trainer-probe"
    ):
        load(make(tmp_path / "newer", whisper_record(1), facts=newer))
    minor = {"schema": {"major": SCHEMA_MAJOR, "minor": 99}}
    assert len(load(make(tmp_path / "minor", whisper_record(1), facts=minor)).records) == 1


def test_what_is_no_run_folder(tmp_path: Path) -> None:
    """A folder without a run, a missing one and a file say what was looked for."""
    (tmp_path / "file.txt").write_text("x")
    for path in (tmp_path, tmp_path / "missing", tmp_path / "file.txt"):
        with pytest.raises(RunFolderError, match=r"looked for run\.json or records-rank00000\.jsonl"):
            load(path)
    with pytest.raises(RunFolderError, match="does not exist"):
        load(tmp_path / "missing")


def test_a_run_json_that_is_broken(tmp_path: Path) -> None:
    """A ``run.json`` that is none is an error that says how to go on; without it the records are read."""
    path = make(tmp_path / "run", whisper_record(1))
    for text in ("{", "[]"):
        (path / "run.json").write_text(text)
        with pytest.raises(RunFolderError, match=r"run\.json"):
            load(path)
    (path / "run.json").unlink()
    run = load(path)
    assert run.facts == {}
    assert run.records == (whisper_record(1),)


def test_reads_without_the_model_side(tmp_path: Path) -> None:
    """Loading a run imports none of torch, transformers and rich."""
    path = make(tmp_path / "run", whisper_record(1))
    code = (
        "import sys; from probe.runs.load import load; load(sys.argv[1]).series('probe/loss');"
        "sys.exit(bool({'torch', 'transformers', 'rich', 'safetensors'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code, str(path)], check=False).returncode == 0
