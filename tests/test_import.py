"""Importing the package costs next to nothing, and loads nothing heavy."""

from __future__ import annotations

import subprocess
import sys

import pytest

import probe

HEAVY = ("torch", "transformers", "rich", "numpy", "wrapt")


def test_import_loads_nothing_heavy() -> None:
    """import probe imports neither torch nor transformers nor rich; nor does looking at the version or the names."""
    code = f"import sys, probe; probe.__version__; dir(probe); print([m for m in {HEAVY!r} if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"


def test_import_executes_few_modules() -> None:
    """The 20 ms of the contract as a budget without a clock: importing loads this module and nothing else of the package."""
    code = "import sys, importlib, typing, __future__; before = set(sys.modules); import probe; print(sorted(set(sys.modules) - before))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "['probe']"


def test_reading_a_run_needs_no_torch() -> None:
    """probe.load is for laptops, too: it loads neither torch nor transformers nor rich."""
    code = "import sys, probe; probe.load; print([m for m in ('torch', 'transformers', 'rich') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"


def test_every_public_name_is_there() -> None:
    """Each name in __all__ loads; another one is an AttributeError that lists them."""
    assert all(getattr(probe, name) is not None for name in probe.__all__)
    with pytest.raises(AttributeError, match="attach"):
        probe.atach  # noqa: B018
