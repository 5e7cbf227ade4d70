"""Which module's output goes into each LM head: what a head that the model does without can be evaluated on."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from torch import nn

from probe.records import Site
from probe.sites.configs import config_of, number_of, text_of
from probe.sites.names import ModuleNames, is_below, is_pretrained, unwrapped

_BACKBONES = ("model", "transformer", "language_model", "text_model", "decoder", "backbone", "gpt_neox", "base_model", "llm")
# Between decoder and head these scale the hidden state (T5ForConditionalGeneration.forward, with tied embeddings).
_SCALED = frozenset({"t5", "mt5", "umt5", "longt5", "switch_transformers", "udop", "pix2struct"})


def find_feeders(names: ModuleNames, core: nn.Module, heads: Sequence[Site]) -> Mapping[str, str]:
    """Return, by head, the name of the module whose last output is the head's input; a head of which that is not known is left out.

    It is the body of the innermost model that owns the head: transformers' ``base_model``, a child with a usual name, or the decoder.
    Reads the module tree and the configs only.
    """
    found = {head.name: next(_candidates(names, core, head.name), None) for head in heads}
    return {head: feeder for head, feeder in found.items() if feeder is not None}


def input_width(head: nn.Module) -> int | None:
    """Return the size of the head's input, wrappers and LoRA seen through; ``None`` if the module does not tell."""
    return number_of(unwrapped(head), "in_features", "nx", "in_channels")


def _candidates(names: ModuleNames, core: nn.Module, head: str) -> Iterator[str]:
    owner = _owner(names, core, head)
    if text_of(config_of(owner), "model_type") in _SCALED:
        return
    asked = [getattr(owner, "base_model", None)] if is_pretrained(owner) else []
    for body in (*asked, *(owner._modules.get(child) for child in _BACKBONES)):
        name = names.find(body) if isinstance(body, nn.Module) else None
        if name and name in names.by_name and name != head and not is_below(head, name):
            yield name


def _owner(names: ModuleNames, core: nn.Module, head: str) -> nn.Module:
    """Return the innermost transformers model round the head, else the module that it is an attribute of."""
    above = parent = head.rpartition(".")[0]
    while above:
        module = names.by_name.get(above)
        if module is not None and is_pretrained(unwrapped(module)):
            return unwrapped(module)
        above = above.rpartition(".")[0]
    root = unwrapped(names.by_name[""])
    inside = names.find(core)
    if is_pretrained(core) and inside is not None and (inside == "" or is_below(head, inside)):
        return core
    return unwrapped(names.by_name[parent]) if parent in names.by_name else root
