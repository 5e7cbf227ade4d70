"""Every number of a real record is documented, and every one that is absent has its reason."""

from __future__ import annotations

import pytest

import models
from models.case import Case
from probe.metrics import CATALOGUE, describe
from watching import observed_run


@pytest.mark.parametrize("case", models.available_cases(), ids=lambda case: case.name)
def test_metrics_are_documented_or_explained(case: Case) -> None:
    """Each name is in the catalogue; each headline name that is absent stands in not_measured, itself or by its role."""
    _, records = observed_run(case, max_steps=1)
    record = records[0]
    assert all(describe(name).definition for name in record.metrics)
    expected = {metric.name for metric in CATALOGUE if metric.headline and "<" not in metric.name} - {"probe/step"}
    for name in expected - set(record.metrics):
        assert name in record.not_measured or name.split("/")[1] in record.not_measured, name
