"""The weights of adapters (PEFT's, or hand-written LoRA): which parameters are theirs, and which make up what they add."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn

# The factor of what an adapter adds that it begins with at 0: while it is all 0, the adapter adds nothing. The first that a layer has
# counts (AdaLoRA has a ``lora_B`` beside ``lora_E``). For embeddings PEFT begins with ``A`` at 0. Checked on peft 0.13.2, 0.17, 0.21.2.
_OUTPUTS = ("lora_E", "lora_B", "lora_embedding_A", "vera_lambda_b", "hira_B", "hira_embedding_A")
_HAND_WRITTEN = "lora_"


@dataclass(frozen=True, slots=True)
class AdapterOutputs:
    """One module with adapters in it: the places of their output weights (owner and key), one for each adapter that is active."""

    name: str
    places: tuple[tuple[nn.Module, str], ...]


def adapter_owners(model: nn.Module) -> frozenset[int]:
    """Return ``id(module)`` of every module all of whose own parameters are an adapter's.

    PEFT's layers name their adapters' modules in ``adapter_layer_names`` (those of ``modules_to_save`` are whole copies of modules, no
    adapters); its models keep learned prompts and prefixes in ``prompt_encoder``. Checked on peft 0.13.2, 0.17 and 0.21.2.
    """
    owners: set[int] = set()
    for module in model.modules():
        named = [key for key in getattr(type(module), "adapter_layer_names", ()) if key != "modules_to_save"]
        prompts = ["prompt_encoder"] if type(module).__module__.startswith("peft.") else []
        for key in (*named, *prompts, *filter(_is_lora, module._modules)):
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
        places = next((places for key in _OUTPUTS if (places := tuple(_places(module, key)))), ())
        if places:
            found.append(AdapterOutputs(name, places))
    return tuple(found)


def _places(layer: nn.Module, key: str) -> Iterator[tuple[nn.Module, str]]:
    """Yield the places of a layer's ``lora_B``: a parameter, a module with a weight, or a dictionary of either by adapter."""
    if layer._parameters.get(key) is not None:
        yield layer, key
    container = layer._modules.get(key)
    if container is None:
        return
    if container._parameters.get("weight") is not None:
        yield container, "weight"
        return
    active = _active(layer)
    for adapter, child in container._modules.items():
        if child is not None and child._parameters.get("weight") is not None and (not active or adapter in active):
            yield child, "weight"
    yield from ((container, adapter) for adapter in container._parameters if not active or adapter in active)


def _active(layer: nn.Module) -> tuple[str, ...]:
    active = getattr(layer, "active_adapters", None) or getattr(layer, "active_adapter", None) or ()
    return (active,) if isinstance(active, str) else tuple(active)


def _is_lora(key: str) -> bool:
    return key.startswith(_HAND_WRITTEN)
