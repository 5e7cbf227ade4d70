"""The weights of adapters (PEFT's, or hand-written LoRA): which parameters are theirs, and which make up what they add."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn

# The last factor of what an adapter adds: while it is all 0, the adapter adds nothing. The first that a layer has counts (AdaLoRA has
# a ``lora_B`` beside ``lora_E``, and begins with the latter at 0).
_OUTPUTS = ("lora_E", "lora_B", "lora_embedding_B", "vera_lambda_b", "hira_B", "hira_embedding_B")
_HAND_WRITTEN = "lora_"


@dataclass(frozen=True, slots=True)
class AdapterOutputs:
    """One module with adapters in it: the places of their output weights (owner and key), one for each adapter that is active."""

    name: str
    places: tuple[tuple[nn.Module, str], ...]


def adapter_owners(model: nn.Module) -> frozenset[int]:
    """Return ``id(module)`` of every module all of whose own parameters are an adapter's."""
    owners: set[int] = set()
    for module in model.modules():
        for key in (*getattr(type(module), "adapter_layer_names", ()), *(key for key in module._modules if _is_lora(key))):
            child = module._modules.get(key)
            if child is not None:
                owners.update(id(inner) for inner in child.modules())
    return frozenset(owners)


def is_adapter(owner: nn.Module, key: str, owners: frozenset[int]) -> bool:
    """Tell whether the parameter ``key`` of ``owner`` is an adapter's (``owners`` as :func:`adapter_owners` returns them)."""
    return id(owner) in owners or _is_lora(key) or type(owner).__module__.startswith("peft.")


def adapter_outputs(model: nn.Module) -> tuple[AdapterOutputs, ...]:
    """Return every module with an adapter whose output weight is known by name, in tree order. Reads no values."""
    found = []
    for name, module in model.named_modules():
        container = next((child for key in _OUTPUTS if (child := module._modules.get(key)) is not None), None)
        own = next((key for key in _OUTPUTS if module._parameters.get(key) is not None), None)
        places = tuple(_places(container, _active(module))) if container is not None else ((module, own),) if own else ()
        if places:
            found.append(AdapterOutputs(name, places))
    return tuple(found)


def _places(container: nn.Module, active: tuple[str, ...]) -> Iterator[tuple[nn.Module, str]]:
    """Yield the places of weights in ``lora_B``: a layer itself, a dictionary of layers by adapter, or one of parameters."""
    if container._parameters.get("weight") is not None:
        yield container, "weight"
        return
    for key, child in container._modules.items():
        if child is not None and child._parameters.get("weight") is not None and (not active or key in active):
            yield child, "weight"
    for key, parameter in container._parameters.items():
        if parameter is not None and (not active or key in active):
            yield container, key


def _active(layer: nn.Module) -> tuple[str, ...]:
    active = getattr(layer, "active_adapters", None) or getattr(layer, "active_adapter", None) or ()
    return (active,) if isinstance(active, str) else tuple(active)


def _is_lora(key: str) -> bool:
    return key.startswith(_HAND_WRITTEN)
