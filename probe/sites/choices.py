"""The user's own choice of sites: modules and name patterns, resolved against the names of the model."""

from __future__ import annotations

import difflib
import fnmatch
from collections.abc import Iterable, Sequence
from typing import Any

from torch import nn

from probe.errors import ProbeTypeError, SiteError
from probe.settings import SiteChoice, SiteChoices
from probe.sites.names import ModuleNames, canonical_name, class_name, module_names

CHOSEN = "chosen by the user"


def resolve_choice(names: ModuleNames, role: str, choice: Any, found: Iterable[tuple[str, str]]) -> dict[str, str]:
    """Turn one role's choice into site names and what found each.

    Args:
        names: The model's modules.
        role: For messages.
        choice: A module, a name, an ``fnmatch`` pattern over canonical names, or a list of these. "auto" stands for what was found. An
            empty list leaves the role empty on purpose.
        found: What the rules found for the role: names and rules.

    Raises:
        SiteError: a name or pattern that matches nothing, or a module that is not of this model (or is the root).
        ProbeTypeError: a choice that is none of these.
    """
    chosen: dict[str, str] = {}
    for part in _parts(choice):
        if isinstance(part, nn.Module):
            chosen[_of_module(names, role, part)] = CHOSEN
        elif not isinstance(part, str):
            raise ProbeTypeError(f"sites[{role!r}]: expected a module, a name or a pattern, got {type(part).__name__} {part!r}")
        elif part == "auto":
            for name, found_by in found:
                chosen.setdefault(name, found_by)
        else:
            chosen.update((name, f"{CHOSEN}: {part!r}") for name in _of_pattern(names, role, part) if name not in chosen)
    return chosen


def named_choices(model: nn.Module, choices: SiteChoices) -> SiteChoices:
    """Return the same choices with every module replaced by its name in ``model``.

    Names hold no module alive, and stay valid when PEFT exchanges the module.

    Raises:
        SiteError: a module that is not of this model (or is the root).
    """
    if isinstance(choices, str):
        return choices
    names = module_names(model)
    return {
        role: [_of_module(names, role, part) if isinstance(part, nn.Module) else part for part in _parts(choice)]
        for role, choice in choices.items()
    }


def choices_below(prefix: str, choices: SiteChoices) -> SiteChoices:
    """Return choices that were made for a module as choices for a model that holds this module under the name ``prefix``."""
    if isinstance(choices, str) or not prefix:
        return choices
    return {role: [p if p == "auto" else f"{prefix}.{p}" for p in _parts(choice)] for role, choice in choices.items()}


def _parts(choice: SiteChoice) -> list[Any]:
    return list(choice) if isinstance(choice, Sequence) and not isinstance(choice, str) else [choice]


def nearest(wanted: str, names: Iterable[str]) -> str:
    """Say which names come nearest to the wanted one, as the end of an error message."""
    known = [name for name in names if name]
    close = difflib.get_close_matches(wanted, known, n=3, cutoff=0.4)
    return f"; the nearest: {', '.join(map(repr, close))}" if close else ""


def _of_module(names: ModuleNames, role: str, module: nn.Module) -> str:
    name = names.find(module)
    if name is None:
        raise SiteError(f"sites[{role!r}]: this {class_name(module)} is not a module of the model")
    if name == "" or name not in names.by_name:
        raise SiteError(f"sites[{role!r}]: this {class_name(module)} is the whole model, which is a site of its own with role 'model'")
    return name


def _of_pattern(names: ModuleNames, role: str, pattern: str) -> list[str]:
    """Match an exact name first, as given or without wrapper prefixes; then the pattern."""
    for name in (pattern, canonical_name(pattern)):
        if name and name in names.by_name:
            return [name]
    hits = [name for name in names.by_name if name and fnmatch.fnmatchcase(name, pattern)]
    if not hits:
        bare = pattern.translate(str.maketrans("", "", "*?[]")).strip(".")
        raise SiteError(f"sites[{role!r}]: no module is called {pattern!r}{nearest(bare, names.by_name)}")
    return hits
