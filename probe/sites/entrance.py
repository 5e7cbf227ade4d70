"""Where embeddings enter the decoder that has text and audio in one sequence: its first layer."""

from __future__ import annotations

from collections.abc import Iterable

from probe.records import Site
from probe.sites.names import ModuleNames


def find_entrance(names: ModuleNames, sites: Iterable[Site]) -> str:
    """Return the name of the layer round the first attention over text and audio; "" if there is none.

    What it is given is the sequence of embeddings, of text, of codes and of an encoder's frames, that the decoder begins with.
    """
    first = next((site.name for site in sites if site.role == "attention" and site.kind == "joint"), "")
    layer = first.rpartition(".")[0]
    return layer if layer in names.by_name else ""
