"""Finding every LM head: whether it predicts text or audio, and how many codebooks its output holds side by side."""

from __future__ import annotations

import re

from torch import nn

from probe.records import Modality, Site
from probe.sites.configs import all_configs, number_of
from probe.sites.facts import ModelFacts, output_embeddings
from probe.sites.names import ModuleNames, class_name, unwrapped

NO_HEAD = "get_output_embeddings() gives no module, and no leaf is named lm_head, proj_out, codec_head, codebooks_head or logits_dense"
CTC = "a CTC head: its loss sums over alignments, so there is no label and no cross-entropy for each position"
_NAME = re.compile(r"(?:lm_head|codec_head|codebooks_head|logits_dense)$")
_LIST = re.compile(r"(?:lm_heads|audio_heads|codebook_heads|lm_head)$")
_AUDIO = re.compile(r"audio|codec|codebook")
_CODE_SIZES = ("codebook_size", "audio_codebook_size", "codebook_vocab_size")


def find_heads(names: ModuleNames, core: nn.Module, facts: ModelFacts) -> tuple[Site, ...]:
    """Find every LM head once: what ``get_output_embeddings()`` returns first, then leaves by name."""
    found: dict[str, str] = {}
    output = output_embeddings(core)
    for name in _heads_of(names, output) if output is not None else ():
        found[name] = "the model's own get_output_embeddings()"
    for name in names.by_name:
        if _is_named_head(names, name):
            found.setdefault(name, f"name: {name.rpartition('.')[2]}")
    ctc = ctc_heads(names, core)
    return tuple(head_site(names, core, facts, name, found_by) for name, found_by in found.items() if name not in ctc)


def head_site(names: ModuleNames, core: nn.Module, facts: ModelFacts, name: str, found_by: str) -> Site:
    """Make the site of one head, found or chosen: modality from its name, else from its width and the config."""
    rows = output_width(names.by_name[name])
    modality = _modality(name, rows, core, facts)
    codebooks = 0 if modality == "text" else 1 if name.rpartition(".")[2].isdigit() else _codebooks(rows, core, facts)
    return Site(name, "lm_head", found_by, modality=modality, codebooks=codebooks)


def ctc_heads(names: ModuleNames, core: nn.Module) -> tuple[str, ...]:
    """Return the names of CTC heads: leaves named ``ctc_head``, and the head of a class ``…ForCTC``."""
    found = [name for name in names.by_name if name.rpartition(".")[2] == "ctc_head"]
    for name, module in ((names.find(core) or "", core), *names.by_name.items()):
        if class_name(module).endswith("ForCTC"):
            found.append(f"{name}.lm_head" if name else "lm_head")
    return tuple(name for name in dict.fromkeys(found) if name in names.by_name)


def output_width(head: nn.Module) -> int | None:
    """Return the size of the head's output, wrappers and LoRA seen through; ``None`` if the module does not tell."""
    return number_of(unwrapped(head), "out_features", "nf", "out_channels")


def _heads_of(names: ModuleNames, output: nn.Module) -> tuple[str, ...]:
    """Name what the model returned: a head, or a list of heads; nothing if it is not of this model or is an embedding of tokens."""
    name = names.find(output)
    if not name or name not in names.by_name or isinstance(unwrapped(output), nn.Embedding):
        return ()
    if isinstance(output, nn.ModuleList):
        return tuple(f"{name}.{index}" for index in range(len(output)) if f"{name}.{index}" in names.by_name)
    return (name,)


def _is_named_head(names: ModuleNames, name: str) -> bool:
    """Say whether a leaf is a head by its name, or stands in a list of heads. ``proj_out`` is one only beside the model that feeds it."""
    parent, _, last = name.rpartition(".")
    module = names.by_name[name]
    leaf = not any(True for _ in unwrapped(module).children()) or isinstance(module, nn.Sequential)
    if not leaf or isinstance(module, (nn.ModuleList, nn.ModuleDict)):
        return False
    if last == "proj_out":
        siblings = {other.rpartition(".")[2] for other in names.by_name if other.rpartition(".")[0] == parent and other != ""}
        return bool(siblings & {"model", "decoder"})
    in_list = last.isdigit() and bool(_LIST.search(parent)) and isinstance(names.by_name.get(parent), nn.ModuleList)
    return bool(_NAME.search(last)) or in_list


def _modality(name: str, rows: int | None, core: nn.Module, facts: ModelFacts) -> Modality:
    """Tell text from audio by the head's own name (not by what it stands in), then by its width against codebooks and vocabulary."""
    parts = name.split(".")
    last = parts[-2] if parts[-1].isdigit() and len(parts) > 1 else parts[-1]
    if "text" in last:
        return "text"
    if _AUDIO.search(last) or facts.model_type == "dia" or (parts[-1].isdigit() and facts.codebooks):
        return "audio"
    if rows is None or not facts.codebooks:
        return "text"
    for config in all_configs(core)[:1]:
        size = number_of(config, *_CODE_SIZES)
        if size is not None and rows == facts.codebooks * size and rows != facts.vocabulary:
            return "audio"
        text = number_of(config, "text_vocab_size")
        if text is not None and text != rows and rows == number_of(config, "vocab_size"):
            return "audio"
    return "text"


def _codebooks(rows: int | None, core: nn.Module, facts: ModelFacts) -> int:
    """Count the codebooks side by side: all of them where the width divides by their number, one where it is a codebook's own size."""
    sizes = {number_of(config, *_CODE_SIZES) for config in all_configs(core)[:1]}
    several = rows is not None and facts.codebooks > 1 and rows % facts.codebooks == 0 and rows not in sizes
    return facts.codebooks if several else 1
