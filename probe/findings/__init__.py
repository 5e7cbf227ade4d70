"""Findings: rules over the records of a run, their life cycle, and the verdict on conditioning; knows no model and no tensor."""
