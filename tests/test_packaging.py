"""The wheel: what is in it, what it says of itself, and that the stated versions hang together."""

from __future__ import annotations

import ast
import configparser
import email.message
import email.parser
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the wheel from a copy of the checkout: a build leaves files in its source folder, and takes up those of an earlier one."""
    folder = tmp_path_factory.mktemp("wheel")
    ignored = shutil.ignore_patterns(".git", ".venv*", ".*_cache", "__pycache__", "*.egg-info", "build", "dist", "_build", "demo-output")
    shutil.copytree(ROOT, folder / "source", ignore=ignored)
    for name in ("tests", "benchmarks", "docs"):  # to be left out although they look like packages
        (folder / "source" / name).mkdir(exist_ok=True)
        (folder / "source" / name / "__init__.py").touch()
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--quiet", "-w", str(folder), "."]
    done = subprocess.run(command, cwd=folder / "source", capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (built,) = folder.glob("*.whl")
    return built


def metadata(wheel: Path) -> email.message.Message:
    """Return the wheel's METADATA."""
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        return email.parser.Parser().parsestr(archive.read(name).decode("utf-8"))


def version() -> str:
    """Return the literal in probe/__init__.py."""
    tree = ast.parse((ROOT / "probe" / "__init__.py").read_text(encoding="utf-8"))
    (value,) = (
        node.value for node in tree.body if isinstance(node, (ast.Assign, ast.AnnAssign)) and ast.unparse(node).startswith("__version__")
    )
    assert isinstance(value, ast.Constant)
    return str(value.value)


def test_the_wheel_holds_the_package_and_nothing_else(wheel: Path) -> None:
    """All of probe/, its type marker included, and no tests, benchmarks or documentation."""
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
    expected = {path.relative_to(ROOT).as_posix() for path in (ROOT / "probe").rglob("*.py")} | {"probe/py.typed"}
    assert names == expected


def test_every_folder_of_the_package_is_a_package() -> None:
    """A folder without __init__.py would be missing from the wheel."""
    folders = {path.parent for path in (ROOT / "probe").rglob("*.py")}
    assert [str(folder) for folder in sorted(folders) if not (folder / "__init__.py").is_file()] == []


def test_the_wheel_names_itself(wheel: Path) -> None:
    """Name, version, Python and licence are as stated in one place each."""
    about = metadata(wheel)
    assert about["Name"] == "trainer-probe"
    assert about["Version"] == version()
    assert about["Requires-Python"] == ">=3.10"
    assert about["Description-Content-Type"] == "text/markdown"
    assert (ROOT / "README.md").read_text(encoding="utf-8").splitlines()[0] in str(about.get_payload())
    with zipfile.ZipFile(wheel) as archive:
        assert any(name.endswith("/LICENSE") for name in archive.namelist())


def test_what_the_package_imports_is_required(wheel: Path) -> None:
    """Every distribution that probe/ imports outside a function is among the requirements, and nothing else is."""
    imported = set()
    for path in (ROOT / "probe").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                imported |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                imported.add(node.module.split(".")[0])
    optional = {"jiwer", "matplotlib", "triton"}
    third_party = imported - set(sys.stdlib_module_names) - {"probe"} - optional
    required = [Requirement(line) for line in metadata(wheel).get_all("Requires-Dist", [])]
    core = {requirement.name for requirement in required if requirement.marker is None}
    assert third_party - core == set()
    # The Trainer imports accelerate; the package itself may not.
    assert core - third_party <= {"accelerate"}


@pytest.mark.parametrize("line", ["newest", "middle", "oldest"])
def test_the_tested_versions_are_allowed(line: str) -> None:
    """Every pin of a constraints file lies within the range that setup.cfg asks for, and every requirement is pinned."""
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg", encoding="utf-8")
    stated = [setup["options"]["install_requires"], *setup["options.extras_require"].values()]
    wanted = [line for section in stated for line in section.splitlines() if line]
    pins: dict[str, list[str]] = {}
    for file in ("common", line):
        for row in (ROOT / "constraints" / f"{file}.txt").read_text(encoding="utf-8").splitlines():
            if "==" in row:
                pin = Requirement(row)
                pins.setdefault(pin.name, []).append(str(pin.specifier).removeprefix("=="))
    for requirement in map(Requirement, wanted):
        if requirement.name not in ("trainer-probe", "triton"):  # torch built for CUDA asks for a Triton of its own
            assert requirement.name in pins, f"{requirement.name} is not pinned"
            assert all(requirement.specifier.contains(pin) for pin in pins[requirement.name]), f"{requirement} against {pins}"
