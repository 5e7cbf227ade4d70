"""Which part and which layer of the model each parameter belongs to, told from where it stands in the module tree."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from probe.records import Site
from probe.sites.adapter_weights import adapter_owners, is_adapter
from probe.sites.names import ModuleNames, is_below, module_names

PARTS = ("adapters", "projector", "audio_encoder", "text_branch", "audio_branch", "lm_head", "embedding", "rest")
"""The parts, in order of claim: a parameter that two could claim (a head tied to the embedding) belongs to the first of them."""

MOST_LAYERS = 400
"""More layers than this are not told apart."""

_RANKS = {"audio_encoder": 0, "projector": 1, "embedding": 2, "lm_head": 5}
_LAYERS, _AFTER = 3, 4


@dataclass(frozen=True, slots=True)
class Unit:
    """What belongs to one part and stands in one layer. ``layer`` is its name, or that of the part for what is in no layer."""

    part: str
    layer: str


@dataclass(frozen=True, slots=True)
class Weight:
    """Where a parameter stands, so that it is found again when another one has been put in its place."""

    module: nn.Module
    key: str
    unit: int

    @property
    def parameter(self) -> nn.Parameter | None:
        """The parameter that stands there now."""
        return self.module._parameters.get(self.key)


@dataclass(frozen=True, slots=True)
class Division:
    """All parameters of a model, each once, divided into units; units are in the order of the forward as the tree tells it."""

    units: tuple[Unit, ...]
    weights: tuple[Weight, ...]


@dataclass(frozen=True, slots=True)
class UnitFacts:
    """Sizes of one unit: elements, those that train, tensors that train, and the dtype of most elements that train ("" if none does)."""

    part: str
    layer: str
    elements: int = 0
    trainable: int = 0
    tensors: int = 0
    dtype: str = ""


def divide(model: nn.Module, sites: Sequence[Site]) -> Division:
    """Divide a model's parameters into parts and layers. Reads the module tree only.

    Adapters come first, wherever they are; then each site's parameters; then embeddings of tokens and codes (every ``nn.Embedding``
    that is not one of positions); then the rest. Layers are the elements of module lists: the innermost ones round each attention
    layer, and the outermost ones elsewhere.
    """
    names, owners = module_names(model), adapter_owners(model)
    layers = _layers(names, sites)
    by_site = {site.name: _claim(site) for site in sites if _claim(site) in PARTS}
    claims: dict[int, list[tuple[Unit, nn.Module, str]]] = {}
    for module in model.modules():
        name = names.find(module) or ""
        for key, parameter in module._parameters.items():
            if parameter is not None:
                part = "adapters" if is_adapter(module, key, owners) else _part(name, by_site, embeds=isinstance(module, nn.Embedding))
                claims.setdefault(id(parameter), []).append((Unit(part, _innermost(name, layers) or part), module, key))
    chosen = [min(each, key=lambda claim: PARTS.index(claim[0].part)) for each in claims.values()]
    first = {unit.layer: index for index, (unit, _, _) in reversed(list(enumerate(chosen)))}
    units = tuple(sorted({unit for unit, _, _ in chosen}, key=lambda unit: _place(unit, by_site, first[unit.layer])))
    places = {unit: index for index, unit in enumerate(units)}
    return Division(units, tuple(Weight(module, key, places[unit]) for unit, module, key in chosen))


def count(division: Division) -> tuple[UnitFacts, ...]:
    """Return the sizes of each unit as they are now: what trains may change while training runs. Reads no values."""
    elements, trainable, tensors = ([0] * len(division.units) for _ in range(3))
    dtypes: list[Counter[str]] = [Counter() for _ in division.units]
    for weight in division.weights:
        parameter, unit = weight.parameter, weight.unit
        if parameter is not None:
            elements[unit] += parameter.numel()
            if parameter.requires_grad:
                trainable[unit] += parameter.numel()
                tensors[unit] += 1
                dtypes[unit][str(parameter.dtype).removeprefix("torch.")] += parameter.numel()
    most = [counted.most_common(1)[0][0] if counted else "" for counted in dtypes]
    rows = zip(division.units, elements, trainable, tensors, most)
    return tuple(UnitFacts(unit.part, unit.layer, e, t, n, dtype) for unit, e, t, n, dtype in rows)


def _claim(site: Site) -> str:
    return f"{site.modality or 'text'}_branch" if site.role == "feed_forward" else site.role


def _part(name: str, by_site: Mapping[str, str], *, embeds: bool = False) -> str:
    """Return the part that a name lies in; ``embeds``: it is the name of an ``nn.Embedding``."""
    claiming = {"embedding"} if embeds and "position" not in name.lower() and name.rpartition(".")[2] != "wpe" else set()
    while name:
        claiming.add(by_site.get(name, "rest"))
        name = name.rpartition(".")[0]
    return next((part for part in PARTS if part in claiming), "rest")


def _layers(names: ModuleNames, sites: Sequence[Site]) -> frozenset[str]:
    """Return the names of the layers; none if there are too many."""
    lists = [(name, module) for name, module in names.by_name.items() if isinstance(module, nn.ModuleList)]
    elements = frozenset(f"{name}.{key}" if name else key for name, module in lists for key in module._modules)
    inner = {_innermost(site.name, elements) for site in sites if site.role == "attention"} - {""}
    outer = (name for name in elements if not _innermost(name.rpartition(".")[0], elements))
    apart = (name for name in outer if not any(layer == name or is_below(layer, name) for layer in inner))
    found = frozenset([*inner, *apart])
    return found if len(found) <= MOST_LAYERS else frozenset()


def _innermost(name: str, layers: frozenset[str]) -> str:
    """Return the innermost of ``layers`` that ``name`` is or stands in, or ""."""
    while name and name not in layers:
        name = name.rpartition(".")[0]
    return name


def _place(unit: Unit, by_site: Mapping[str, str], first: int) -> tuple[int, bool, int, int]:
    """Sort units as the forward meets them: encoder, projector, embedding, layers, what is in none of these, heads."""
    in_layer = unit.layer not in PARTS
    part = _part(unit.layer, by_site) if in_layer else unit.part
    return _RANKS.get(part, _LAYERS if in_layer else _AFTER), in_layer, first, PARTS.index(unit.part)
