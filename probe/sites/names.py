"""Canonical module names: what a module is called once the prefixes and copies that wrappers add are looked through.

Three kinds of wrapper are seen through. FSDP, activation checkpointing, ``torch.compile`` and DDP put one module round another: the inner
one takes the name. PEFT's model classes do the same. PEFT's layers put a new module in the place of the old: a LoRA layer keeps the
name, because its output is what the model goes on with; of ``modules_to_save`` the active copy takes the name, because the original no
longer runs.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal

from torch import nn

_WRAPPED = frozenset({"_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_orig_mod"})
_REPLACED = frozenset({"base_layer", "original_module"})
_FSDP_CLASS = re.compile(r"^FSDP(?=[A-Z])")
_Step = Literal["own", "inner", "outer", "idle"]


@dataclass(frozen=True, slots=True)
class ModuleNames:
    """The modules of a model that run, by canonical name, and the canonical name of every module.

    Attributes:
        by_name: Name to the module whose output the model goes on with; the root is "" (always the model itself, wrapper or not).
            In the order of ``named_modules()``; a shared module stands under its first name only.
        name_of: ``id(module)`` to its name, also for wrappers and for what they replaced.
    """

    by_name: dict[str, nn.Module] = field(default_factory=dict)
    name_of: dict[int, str] = field(default_factory=dict)

    def find(self, module: nn.Module) -> str | None:
        """Return the name under which ``module``, or what now runs in its place, stands; ``None`` if it is not of this model."""
        return self.name_of.get(id(module))

    def below(self, name: str) -> Iterator[tuple[str, nn.Module]]:
        """Iterate over the running modules strictly below ``name``."""
        return ((other, module) for other, module in self.by_name.items() if is_below(other, name))


def module_names(model: nn.Module) -> ModuleNames:
    """Name every module of ``model``. Reads the tree only: no tensor is touched, nothing is kept alive beyond the result."""
    names = ModuleNames()
    _visit(model, "", "", names, runs=True, takes=True)
    return names


def canonical_name(name: str) -> str:
    """Strip from a dotted module or parameter name what wrappers add.

    The text alone does not tell a wrapper's ``base_model.model`` from a user's own attributes of that name; :func:`module_names`, which
    sees the modules, does.
    """
    parts = [part for part in name.split(".") if part and part not in _WRAPPED]
    while parts[:1] == ["module"]:
        del parts[0]
    kept: list[str] = []
    position = 0
    while position < len(parts):
        pair = parts[position : position + 2]
        if pair == ["base_model", "model"] or (pair[0] == "modules_to_save" and len(pair) == 2):
            position += 2
        else:
            if parts[position] not in _REPLACED:
                kept.append(parts[position])
            position += 1
    return ".".join(kept)


def class_name(module: nn.Module) -> str:
    """Return the name of the module's class without the prefix that FSDP2's ``fully_shard`` puts before it."""
    return _FSDP_CLASS.sub("", type(module).__name__)


def is_pretrained(module: nn.Module) -> bool:
    """Say whether the module is a transformers ``PreTrainedModel``, without importing transformers."""
    return any(base.__name__ == "PreTrainedModel" and base.__module__.startswith("transformers.") for base in type(module).__mro__)


def is_below(name: str, ancestor: str) -> bool:
    """Say whether ``name`` stands strictly below ``ancestor``; everything but the root stands below the root, ""."""
    return name != ancestor and (ancestor == "" or name.startswith(f"{ancestor}."))


def child_of(module: nn.Module, key: str) -> nn.Module | None:
    """Return a direct child by attribute name, wrappers seen through; ``None`` if there is none."""
    child = module._modules.get(key)
    return None if child is None else unwrapped(child)


def unwrapped(module: nn.Module) -> nn.Module:
    """Return the plain layer inside wrappers and PEFT layers (of ``modules_to_save`` the active copy)."""
    while True:
        inner = next((child for key, child in module._modules.items() if key in _WRAPPED or key == "base_layer"), None)
        if inner is None and "original_module" in module._modules:
            copy = active_copy(module)
            inner = module._modules["original_module"] if copy is None else copy[1]
        if inner is None:
            return module
        module = inner


def active_copy(wrapper: nn.Module) -> tuple[str, nn.Module] | None:
    """Return adapter name and module of the copy that runs in a PEFT ``modules_to_save`` wrapper; ``None`` if the original runs."""
    copies = wrapper._modules.get("modules_to_save")
    if copies is None or getattr(wrapper, "disable_adapters", False):
        return None
    active = getattr(wrapper, "active_adapters", None) or getattr(wrapper, "active_adapter", None) or ()
    for adapter in [active] if isinstance(active, str) else active:
        copy = copies._modules.get(adapter)
        if copy is not None:
            return adapter, copy
    return None


def _visit(module: nn.Module, name: str, path: str, names: ModuleNames, *, runs: bool, takes: bool) -> None:
    """Enter one module and all below it. ``takes``: it takes the name, from a wrapper if need be; ``runs``: its output is used."""
    if id(module) in names.name_of:
        return
    if runs and takes and (name != "" or not names.by_name):
        names.by_name[name] = module
    names.name_of[id(module)] = name
    for key, child in _children(module):
        step = _step(module, key, name)
        child_path = f"{path}.{key}" if path else key
        child_name = name if step != "own" else (f"{name}.{key}" if name else key)
        if step == "own" and runs:
            child_name = _free(child_name, child_path, names)
        _visit(child, child_name, child_path, names, runs=runs and step != "idle", takes=step in ("own", "inner"))


def _free(name: str, path: str, names: ModuleNames) -> str:
    """Return the name if it is free, else the full path, else the path with a number that no attribute can have."""
    return next(each for each in (name, path, f"{path}~{len(names.by_name)}") if each not in names.by_name)


def _children(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    for key, child in module._modules.items():
        if child is None:
            continue
        if key == "modules_to_save" and _is_saving_wrapper(module):
            yield from ((f"{key}.{adapter}", copy) for adapter, copy in child._modules.items() if copy is not None)
        else:
            yield key, child


def _step(parent: nn.Module, key: str, name: str) -> _Step:
    """Say how the name goes on from a module to one of its children.

    "own": the child has a name of its own. "inner": the child takes the parent's name over. "outer": it has the parent's name, and the
    parent keeps it. "idle": the same, and nothing below it runs.
    """
    if key in _WRAPPED or (key == "module" and name == "" and len(parent._modules) == 1) or _is_peft_core(parent, key):
        return "inner"
    if _is_saving_wrapper(parent):
        copy = active_copy(parent)
        if key == "original_module":
            return "inner" if copy is None else "idle"
        if copy is not None and key == f"modules_to_save.{copy[0]}":
            return "inner"
    return "outer" if key == "base_layer" and _is_peft(parent) else "own"


def _is_saving_wrapper(module: nn.Module) -> bool:
    return "modules_to_save" in module._modules and "original_module" in module._modules


def _is_peft(module: nn.Module) -> bool:
    return any(base.__module__.startswith("peft.") for base in type(module).__mro__)


def _is_peft_core(parent: nn.Module, key: str) -> bool:
    bases: Mapping[str, str] = {"base_model": "PeftModel", "model": "BaseTuner"}
    return key in bases and _is_peft(parent) and any(base.__name__ == bases[key] for base in type(parent).__mro__)
