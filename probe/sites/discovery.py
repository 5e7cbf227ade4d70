"""Putting the rules together: the sites of a model, role by role, and for each role without one the reason."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from probe.errors import ProbeTypeError, SiteError
from probe.records import Role, Site
from probe.settings import SiteChoices
from probe.sites.attention import NO_ATTENTION, AttentionFinder, find_attention
from probe.sites.audio_masks import mask_takers
from probe.sites.branches import NO_BRANCHES, find_branches
from probe.sites.choices import nearest, resolve_choice
from probe.sites.encoders import find_encoders, why_no_encoder
from probe.sites.entrance import find_entrance
from probe.sites.facts import ModelFacts, core_model, read_facts
from probe.sites.feeders import find_feeders
from probe.sites.heads import CTC, NO_HEAD, ctc_heads, find_heads, head_site
from probe.sites.names import ModuleNames, class_name, module_names
from probe.sites.projectors import find_projectors, why_no_projector

_FOUND_ROLES: tuple[Role, ...] = ("audio_encoder", "projector", "attention", "lm_head", "feed_forward")
_SPECIFIC_FIRST: tuple[Role, ...] = ("lm_head", "attention", "feed_forward", "projector", "audio_encoder", "custom")
_SWITCHED_OFF = "left empty on purpose by sites="


@dataclass(frozen=True, repr=False)
class SiteMap:
    """The sites of a model, and for each role that has none the reason. Holds no module, so it can be kept, pickled and printed.

    Attributes:
        sites: The root first (role "model", name ""), then role by role in tree order. A module has one site.
        missing: Role (or "ctc_head") to the reason why it has no site.
    """

    sites: tuple[Site, ...]
    missing: Mapping[str, str]

    def of(self, role: Role) -> tuple[Site, ...]:
        """Return the sites of one role, in tree order."""
        return tuple(site for site in self.sites if site.role == role)

    def __getitem__(self, name: str) -> Site:
        """Return the site of that name.

        Raises:
            SiteError: there is none; the message names the nearest ones.
        """
        for site in self.sites:
            if site.name == name:
                return site
        raise SiteError(f"no site is called {name!r}{nearest(name, (site.name for site in self.sites))}")

    def __iter__(self) -> Iterator[Site]:
        return iter(self.sites)

    def __len__(self) -> int:
        return len(self.sites)

    def __repr__(self) -> str:
        """Return a table: role, name, kind, found by; then what was not found, and why."""
        rows = [("role", "name", "kind", "found by")]
        rows.extend((site.role, site.name or "(root)", _kind_text(site), site.found_by) for site in self.sites)
        widths = [max(len(row[column]) for row in rows) for column in range(3)]
        lines = ["  ".join([*(cell.ljust(width) for cell, width in zip(row, widths)), row[3]]) for row in rows]
        return "\n".join([*lines, *(f"not found: {role}: {reason}" for role, reason in self.missing.items())])


@dataclass(frozen=True)
class Discovery:
    """The sites of one model together with their modules.

    Attributes:
        sites: The map without modules.
        modules: Site name to the module that runs under it; "" is the model itself.
        facts: What the model says of itself.
        watched: Name to module of what is no site and yet watched, for the sake of its arguments or its output.
        feeders: By LM head, the name (of a site or of what is watched) of the module whose output goes into it, where that is known.
        mask_takers: Names, of sites or of what is watched, of the modules that are given masks of the tokens that are audio.
        entrance: Name of what is given the embeddings that the decoder begins with, text and audio in one sequence; "" if there is none.
    """

    sites: SiteMap
    modules: Mapping[str, nn.Module]
    facts: ModelFacts
    watched: Mapping[str, nn.Module] = field(default_factory=dict)
    mask_takers: tuple[str, ...] = ()
    feeders: Mapping[str, str] = field(default_factory=dict)
    entrance: str = ""


def discover(model: nn.Module, *, choices: SiteChoices = "auto") -> Discovery:
    """Find the sites of a model. Reads the module tree and the config only; leaves nothing behind on the model.

    Where two roles claim one module, a role that the user chose wins over a role that was found (but "custom" only adds), and then the
    more specific: head, attention, feed-forward, projector, encoder, custom.

    Args:
        model: The model that is trained, with whatever wrappers are round it.
        choices: "auto", or by role what to take instead of what the rules find; see :func:`probe.sites.choices.resolve_choice`.

    Raises:
        ProbeTypeError: ``model`` is not a module, or a choice has the wrong type.
        SiteError: a choice matches nothing, or names an unknown role.
    """
    if not isinstance(model, nn.Module):
        raise ProbeTypeError(f"expected a torch.nn.Module, got {type(model).__name__}")
    search = _Search(module_names(model), core_model(model), read_facts(model), {} if isinstance(choices, str) else choices)
    unknown = [role for role in search.choices if role not in (*_FOUND_ROLES, "custom")]
    if unknown:
        raise SiteError(f"sites has no role {', '.join(map(repr, unknown))}; the roles are {', '.join((*_FOUND_ROLES, 'custom'))}")
    sites = _one_each(search.sites(), frozenset(search.choices), search.names)
    root = Site("", "model", f"the model itself ({class_name(search.core)})")
    missing = search.missing(sites)
    modules = {"": model, **{site.name: search.names.by_name[site.name] for site in sites}}
    takers = mask_takers(search.names, sites)
    feeders = find_feeders(search.names, search.core, [site for site in sites if site.role == "lm_head"])
    entrance = find_entrance(search.names, sites)
    beside = (*takers, *feeders.values(), *filter(None, [entrance]))
    watched = {name: search.names.by_name[name] for name in beside if name not in modules}
    return Discovery(SiteMap((root, *sites), missing), modules, search.facts, watched, takers, feeders, entrance)


@dataclass(frozen=True, slots=True)
class _Search:
    """One search through one model: rules first, choices over them."""

    names: ModuleNames
    core: nn.Module
    facts: ModelFacts
    choices: Mapping[str, Any]

    def sites(self) -> list[Site]:
        """Return the sites of all roles; a module may still stand in several. Encoders come first: attention's kind depends on them."""
        encoders = self._plain("audio_encoder", find_encoders(self.names, self.core))
        projectors = self._plain("projector", find_projectors(self.names, [site.name for site in encoders]))
        audio = [site.name for site in (*encoders, *projectors)]
        attention = self._attention(find_attention(self.names, self.core, self.facts, audio))
        heads = self._heads(find_heads(self.names, self.core, self.facts))
        return [*encoders, *projectors, *attention, *heads, *self._branches(find_branches(self.names)), *self._plain("custom", ())]

    def missing(self, sites: tuple[Site, ...]) -> dict[str, str]:
        """Say why each role that has no site has none."""
        encoders = [site.name for site in sites if site.role == "audio_encoder"]
        ctc = ctc_heads(self.names, self.core)
        reasons = {
            "audio_encoder": why_no_encoder(self.names, self.core, self.facts.codebooks),
            "projector": why_no_projector(encoders, encoder_decoder=self.facts.encoder_decoder),
            "attention": NO_ATTENTION,
            "lm_head": f"the only head is {', '.join(ctc)}, {CTC}" if ctc else NO_HEAD,
            "feed_forward": NO_BRANCHES,
        }
        present = {site.role for site in sites}
        absent: dict[str, str] = {}
        for role in (role for role in _FOUND_ROLES if role not in present):
            absent[role] = _SWITCHED_OFF if self._is_off(role) else reasons[role]
        return {**absent, "ctc_head": f"{', '.join(ctc)}: {CTC}"} if ctc else absent

    def _is_off(self, role: Role) -> bool:
        choice = self.choices.get(role)
        return isinstance(choice, Sequence) and len(choice) == 0

    def _resolved(self, role: Role, found: Iterable[Site]) -> dict[str, str] | None:
        if role not in self.choices:
            return None
        return resolve_choice(self.names, role, self.choices[role], [(site.name, site.found_by) for site in found])

    def _plain(self, role: Role, found: tuple[Site, ...]) -> tuple[Site, ...]:
        chosen = self._resolved(role, found)
        return found if chosen is None else tuple(Site(name, role, found_by) for name, found_by in chosen.items())

    def _attention(self, finder: AttentionFinder) -> list[Site]:
        found = [finder.site(name, found_by) for name, found_by in finder.found.items()]
        chosen = self._resolved("attention", found)
        return found if chosen is None else [finder.site(name, found_by) for name, found_by in chosen.items()]

    def _heads(self, found: tuple[Site, ...]) -> tuple[Site, ...]:
        chosen = self._resolved("lm_head", found)
        if chosen is None:
            return found
        return tuple(head_site(self.names, self.core, self.facts, name, found_by) for name, found_by in chosen.items())

    def _branches(self, found: tuple[Site, ...]) -> tuple[Site, ...]:
        chosen = self._resolved("feed_forward", found)
        if chosen is None:
            return found
        return tuple(
            Site(name, "feed_forward", found_by, modality="audio" if "audio" in name.rpartition(".")[2] else "text")
            for name, found_by in chosen.items()
        )


def _one_each(found: list[Site], chosen_roles: frozenset[str], names: ModuleNames) -> tuple[Site, ...]:
    """Keep one site a module, and order the sites by role, then as the tree has them."""

    def rank(site: Site) -> tuple[bool, int]:
        return (site.role == "custom" or site.role not in chosen_roles, _SPECIFIC_FIRST.index(site.role))

    kept: dict[str, Site] = {}
    for site in sorted(found, key=rank):
        kept.setdefault(site.name, site)
    place = {name: position for position, name in enumerate(names.by_name)}
    order = (*_FOUND_ROLES, "custom")
    return tuple(sorted(kept.values(), key=lambda site: (order.index(site.role), place[site.name])))


def _kind_text(site: Site) -> str:
    words: list[str] = [site.kind or site.modality or ""]
    if site.codebooks:
        words.append(f"x{site.codebooks} codebooks" if site.codebooks > 1 else "x1 codebook")
    return " ".join(words).strip()
