"""The one place that reads transformers' ``_can_record_outputs``: which classes a model itself names as its attention layers.

Checked on transformers 4.46.3 (there is none), 4.57.6 and 5.23.0. An entry is a class, a class name, an ``OutputRecorder`` or a list of
these; ``OutputRecorder`` is recognised by its fields, because it moved from ``utils.generic`` to ``utils.output_capturing``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn


@dataclass(frozen=True, slots=True)
class AttentionRecorder:
    """One entry of a model's own map of attention layers.

    Attributes:
        target: The class of the layer, or ``None`` if the entry goes by name.
        suffix: How the layer's dotted name ends, or "" if the entry goes by class.
        layer: Dotted parts that must stand in the layer's name, or "".
        cross: The entry is of the cross-attentions.
    """

    target: type[nn.Module] | None
    suffix: str
    layer: str
    cross: bool

    def matches(self, module: nn.Module, name: str) -> bool:
        """Say whether the entry means the module, given its dotted name below the model that owns the map."""
        by_class = self.target is not None and isinstance(module, self.target)
        by_name = bool(self.suffix) and name.endswith(self.suffix)
        return (by_class or by_name) and (not self.layer or f".{self.layer}." in f".{name}.")


def attention_recorders(model: nn.Module) -> tuple[AttentionRecorder, ...]:
    """Return the entries "attentions" and "cross_attentions" of the model's own map; empty where it has none."""
    recorded = getattr(model, "_can_record_outputs", None)
    if not isinstance(recorded, Mapping):
        return ()
    found: list[AttentionRecorder] = []
    for key in ("attentions", "cross_attentions"):
        entries = recorded.get(key) or ()
        for entry in entries if isinstance(entries, (list, tuple)) else (entries,):
            found.append(_recorder(entry, cross=key == "cross_attentions"))
    return tuple(entry for entry in found if entry.target is not None or entry.suffix)


def _recorder(entry: Any, *, cross: bool) -> AttentionRecorder:
    if isinstance(entry, str):
        return AttentionRecorder(None, entry, "", cross)
    target = entry if isinstance(entry, type) else getattr(entry, "target_class", None)
    suffix = "" if isinstance(entry, type) else getattr(entry, "class_name", None) or ""
    layer = "" if isinstance(entry, type) else getattr(entry, "layer_name", None) or ""
    return AttentionRecorder(target if isinstance(target, type) else None, suffix, layer.strip("."), cross)
