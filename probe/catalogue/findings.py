"""The metrics of findings: how many are open."""

from __future__ import annotations

from probe.catalogue.metric import Metric


def finding_metrics() -> tuple[Metric, ...]:
    """Return the number of open findings of each severity."""
    meant = {
        "critical": "the result will be wrong or wasted unless the training is stopped",
        "warning": "the result will probably be wrong or worse than it could be",
        "info": "worth knowing",
    }
    return tuple(
        Metric(
            f"probe/findings/{severity}",
            "findings",
            "whole number ≥ 0",
            f"Findings of this severity ({words}) that are open after the step. Which they are stands in the record, with the evidence.",
            "docs/findings.md",
            severity != "info",
        )
        for severity, words in meant.items()
    )
