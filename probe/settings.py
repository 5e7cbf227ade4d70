"""What a user can set: the rare settings as a public class, and all options of one ``attach`` validated together."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, get_args

from probe.errors import ProbeTypeError, ProbeValueError
from probe.records import Finding, Role

if TYPE_CHECKING:
    from torch import nn

CompileMode = Literal["window", "in_graph", "off"]
StopOn = Literal["critical", "warning"]
OnFinding: TypeAlias = "Callable[[Finding], object]"
SiteChoice: TypeAlias = "str | nn.Module | Sequence[str | nn.Module]"
SiteChoices: TypeAlias = "Literal['auto'] | Mapping[str, SiteChoice]"


@dataclass(frozen=True, slots=True)
class Settings:
    """What is rarer than the keyword arguments of :func:`probe.attach`.

    Attributes:
        keep_text: Keep token ids and text decoded from the data in records and in the run folder.
        attention_rows: Query rows looked at in one call of an attention layer, over all samples of the batch (at least one a sample).
        terminal: Print the sections. Metrics and the run folder are not affected.
        run_folder: Where to write; ``None`` is ``<output_dir>/_probe``.
        write_kept: Write the tensors of the sites in ``keep=`` to ``kept/step-*.safetensors`` in the run folder, too.
        counterfactual_every: In which steps the last micro-batch is run again with its audio changed: with ``None`` those that
            5 · ``every`` divides, and the first sampled step before which 20 were made; with a number those sampled steps that it
            divides; 0 never. It costs up to four evaluation forwards of a micro-batch.
        conditions: Names of the inputs by which the model hears audio, where they cannot be told from the model's sites.
        group_by: Name of a column of the batch, one value a sample, that counterfactual effects are grouped by; "" groups by the
            language token of Whisper's labels.
    """

    keep_text: bool = True
    attention_rows: int = 64
    terminal: bool = True
    run_folder: str | os.PathLike[str] | None = None
    write_kept: bool = False
    counterfactual_every: int | None = None
    conditions: tuple[str, ...] = ()
    group_by: str = ""

    def __post_init__(self) -> None:
        _check_int("attention_rows", self.attention_rows, 1)
        if self.counterfactual_every is not None:
            _check_int("counterfactual_every", self.counterfactual_every, 0)
        if not isinstance(self.conditions, tuple) or not all(isinstance(name, str) for name in self.conditions):
            raise ProbeTypeError(f"conditions={self.conditions!r}: expected a tuple of input names such as ('reference_features',)")
        if not isinstance(self.group_by, str):
            raise ProbeTypeError(f"group_by={self.group_by!r}: expected the name of a column, got {type(self.group_by).__name__}")


@dataclass(frozen=True, slots=True)
class Options:
    """All that one ``attach`` was asked for, validated. Two attaches are the same when their options are equal."""

    every: int = 100
    tokenizer: Any = None
    sites: SiteChoices = "auto"
    keep: frozenset[str] = frozenset()
    budget_mib: float = 64.0
    compile: CompileMode = "window"
    settings: Settings = field(default_factory=Settings)
    stop_on: StopOn | None = None
    on_finding: OnFinding | None = None

    def __post_init__(self) -> None:
        _check_int("every", self.every, 1)
        if isinstance(self.budget_mib, bool) or not isinstance(self.budget_mib, (int, float)):
            raise ProbeTypeError(f"budget_mib={self.budget_mib!r}: expected a number of MiB, got {type(self.budget_mib).__name__}")
        if not self.budget_mib > 0:
            raise ProbeValueError(f"budget_mib={self.budget_mib!r}: expected a number of MiB above 0 (the default is 64)")
        if self.compile not in get_args(CompileMode):
            raise ProbeValueError(f"compile={self.compile!r}: expected one of {', '.join(map(repr, get_args(CompileMode)))}")
        if not isinstance(self.settings, Settings):
            raise ProbeTypeError(f"settings={self.settings!r}: expected a probe.Settings, got {type(self.settings).__name__}")
        if self.stop_on is not None and self.stop_on not in get_args(StopOn):
            raise ProbeValueError(f"stop_on={self.stop_on!r}: expected one of {', '.join(map(repr, get_args(StopOn)))}, or None")
        if self.on_finding is not None and not callable(self.on_finding):
            raise ProbeTypeError(f"on_finding={self.on_finding!r}: expected a function of a finding, got {type(self.on_finding).__name__}")
        _check_sites(self.sites)

    def __eq__(self, other: object) -> bool:
        """Compare value by value; tokenizers and modules by identity (a tokenizer's own ``==`` may be costly or missing)."""
        if not isinstance(other, Options):
            return NotImplemented
        return self.tokenizer is other.tokenizer and self._comparable() == other._comparable()

    __hash__ = None  # type: ignore[assignment]

    def _comparable(self) -> tuple[Any, ...]:
        sites = self.sites if isinstance(self.sites, str) else {role: _identity(choice) for role, choice in self.sites.items()}
        return (self.every, sites, self.keep, self.budget_mib, self.compile, self.settings, self.stop_on, self.on_finding)

    def differences(self, other: Options) -> str:
        """Say in words which options differ, ``name: mine -> theirs``."""
        names = ("every", "tokenizer", "sites", "keep", "budget_mib", "compile", "settings", "stop_on", "on_finding")
        return ", ".join(
            f"{name}: {_short(getattr(self, name))} -> {_short(getattr(other, name))}"
            for name in names
            if (getattr(self, name) is not getattr(other, name) if name == "tokenizer" else getattr(self, name) != getattr(other, name))
        )


def check_keep(keep: Collection[str]) -> frozenset[str]:
    """Return ``keep`` as a set of site names, roles or patterns.

    Raises:
        ProbeTypeError: if it is a bare string (a common slip: its letters would count as names) or holds something else than strings.
    """
    if isinstance(keep, str) or not all(isinstance(name, str) for name in keep):
        raise ProbeTypeError(f"keep={keep!r}: expected a collection of site names, roles or patterns such as {{'audio_encoder'}}")
    return frozenset(keep)


def _check_int(name: str, value: Any, bound: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise ProbeTypeError(f"{name}={value!r}: expected a whole number, got {type(value).__name__}")
    if value < bound:
        raise ProbeValueError(f"{name}={value}: expected a whole number of at least {bound}")


def _check_sites(sites: Any) -> None:
    if isinstance(sites, str):
        if sites != "auto":
            example = f"{{'audio_encoder': {sites!r}}}"
            raise ProbeValueError(f"sites={sites!r}: expected 'auto' or a mapping from role to module names, e.g. {example}")
        return
    if not isinstance(sites, Mapping):
        raise ProbeTypeError(f"sites={sites!r}: expected 'auto' or a mapping from role to module names, got {type(sites).__name__}")
    roles = [role for role in get_args(Role) if role != "model"]
    unknown = [role for role in sites if role not in roles]
    if unknown:
        raise ProbeValueError(f"sites has no role {', '.join(map(repr, unknown))}; the roles are {', '.join(roles)}")


def _identity(choice: SiteChoice) -> Any:
    if isinstance(choice, str):
        return choice
    if isinstance(choice, Sequence):
        return tuple(_identity(part) for part in choice)
    return id(choice)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
