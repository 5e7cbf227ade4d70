"""The house rules that a machine can hold: who may import whom, and what is done in one place only."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

pytestmark = pytest.mark.pure  # of torch and probe alone: the same with every transformers

ROOT = Path(__file__).parents[1] / "probe"
FILES = sorted(ROOT.rglob("*.py"))

# From the ground up: a room may import from itself and from the rooms named here.
MAY_IMPORT: dict[str, set[str]] = {
    "errors": set(),
    "records": set(),
    "settings": {"errors", "records"},
    "records_json": {"errors", "records"},
    "metrics": {"catalogue", "errors"},
    "catalogue": set(),
    "foreign": set(),
    "sites": {"errors", "records", "settings", "foreign", "capture.microbatch", "measure.heads", "measure.variants"}
    | {"measure.audio_checks", "measure.code_agreement"},
    "measure": {"errors", "foreign", "sites.modality"},
    "capture": {"errors", "records", "settings", "foreign", "sites", "measure"},
    "merge": {"foreign", "capture"},
    "assemble": {"records", "foreign", "measure", "sites", "merge", "capture", "counterfactual"},
    "counterfactual": {"records", "settings", "foreign", "sites", "measure", "capture"},
    "findings": {"records"},
    "sections": {"records", "counterfactual.groups"},
    "sinks": {"errors", "records", "records_json", "sections"},
    "runs": {"errors", "metrics", "records", "records_json"},
    "observation": {"errors", "records", "settings", "foreign", "sites", "capture", "merge", "assemble", "counterfactual"},
    "runfacts": {"observation", "records", "settings"},
    "diagnosis": {"capture", "findings", "records"},
    "publication": {"observation", "capture", "diagnosis", "records", "sections", "sinks"},
    "registry": set(),
    "trainer": {
        "records",
        "settings",
        "metrics",
        "foreign",
        "capture",
        "sections",
        "sinks",
        "observation",
        "diagnosis",
        "publication",
        "runfacts",
    }
    | {"attachment", "sites"},
    "attachment": {"capture", "errors", "merge", "records", "registry", "settings", "sinks", "sites", "trainer"},
    "callbacks": {"errors", "records", "sections", "trainer"},
    "api": {"attachment", "callbacks", "errors", "settings", "sites", "trainer"},
    "__init__": {"api", "attachment", "errors", "records", "runs", "settings"},
}


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


def imports_of(path: Path, *, run_time: bool = False) -> Iterator[str]:
    """Yield the modules that a file imports; with ``run_time`` without those under TYPE_CHECKING."""
    tree = ast.parse(path.read_text())
    hidden: set[ast.AST] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            hidden |= {inner for statement in node.body for inner in ast.walk(statement)}
    for node in ast.walk(tree):
        if run_time and node in hidden:
            continue
        if isinstance(node, ast.ImportFrom):
            yield node.module or ""
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


def test_every_room_is_in_the_table() -> None:
    """A new room or file at the top is entered in the table of who may import whom."""
    assert {module_of(path).split(".")[0] for path in FILES} == set(MAY_IMPORT)


@pytest.mark.parametrize("path", FILES, ids=module_of)
def test_imports_follow_the_table(path: Path) -> None:
    """Nobody imports a room that the table does not allow."""
    room = module_of(path).split(".")[0]
    for name in imports_of(path):
        if name.startswith("probe."):
            target = name.removeprefix("probe.")
            allowed = {room} | MAY_IMPORT[room]
            assert target.split(".")[0] in allowed or target in allowed, f"{module_of(path)} imports {name}"


def test_there_is_no_import_cycle() -> None:
    """What files import when they run has an order."""
    graph = {
        module_of(path).removesuffix(".__init__"): {
            n.removeprefix("probe.") for n in imports_of(path, run_time=True) if n.startswith("probe.")
        }
        for path in FILES
    }
    done: set[str] = set()
    while ready := {name for name, needs in graph.items() if name not in done and needs <= done}:
        done |= ready
    assert set(graph) - done == set()


@pytest.mark.parametrize(
    ("word", "homes"),
    [
        ("wrapt", {"foreign/patching.py"}),
        ("rich", {"sinks/terminal.py"}),
        ("safetensors", {"sinks/run_folder.py"}),
        ("jiwer", {"assemble/words.py"}),
    ],
)
def test_a_library_is_imported_in_one_place(word: str, homes: set[str]) -> None:
    """One place uses wrapt, one rich, one safetensors, one jiwer."""
    users = {str(p.relative_to(ROOT)) for p in FILES if any(name.split(".")[0] == word for name in imports_of(p))}
    assert users == homes


@pytest.mark.parametrize(
    ("calls", "homes"),
    [
        ({"register_forward_hook", "register_forward_pre_hook", "register_full_backward_hook"}, {"capture/hooks.py"}),
        ({"all_reduce", "all_gather", "broadcast", "barrier"}, {"merge/ranks.py"}),
        ({"item", "nonzero", "manual_seed", "randperm", "rand", "randn"}, set()),
    ],
)
def test_an_action_is_done_in_one_place(calls: set[str], homes: set[str]) -> None:
    """Module hooks are registered, and collectives issued, in one place each; nothing waits with .item() or draws a random number."""
    users = set()
    for path in FILES:
        names = {
            node.func.attr
            for node in ast.walk(ast.parse(path.read_text()))
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)
        }
        if names & calls:
            users.add(str(path.relative_to(ROOT)))
    assert users == homes


def test_private_names_of_torch_and_transformers_stay_in_their_room() -> None:
    """An attribute with a leading underscore on something of torch or transformers is used in foreign/ only."""
    private = {"_foreach_norm", "_current_graph_task_id", "_get_default_store", "_can_record_outputs", "_compiled_call_impl", "_scale"}
    users = {
        str(path.relative_to(ROOT)).split("/")[0]
        for path in FILES
        for node in ast.walk(ast.parse(path.read_text()))
        if (isinstance(node, ast.Attribute) and node.attr in private) or (isinstance(node, ast.Constant) and node.value in private)
    }
    assert users == {"foreign"}


@pytest.mark.parametrize("path", FILES, ids=module_of)
def test_a_file_says_its_one_job(path: Path) -> None:
    """The first line of each file's docstring states its job and ends with a full stop."""
    docstring = ast.get_docstring(ast.parse(path.read_text()))
    assert docstring
    assert docstring.split("\n\n")[0].rstrip().endswith(".")
