"""The run folder on disk."""

from __future__ import annotations

import copy
import json
import math
import multiprocessing
import os
import pickle
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import probe.sinks.run_folder as module
from probe.errors import RunFolderError
from probe.records import Site
from probe.records_json import SCHEMA_MAJOR, from_json
from probe.runs.load import load
from probe.settings import Settings
from probe.sinks.run_folder import RunFolder
from records_factory import finding, speech_record, whisper_record


def folder(path: Path, **facts: Any) -> RunFolder:
    return RunFolder(path / "out" / "_probe", facts=facts)


def test_nothing_before_the_first_write(tmp_path: Path) -> None:
    """A run that never writes leaves nothing behind."""
    folder(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_records_are_lines(tmp_path: Path) -> None:
    """Each record is one whole line, in order, and no other file than the two is left."""
    sink = folder(tmp_path)
    sink.write(whisper_record(1))
    sink.write(speech_record(100))
    lines = (tmp_path / "out/_probe/records-rank00000.jsonl").read_bytes().split(b"\n")
    assert lines.pop() == b""
    assert [from_json(line.decode()) for line in lines] == [whisper_record(1), speech_record(100)]
    assert {path.name for path in sink.path.iterdir()} == {"run.json", "records-rank00000.jsonl"}


def test_findings_are_lines(tmp_path: Path) -> None:
    """Each event is one whole line, in order, in a file of its own; no event, no file. A line that was cut off is left alone."""
    sink = folder(tmp_path)
    sink.write_findings([])
    assert list(tmp_path.iterdir()) == []
    first, second = finding(), replace(finding(), message="a\nb")
    sink.write_findings([first, second])
    with (sink.path / "findings.jsonl").open("a") as file:
        file.write('{"code":')
    sink.write_findings([first])
    sink.write(whisper_record(1))
    run = load(sink.path)
    assert run.findings == (first, second, first)
    assert run.broken_lines == 1
    assert (sink.path / "findings.jsonl").read_bytes().endswith(b"\n")


def test_findings_that_cannot_be_written(tmp_path: Path) -> None:
    """The error names the step and the file."""
    sink = folder(tmp_path)
    sink.path.parent.mkdir()
    sink.path.write_text("a file where the folder should be")
    with pytest.raises(RunFolderError, match=r"findings of step 7 .*findings\.jsonl"):
        sink.write_findings([replace(finding(), step=7)])


def test_run_json(tmp_path: Path) -> None:
    """``run.json`` holds schema, versions and the facts, whatever those are made of, as strict JSON."""
    site = Site("model.encoder", "audio_encoder", "mel front end")
    sink = folder(
        tmp_path, settings=Settings(run_folder=Path("a/b")), sites=(site,), reasons={"projector": "none"}, keep=frozenset({"b", "a"}),
        odd=math.nan, mode=torch.float32, long=b"x" * 5000, schema="mine", flag=True, device={0: [1.5]},
    )  # fmt: skip
    sink.write(whisper_record())
    facts = json.loads((sink.path / "run.json").read_text(), parse_constant=lambda name: pytest.fail(name))
    assert facts["schema"] == {"major": SCHEMA_MAJOR, "minor": 0}
    assert set(facts["versions"]) == {"python", "torch", "transformers", "probe"}
    assert facts["versions"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert facts["settings"]["run_folder"] == os.path.join("a", "b")  # noqa: PTH118 - a string, not a path
    assert facts["settings"]["attention_rows"] == 64
    assert facts["sites"][0]["found_by"] == "mel front end"
    assert facts["keep"] == ["a", "b"]
    assert facts["odd"] is None
    assert facts["mode"] == "torch.float32"
    assert len(facts["long"]) < 250
    assert facts["flag"] is True
    assert facts["device"] == {"0": [1.5]}
    assert facts["reasons"] == {"projector": "none"}


def test_run_json_is_written_once_and_atomically(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """``run.json`` is written at the first write of a run, by a replace, and a failing one leaves neither half a file nor a temporary."""
    sink = folder(tmp_path, run=1)
    sink.write(whisper_record(1))
    before = (sink.path / "run.json").stat()
    sink.write(whisper_record(2))
    assert (sink.path / "run.json").stat().st_ino == before.st_ino
    resumed = folder(tmp_path, run=2)

    def fail(self: Path, target: Path) -> Path:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(RunFolderError, match="No space left"):
        resumed.write(whisper_record(3))
    assert json.loads((sink.path / "run.json").read_text())["run"] == 1
    assert {path.name for path in sink.path.iterdir()} == {"run.json", "records-rank00000.jsonl"}
    monkeypatch.undo()
    resumed.write(whisper_record(3))
    assert json.loads((sink.path / "run.json").read_text())["run"] == 2


def test_a_resume_appends(tmp_path: Path) -> None:
    """A second writer on the same folder adds its lines and keeps those that are there."""
    folder(tmp_path).write(whisper_record(1))
    folder(tmp_path).write(whisper_record(2))
    folder(tmp_path).write(whisper_record(2, time=5.0))
    assert len(folder(tmp_path).records.read_text().splitlines()) == 3
    run = load(tmp_path / "out")
    assert [(record.step, record.time) for record in run.records] == [(1, whisper_record().time), (2, 5.0)]


@pytest.mark.parametrize("kept", [1, 40, -1])
def test_a_cut_off_line_costs_only_itself(tmp_path: Path, kept: int) -> None:
    """What a killed process left of its last line does not spoil the line that a resume writes."""
    sink = folder(tmp_path)
    for step in (1, 2):
        sink.write(whisper_record(step))
    whole = sink.records.read_bytes()
    last = whole.rindex(b"\n", 0, len(whole) - 1) + 1
    sink.records.write_bytes(whole[:last] + whole[last:][:kept])
    folder(tmp_path).write(whisper_record(3))
    run = load(sink.path)
    complete = kept == -1
    assert [record.step for record in run.records] == ([1, 2, 3] if complete else [1, 3])
    assert run.broken_lines == (0 if complete else 1)
    assert not run.truncated


def test_a_line_is_one_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A line reaches the file in one write, so that a reader or a kill sees no other cut than at its end; a short write is an error."""
    sink = folder(tmp_path)
    sink.write(whisper_record(1))
    writes: list[bytes] = []
    real = Path.open

    class Watched:
        def __init__(self, file: Any) -> None:
            self.file = file

        def __enter__(self) -> Watched:
            return self

        def __exit__(self, *_: object) -> None:
            self.file.close()

        def __getattr__(self, name: str) -> Any:
            return getattr(self.file, name)

        def write(self, data: bytes) -> int:
            writes.append(data)
            written: int = self.file.write(data[: len(data) // (1 + short)])
            return written

    def watched(self: Path, mode: str = "r", buffering: int = -1) -> Any:
        assert buffering == 0
        return Watched(real(self, mode, buffering))

    monkeypatch.setattr(Path, "open", watched)
    short = False
    sink.write(speech_record(2))
    assert len(writes) == 1
    assert len(writes[0]) > 8192
    short = True
    with pytest.raises(RunFolderError, match="bytes were written"):
        sink.write(speech_record(3))
    monkeypatch.undo()
    sink.write(whisper_record(4))
    assert [record.step for record in load(sink.path).records] == [1, 2, 4]


def _write_for_ever(path: Path) -> None:
    sink = RunFolder(path, facts={})
    step = 0
    while True:
        step += 1
        sink.write(speech_record(step))


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="forks, because a fresh process would first import torch")
def test_killed_while_writing(tmp_path: Path) -> None:
    """A process killed in the middle of writing leaves a folder that loads, with every whole line, in unbroken order."""
    context = multiprocessing.get_context("fork")
    process = context.Process(target=_write_for_ever, args=(tmp_path / "_probe",))
    process.start()
    records = tmp_path / "_probe" / "records-rank00000.jsonl"
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and not (records.exists() and records.stat().st_size > 300_000):
        time.sleep(0.01)
        if records.exists() and (tmp_path / "_probe/run.json").exists():
            load(tmp_path)
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    run = load(tmp_path)
    assert [record.step for record in run.records] == list(range(1, len(run.records) + 1))
    assert len(run.records) > 5
    assert run.broken_lines == 0


def test_ranks_write_files_of_their_own(tmp_path: Path) -> None:
    """Another rank writes its own records and leaves ``run.json`` to rank 0."""
    RunFolder(tmp_path, facts={}, rank=3).write(whisper_record(1))
    assert [path.name for path in tmp_path.iterdir()] == ["records-rank00003.jsonl"]


def test_a_removed_folder_is_made_again(tmp_path: Path) -> None:
    """A folder removed while training runs comes back, ``run.json`` with it."""
    sink = folder(tmp_path)
    sink.write(whisper_record(1))
    for path in sink.path.iterdir():
        path.unlink()
    sink.path.rmdir()
    sink.write(whisper_record(2))
    run = load(sink.path)
    assert [record.step for record in run.records] == [2]
    assert run.facts["schema"]["major"] == SCHEMA_MAJOR


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    """A file in the way is an error of one kind for records and tensors, which names the place and the step."""
    (tmp_path / "out").write_text("a file")
    sink = folder(tmp_path)
    for write in (lambda: sink.write(whisper_record(7)), lambda: sink.write_kept(7, {"a": torch.zeros(1)})):
        with pytest.raises(RunFolderError, match=r"cannot write the .* of step 7 to .*_probe"):
            write()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_a_full_disk(tmp_path: Path) -> None:
    """A full disk is the same kind of error, with the system's words for it."""
    full = RunFolder(tmp_path / "fine", facts={})
    full.write(whisper_record(1))
    full.records.unlink()
    full.records.symlink_to("/dev/full")
    with pytest.raises(RunFolderError, match="No space left"):
        full.write(whisper_record(2))


def test_a_record_that_is_no_plain_data(tmp_path: Path) -> None:
    """A record that cannot be written is the same kind of error, and leaves no half line."""
    sink = folder(tmp_path)
    sink.write(whisper_record(1))
    before = sink.records.read_bytes()
    with pytest.raises(RunFolderError, match="probe/loss"):
        sink.write(whisper_record(2, metrics={"probe/loss": torch.zeros(1)}))
    assert sink.records.read_bytes() == before


def test_kept_tensors(tmp_path: Path) -> None:
    """Kept tensors come back equal, also views, shared memory, half precision, and with a graph; no temporary is left."""
    torch.manual_seed(0)
    base = torch.randn(4, 6, requires_grad=True) * 2
    tensors = {
        "model.encoder/0": base,
        "a view": base.t(),
        "the same": base,
        "expanded": torch.randn(1, 3).expand(5, 3),
        "bf16": torch.randn(3).to(torch.bfloat16),
        "ids": torch.arange(5),
        "none": torch.zeros(0, 3),
    }
    sink = folder(tmp_path)
    sink.write_kept(100, tensors)
    path = sink.path / "kept" / "step-00000100.safetensors"
    back = load_file(path)
    assert set(back) == set(tensors)
    for name, tensor in tensors.items():
        assert torch.equal(back[name], tensor)
        assert back[name].dtype == tensor.dtype
    assert [file.name for file in path.parent.iterdir()] == [path.name]
    sink.write_kept(100, {"a": torch.ones(2)})
    assert set(load_file(path)) == {"a"}
    assert load(tmp_path / "out").records == ()


def test_kept_tensors_that_cannot_be_written(tmp_path: Path) -> None:
    """A type that the format does not know is an error of ours; what was there before stays, and no temporary is left."""
    sink = folder(tmp_path)
    sink.write_kept(1, {"a": torch.ones(2)})
    with pytest.raises(RunFolderError, match="kept tensors of step 1"):
        sink.write_kept(1, {"a": torch.ones(2).to_sparse()})
    with pytest.raises(RunFolderError, match="kept tensors of step 1"):
        sink.write_kept(1, {"a": torch.ones(2, device="meta")})
    assert [file.name for file in (sink.path / "kept").iterdir()] == ["step-00000001.safetensors"]
    assert torch.equal(load_file(sink.path / "kept" / "step-00000001.safetensors")["a"], torch.ones(2))


def test_the_sink_can_be_copied_and_pickled(tmp_path: Path) -> None:
    """Whoever holds the sink can be copied and saved as before; the copy goes on writing."""
    sink = folder(tmp_path, run=1)
    sink.write(whisper_record(1))
    copy.deepcopy(sink).write(whisper_record(2))
    pickle.loads(pickle.dumps(sink)).write(whisper_record(3, findings=(finding(),)))
    assert [record.step for record in load(sink.path).records] == [1, 2, 3]


def test_versions_without_an_installed_package(monkeypatch: pytest.MonkeyPatch) -> None:
    """A package that is on the path but not installed is said to be so."""
    assert module._version("no-such-distribution-1234") == "not installed as a package"
