"""Which sites lie inside compiled regions when these stay compiled, how they are seen there, and why what cannot be seen is not."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from probe.capture.hooks import Watched
from probe.capture.in_graph import SEEN
from probe.foreign.compiled import Region

UNSEEN = "unseen:"
"""Before the name of an observer, in the reasons of a step: why it sees nothing of the model."""

_OUTPUT_ONLY = "inside a torch.compile region only outputs are seen with compile='in_graph'; compile='window' sees the rest, eagerly"
_REPLAYED = (
    "it lies inside a region that was compiled for CUDA graphs (mode='reduce-overhead', or another that uses them), which replay kernels "
    "and no Python; compile='window' runs sampled steps eagerly and sees it"
)
_HOLDS_REGION = "an attention layer of which torch.compile has taken a part is left alone with compile='in_graph'"
_ALL = ("branches",)  # what is missing would look like no tokens
_FOR_OTHERS = ("modality",)  # measures nothing itself
_PER_SITE = {"attention": "attention", "activation_gradients": "activation_gradient"}


@dataclass(frozen=True, slots=True)
class CompiledSites:
    """How the sites of a model with compiled regions are seen while these stay compiled.

    Attributes:
        reported: Those that compiled code reports.
        left_out: Names of all that ordinary hooks must not touch.
        door: The region that the root itself is in, where its calls can be seen from outside; ``None`` if the root is in none.
        reasons: What is not seen of the model, and why: by site, and by observer (behind ``UNSEEN``) where it sees none of its sites.
    """

    reported: tuple[Watched, ...]
    left_out: frozenset[str]
    door: Region | None
    reasons: dict[str, str]


def divide_sites(watched: Sequence[Watched], regions: Sequence[Region]) -> CompiledSites:
    """Tell the sites inside compiled regions from those outside.

    Args:
        watched: All that is watched, the root first.
        regions: What ``torch.compile`` has taken, outer regions before those in them.
    """
    inside = {module for region in regions for module in region.inside()}
    replayed = {module for region in regions if region.replays for module in region.inside()}
    root, sites = watched[0], [one for one in watched if one.site.name]
    taken = {one.site.name: one for one in sites if id(one.module) in inside}
    holding = {one.site.name: one for one in sites if one.site.role == "attention" and _holds(one.module, regions)}
    left_out = {**holding, **taken}
    # What is no site is watched for what goes into it.
    reported = tuple(one for one in taken.values() if set(one.observers) & set(SEEN[:1]) and id(one.module) not in replayed)
    blind = dict.fromkeys(holding, _HOLDS_REGION) | {name: _REPLAYED for name, one in taken.items() if id(one.module) in replayed}
    door = next((region for region in regions if id(root.module) in region.inside()), None)
    reasons = {**_by_site(left_out.values(), blind), **_by_observer(sites, left_out, blind)}
    return CompiledSites(reported, frozenset(left_out), door, reasons)


def _holds(module: nn.Module, regions: Sequence[Region]) -> bool:
    parts = {id(part) for part in module.modules()} - {id(module)}
    return any(id(region.top) in parts for region in regions)


def _by_site(left_out: Iterable[Watched], blind: Mapping[str, str]) -> dict[str, str]:
    found = {f"site:{name}": why for name, why in blind.items()}
    for one in left_out:
        why = blind.get(one.site.name, _OUTPUT_ONLY)
        found |= {f"{_PER_SITE[observer]}:{one.site.name}": why for observer in one.observers if observer in _PER_SITE}
        if one.site.role == "lm_head" and one.site.name in blind:
            found[f"head:{one.site.name}"] = why
    return found


def _by_observer(sites: Sequence[Watched], left_out: Mapping[str, Watched], blind: Mapping[str, str]) -> dict[str, str]:
    """Return the reasons of those observers that see none of the sites they watch, or must see all; those of ``SEEN`` see outputs."""
    whys: dict[str, list[str]] = {}
    for one in sites:
        for observer in one.observers:
            lost = one.site.name in blind or (one.site.name in left_out and observer not in SEEN)
            whys.setdefault(observer, []).append(blind.get(one.site.name, _OUTPUT_ONLY) if lost else "")
    blind_to = {observer: found for observer, found in whys.items() if all(found) or (observer in _ALL and any(found))}
    return {f"{UNSEEN}{observer}": next(filter(None, found)) for observer, found in blind_to.items() if observer not in _FOR_OTHERS}
