"""Settings of every test run: where shared builders are found, no network, one thread, no warnings that are not ours."""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

# Before torch or transformers is imported by any test; importing them here would slow down the tests that need neither.
sys.path.insert(0, str(Path(__file__).parent))
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
for _threads in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(_threads, "1")  # models this small run slower on more; set the variable to ask for more
if "torch" in sys.modules and os.environ["OMP_NUM_THREADS"] == "1":
    sys.modules["torch"].set_num_threads(1)

_FOREIGN = ("transformers", "accelerate", "peft", "torch", "tokenizers", "huggingface_hub", "<frozen", "importlib")


def pytest_configure(config: pytest.Config) -> None:
    """Ignore warnings raised inside other people's packages; those raised in ours stay visible."""
    for package in _FOREIGN:
        for category in ("DeprecationWarning", "PendingDeprecationWarning", "FutureWarning", "UserWarning"):
            config.addinivalue_line("filterwarnings", f"ignore::{category}:{package}")


def pytest_addoption(parser: pytest.Parser) -> None:
    """Offer ``--slow``: tests that train for minutes run only if they are asked for, whatever ``-m`` selects."""
    parser.addoption("--slow", action="store_true", help="run the tests marked slow, too")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Take out the slow tests unless they are asked for."""
    if not config.getoption("--slow"):
        slow = [item for item in items if item.get_closest_marker("slow")]
        config.hook.pytest_deselected(items=slow)
        items[:] = [item for item in items if item not in slow]


def pytest_collection_finish(session: pytest.Session) -> None:
    """Keep what imports left out of garbage collection: accelerate collects in every ``train()``, which took half of a short run."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _no_mixed_precision_left() -> Iterator[None]:
    """Forget the precision of a test's last run, which transformers 4 leaves in the environment for the next one."""
    yield
    os.environ.pop("ACCELERATE_MIXED_PRECISION", None)


@pytest.fixture(autouse=True)
def _no_function_mode_left() -> Iterator[None]:
    """Fail a test that leaves a torch function mode behind: every function of the tests after it would run through that mode."""
    yield
    if "torch" in sys.modules:
        left = sys.modules["torch"].overrides._get_current_function_mode_stack()
        assert not left, f"left behind: {left}"
