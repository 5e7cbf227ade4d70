"""probe shows what a Hugging Face Trainer never shows. Names are loaded when first used: importing it costs next to nothing."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from probe.api import attach as attach
    from probe.attachment import Probe as Probe
    from probe.errors import AttachError as AttachError
    from probe.errors import ProbeError as ProbeError
    from probe.errors import ProbeTypeError as ProbeTypeError
    from probe.errors import ProbeValueError as ProbeValueError
    from probe.errors import RunFolderError as RunFolderError
    from probe.errors import SiteError as SiteError
    from probe.records import StepRecord as StepRecord
    from probe.runs.load import Run as Run
    from probe.runs.load import load as load
    from probe.settings import Settings as Settings

__version__ = "0.1.0"

_HOME = {
    "attach": "probe.api",
    "Probe": "probe.attachment",
    "load": "probe.runs.load",
    "Run": "probe.runs.load",
    "Settings": "probe.settings",
    "StepRecord": "probe.records",
    "ProbeError": "probe.errors",
    "ProbeTypeError": "probe.errors",
    "ProbeValueError": "probe.errors",
    "AttachError": "probe.errors",
    "SiteError": "probe.errors",
    "RunFolderError": "probe.errors",
}
__all__ = [*_HOME, "__version__"]


def __getattr__(name: str) -> Any:
    """Load a public name from its module on first use."""
    if name not in _HOME:
        raise AttributeError(f"module 'probe' has no attribute {name!r}; it has {', '.join(sorted(__all__))}")
    value = getattr(importlib.import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """List the public names, loaded or not."""
    return sorted(__all__)
