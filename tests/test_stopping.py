"""Ending a training because of a finding: when one process decides, when merged ranks do, and when nobody can."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from probe.merge.ranks import Ranks
from probe.trainer.stopping import Stopping

MERGED, APART = Ranks(0, 2, True), Ranks(0, 2, False, "they differ: each rank has its own numbers only")


class Decider:
    """A decider whose other ranks answer from a list, with what it says."""

    def __init__(self, ranks: Ranks, *others: bool, stop_on: Any = "critical") -> None:
        self.lines: list[str] = []
        self.wishes: list[bool] = []
        self._others = list(others)
        observation: Any = SimpleNamespace(ranks=ranks, any_rank=self.any_rank)
        self.stopping = Stopping(stop_on, observation, self.lines.append)

    def any_rank(self, wish: bool) -> bool:
        self.wishes.append(wish)
        return wish or self._others.pop(0)


def test_one_process_decides_at_once() -> None:
    """As soon as a record asks, and says why once."""
    one = Decider(Ranks())
    one.stopping.begin()
    one.stopping.agree("", sampled=True)
    assert not one.stopping.wanted("")
    assert one.stopping.wanted("critical finding x")
    assert one.stopping.wanted("critical finding x")
    assert one.lines == ["training ends here, as stop_on='critical' asks: critical finding x"]
    assert one.wishes == []


def test_merged_ranks_decide_together() -> None:
    """At the end of the step after a sampled one, and only there; what another rank asks for counts."""
    two = Decider(MERGED, False, True)
    assert two.lines == []
    two.stopping.agree("", sampled=True)
    assert two.wishes == []
    two.stopping.agree("", sampled=False)
    assert two.wishes == [False]
    assert two.lines == []
    two.stopping.agree("", sampled=True)
    assert two.wishes == [False]
    assert not two.stopping.wanted("critical finding x")
    two.stopping.agree("", sampled=True)
    assert two.wishes == [False, False]
    assert two.stopping.wanted("")
    assert two.lines == ["training ends here, as stop_on='critical' asks: a finding of another rank"]
    two.stopping.agree("", sampled=True)
    assert two.wishes == [False, False]


def test_this_rank_asks() -> None:
    """Its own reason is said."""
    two = Decider(MERGED)
    two.stopping.agree("", sampled=True)
    two.stopping.agree("warning finding y", sampled=True)
    assert two.wishes == [True]
    assert two.stopping.wanted("warning finding y")
    assert two.lines[0].endswith("warning finding y")


def test_ranks_that_are_not_merged_cannot_agree() -> None:
    """That is said when training begins, and nothing ends."""
    apart = Decider(APART)
    apart.stopping.begin()
    assert apart.lines == ["stop_on='critical' is not in force: they differ: each rank has its own numbers only"]
    apart.stopping.agree("critical finding x", sampled=True)
    apart.stopping.agree("critical finding x", sampled=True)
    assert not apart.stopping.wanted("critical finding x")
    assert apart.wishes == []
    assert len(apart.lines) == 1


@pytest.mark.parametrize("ranks", [Ranks(), MERGED, APART])
def test_without_stop_on_nothing_is_done(ranks: Ranks) -> None:
    """No word, no collective, no end."""
    nothing = Decider(ranks, stop_on=None)
    nothing.stopping.begin()
    nothing.stopping.agree("critical finding x", sampled=True)
    nothing.stopping.agree("critical finding x", sampled=True)
    assert not nothing.stopping.wanted("critical finding x")
    assert nothing.lines == []
    assert nothing.wishes == []
