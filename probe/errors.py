"""The exceptions of the package: each is a ProbeError and the builtin that a caller would catch."""

from __future__ import annotations


class ProbeError(Exception):
    """Base of every error that the package raises on purpose."""


class ProbeTypeError(ProbeError, TypeError):
    """An argument has the wrong type."""


class ProbeValueError(ProbeError, ValueError):
    """An argument has the right type and an impossible value."""


class AttachError(ProbeError, RuntimeError):
    """A model cannot be attached as asked, in most cases because it already is, with other settings."""


class SiteError(ProbeError, LookupError):
    """A site was asked for that the model does not have; the message names the nearest ones."""


class RunFolderError(ProbeError, OSError):
    """A run folder cannot be read: it is missing, is no run folder, or was written with a newer schema."""
