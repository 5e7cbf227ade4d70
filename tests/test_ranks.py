"""The agreement of ranks: one answer for all that take part, whoever is missing, late, different or failing, with every kind of store."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from probe.merge import ranks
from probe.merge.ranks import FAILED, Ranks, agree

pytestmark = pytest.mark.pure  # of torch and probe alone: the same with every transformers

LONG, SHORT = timedelta(seconds=20), timedelta(seconds=0.3)
# Of ranks that do come, all must come within it, however busy the machine.
PATIENT = timedelta(seconds=1.5)
Stores = Callable[[], Any]


@pytest.fixture(params=["hash", "file", "tcp"])
def store_of(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Stores]:
    """Gives each rank its handle of one store, of every kind that ``init_process_group`` may be given."""
    if request.param == "tcp":
        server = dist.TCPStore("localhost", 0, None, True, wait_for_workers=False)
        yield lambda: dist.PrefixStore("default_pg", dist.TCPStore("localhost", server.port, None, False, wait_for_workers=False))
    elif request.param == "file":
        yield lambda: dist.FileStore(str(tmp_path / "store"), 3)
    else:
        shared = dist.HashStore()
        yield lambda: shared


def _said(fingerprint: str, every: list[int] | None = None, stop_on: str | None = None) -> str:
    return json.dumps([fingerprint, every or [100], stop_on])


def _settled(
    store_of: Stores, said: dict[int, str], *, world: int = 3, patience: timedelta = LONG, late: dict[int, float] | None = None
) -> dict[int, str]:
    """Let some ranks take part at the same time, each in a thread; return each one's answer."""
    answers: dict[int, str] = {}

    def take_part(rank: int) -> None:
        time.sleep((late or {}).get(rank, 0.0))
        answers[rank] = ranks._settle(store_of(), rank, world, said[rank], patience)

    threads = [threading.Thread(target=take_part, args=(rank,), daemon=True) for rank in said]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert set(answers) == set(said), "a rank hangs"
    return answers


def test_equal_ranks_are_merged_every_time(store_of: Stores) -> None:
    """Ranks that say the same are merged, in the first training of the processes and in later ones."""
    for _ in range(3):
        assert _settled(store_of, dict.fromkeys(range(3), _said("a"))) == dict.fromkeys(range(3), "")


def test_other_sites_or_steps_are_named(store_of: Stores) -> None:
    """A rank with another layout, another cadence or another ``stop_on`` keeps all apart, and every rank knows which."""
    said = {0: _said("a"), 1: _said("a"), 2: _said("b")}
    assert set(_settled(store_of, said).values()) == {"ranks [2] watch other sites than rank 0: each rank has its own numbers only"}
    said[2] = _said("a", [10, 100])
    answers = set(_settled(store_of, said).values())
    assert answers == {"ranks [2] sample other steps than rank 0 (every [100]): each rank has its own numbers only"}
    said[2] = _said("a", stop_on="critical")
    answers = set(_settled(store_of, said).values())
    assert answers == {"ranks [2] have another stop_on than rank 0 (None): each rank has its own numbers only"}


@pytest.mark.parametrize("failing", [0, 2])
def test_a_failure_is_told_to_all(store_of: Stores, failing: int) -> None:
    """A rank whose probe could not begin says so, and the others do not wait for it."""
    said = dict.fromkeys(range(3), _said("a"))
    said[failing] = _said(f"{FAILED}RuntimeError: why")
    begin = time.monotonic()
    answers = set(_settled(store_of, said).values())
    assert answers == {f"the probe of rank {failing} failed: RuntimeError: why: each rank has its own numbers only"}
    assert time.monotonic() - begin < LONG.total_seconds() / 2


@pytest.mark.parametrize("present", [(0,), (1,), (0, 2), (1, 2)])
def test_ranks_that_never_come_are_given_up(store_of: Stores, present: tuple[int, ...]) -> None:
    """Without every rank those that are there keep to their own numbers after a while; next time, when all come, they are merged."""
    answers = _settled(store_of, dict.fromkeys(present, _said("a")), patience=PATIENT)
    absent = "rank 0" if 0 not in present else f"rank {', '.join(str(r) for r in (1, 2) if r not in present)}"
    assert all(answer.startswith(f"{absent} did not begin training with a probe within") for answer in answers.values())
    assert len(set(answers.values())) == 1
    assert _settled(store_of, dict.fromkeys(range(3), _said("a"))) == dict.fromkeys(range(3), "")


def test_what_a_rank_said_before_it_gave_up_does_not_count(store_of: Stores) -> None:
    """Rank 0 that comes after rank 1 has given up is not told that rank 1 agrees: it would wait for it in an all-reduce for ever."""
    early = _settled(store_of, {1: _said("a")}, world=2, patience=SHORT)
    late = _settled(store_of, {0: _said("a")}, world=2, patience=SHORT)
    assert early[1].startswith("rank 0 did not begin")
    assert late[0].startswith("rank 1 did not begin")


@pytest.mark.parametrize("delay", [0.0, 0.05, 0.25, 0.3, 0.35, 0.6, 0.7])
def test_early_and_late_ranks_never_have_different_answers(store_of: Stores, delay: float) -> None:
    """However late rank 0 comes, also just when rank 1 gives up: both are merged or neither is."""
    answers = _settled(store_of, dict.fromkeys(range(2), _said("a")), world=2, patience=SHORT, late={0: delay})
    assert (answers[0] == "") == (answers[1] == "")


def test_a_claim_is_settled_once(store_of: Stores) -> None:
    """When one rank gives up in the moment in which rank 0 settles, the first of them decides for both."""
    store = store_of()
    ranks._claim(store, "here", "first")
    ranks._claim(store, "here", "second")
    assert store.get("here/decision") == b"first"


def test_one_process_agrees_with_itself() -> None:
    """Without a process group there is nothing to agree on, and nothing is waited for."""
    assert agree("a") == Ranks(0, 1, True, "")


class _Broken:
    def __getattr__(self, name: str) -> Any:
        raise RuntimeError("connection reset")


@pytest.mark.parametrize("store", [None, _Broken()], ids=["none", "broken"])
def test_a_store_that_fails_stops_nothing(monkeypatch: pytest.MonkeyPatch, store: Any) -> None:
    """Without a store (MPI), or with one whose server is gone, the ranks stay apart and the reason says why; nothing is raised."""
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(dist, "get_rank", lambda: 1)
    monkeypatch.setattr(ranks, "default_store", lambda: store)
    found = agree("a")
    assert (found.rank, found.world, found.merged) == (1, 2, False)
    assert found.reason.startswith("the process group's store failed (")
    assert found.device(torch.device("cpu")) == torch.device("cpu")  # asks for no backend
