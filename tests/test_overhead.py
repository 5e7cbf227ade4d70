"""The overhead of a record: the share of the time, by part, in the metrics, in the files and in the terminal."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

import probe
from probe.assemble.overhead import METRIC, with_overhead
from probe.capture import meter
from probe.capture.meter import Spent
from probe.metrics import describe, headline
from probe.records import StepRecord
from probe.records_json import from_json, to_json
from probe.sections.blocks import Facts
from probe.sections.verification import section
from records_factory import whisper_record


def test_the_share_is_the_sum_of_the_parts() -> None:
    """0.5 of 20 seconds are 2.5 %, whatever parts they fall into; the largest part comes first."""
    record = with_overhead(whisper_record(), Spent({"hooks": 0.125, "heads": 0.375}, 20.0))
    assert record.overhead is not None
    assert record.overhead.pct == record.metrics[METRIC] == 2.5
    assert list(record.overhead.seconds.items()) == [("heads", 0.375), ("hooks", 0.125)]
    assert record.overhead.wall_seconds == 20.0


def test_no_time_is_named() -> None:
    """Where no time has passed there is no share, and the reason says so."""
    record = with_overhead(whisper_record(), Spent({}, 0.0))
    assert record.overhead is None
    assert METRIC not in record.metrics
    assert "no time" in record.not_measured[METRIC]
    assert "no time" in text_of(record)


def test_it_is_a_headline_metric() -> None:
    """It enters the Trainer's log, and the catalogue says what it is."""
    record = with_overhead(whisper_record(), Spent({"hooks": 1.0}, 100.0))
    assert headline(record.metrics)[METRIC] == 1.0
    assert describe(METRIC).unit == "%"


def test_it_survives_the_file() -> None:
    """A record that is written and read back has the same overhead; an older one has none."""
    record = with_overhead(whisper_record(), Spent({"hooks": 0.1, "heads": 0.3}, 7.0))
    assert from_json(to_json(record)).overhead == record.overhead
    assert from_json(to_json(whisper_record())).overhead is None


def test_the_terminal_says_it_in_one_line() -> None:
    """Share and the largest parts; of a record without it, nothing."""
    record = with_overhead(whisper_record(), Spent({"hooks": 0.1, "heads": 0.3, "inputs": 0.05, "packing": 0.05}, 50.0))
    assert "1.0 % of the time since the last record (heads 0.6 %, hooks 0.2 %, inputs 0.1 %)" in text_of(record)
    assert "The probe's share" not in text_of(whisper_record())


class Two(nn.Module):
    """An encoder and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.lm_head = nn.Linear(4, 4), nn.Linear(4, 9)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.lm_head(self.encoder(x)).sum()


def test_a_loop_measures_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a clock that goes on by one at every look, each part that works is named, and parts and wall time fit together."""
    monkeypatch.setattr(meter.Meter.__init__, "__kwdefaults__", {"clock": ticking()})
    model, records = Two(), []
    settings = probe.Settings(terminal=False, counterfactual_every=0)
    watched = probe.attach(model, every=2, sites={"custom": ["encoder"], "lm_head": ["lm_head"]}, settings=settings)
    for _ in range(5):
        with watched.step():
            model(torch.ones(2, 4)).backward()
        if watched.last is not None and watched.last not in records:
            records.append(watched.last)
    watched.detach()
    assert [record.step for record in records] == [1, 2, 4]
    for record in records:
        overhead = record.overhead
        assert {"hooks", "statistics", "gradients", "activation_gradients", "packing", "publication"} <= set(overhead.seconds)
        assert 0 < sum(overhead.seconds.values()) <= overhead.wall_seconds
        assert overhead.pct == pytest.approx(100 * sum(overhead.seconds.values()) / overhead.wall_seconds)


def ticking() -> Callable[[], float]:
    """Return a clock that goes on by one second each time it is read."""
    now = iter(range(10**9))
    return lambda: float(next(now))


def text_of(record: StepRecord) -> str:
    """Return everything that the section says."""
    facts = [block for block in section(record).blocks if isinstance(block, Facts)]
    return "\n".join(f"{fact.label}: {fact.value}" for block in facts for fact in block.rows)
