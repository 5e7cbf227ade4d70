"""What ``run.json`` says of a run: settings, sites, reasons, the model, the training's setup."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from probe.observation import Observation
from probe.records import Setup
from probe.settings import Options


def run_facts(observation: Observation, options: Options, setup: Setup | None = None) -> dict[str, Any]:
    """Return the facts of a run as plain data; tokenizers and modules are named by their class. ``setup``: what the Trainer tells."""
    found = observation.discovery
    sites = options.sites if isinstance(options.sites, str) else {role: str(choice) for role, choice in options.sites.items()}
    return {
        "settings": {
            "every": options.every,
            "tokenizer": None if options.tokenizer is None else type(options.tokenizer).__name__,
            "sites": sites,
            "keep": sorted(options.keep),
            "budget_mib": options.budget_mib,
            "compile": options.compile,
            "stop_on": options.stop_on,
            "on_finding": _name(options.on_finding),
            **{name: str(value) if name == "run_folder" and value else value for name, value in asdict(options.settings).items()},
        },
        "sites": [asdict(site) for site in found.sites.sites],
        "missing": dict(found.sites.missing),
        "model": asdict(found.facts),
        "setup": None if setup is None else asdict(setup),
        "ranks": observation.ranks.world,
    }


def _name(function: Any) -> str | None:
    return None if function is None else str(getattr(function, "__qualname__", type(function).__name__))
