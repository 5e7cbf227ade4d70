"""The quick part of the fault benchmark: each fault is found, and the healthy runs are left in peace."""

from __future__ import annotations

from pathlib import Path

import pytest

from flash_stand_in import VERSION

if VERSION < (5, 0):
    pytest.skip("the benchmark is made with the newest transformers", allow_module_level=True)

from benchmarks.faults.bases import make_base
from benchmarks.faults.fault import Fault
from benchmarks.faults.running import SUBJECTS, run_one
from benchmarks.faults.scoring import score
from benchmarks.faults.subset import QUICK


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with the weights to begin with, trained for a shorter time than in the whole benchmark."""
    folder = tmp_path_factory.mktemp("bases")
    for model in sorted({name.split("/")[0] for name in QUICK}):
        make_base(model, folder, steps=120)
    return folder


@pytest.mark.parametrize("name", sorted(QUICK))
def test_what_the_findings_say(name: str, bases: Path, tmp_path: Path) -> None:
    """The expected finding of a fault appears and no other critical one; of a healthy run no critical finding and no warning."""
    result = run_one(name, bases, tmp_path / "run")
    assert not result.error
    assert not result.switched_off
    judged = score(result)
    assert not judged.critical, result.findings
    if isinstance(SUBJECTS[name], Fault):
        assert judged.named_at is not None, result.findings
    else:
        assert not judged.wrong, result.findings
