"""Adapter layers of PEFT (LoRA and its like), told by what they have, not by their class: how many, and which are switched off."""

from __future__ import annotations

from torch import nn


def adapter_layers(model: nn.Module) -> list[nn.Module]:
    """Return the layers that add an adapter to a layer they replaced; those of ``modules_to_save`` are none."""
    return [module for module in model.modules() if _is_adapter_layer(module)]


def is_switched_off(layer: nn.Module) -> bool:
    """Tell whether an adapter layer runs its old layer alone: disabled, without an active adapter, or with its adapter merged.

    Source: peft.tuners.lora.layer.Linear.forward; attributes checked on peft 0.13.2, 0.17 and 0.21.2.
    """
    active = getattr(layer, "active_adapters", None)
    none_active = isinstance(active, (list, tuple, str)) and not active
    return bool(getattr(layer, "disable_adapters", False)) or none_active or bool(getattr(layer, "merged", False))


def _is_adapter_layer(module: nn.Module) -> bool:
    """A layer of PEFT's tuners owns the layer that it replaced, and says whether it is disabled."""
    return "base_layer" in module._modules and hasattr(type(module), "disable_adapters") and hasattr(type(module), "active_adapters")
