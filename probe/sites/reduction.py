"""How a model's class puts its loss together: over which labels it takes the mean, which heads enter and with what weight.

Decided before training from the class, never from the numbers. How the mean is taken stands in the source of ``forward`` (or of what
``forward`` hands its labels to): a loss function that is given the keyword arguments of ``forward`` divides by ``num_items_in_batch``
among them; ``CrossEntropyLoss()`` takes the mean over its micro-batch. How several heads or codebooks are put together cannot be read
there; it is known for the families in ``_TOGETHER``, and for others said to be unknown.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

from probe.records import Modality, Site
from probe.sites.configs import all_configs, field_of
from probe.sites.facts import ModelFacts, core_model

By = Literal["items", "micro-batch"]

# Where the source of forward cannot be read, or does not tell: what it says in the versions that were checked (4.46, 4.57, 5.23).
_KNOWN: dict[str, By] = {
    "WhisperForConditionalGeneration": "micro-batch",
    "Qwen2AudioForConditionalGeneration": "micro-batch",
    "VoxtralForConditionalGeneration": "items",
    "HiggsAudioV2ForConditionalGeneration": "items",
    "HiggsAudioModel": "micro-batch",
    "LlamaForCausalLM": "items",
}

# Text head plus audio head: what is done with the losses of the codebooks before they are added to that of the text.
_TOGETHER: dict[str, Literal["sum", "mean"]] = {"HiggsAudioV2ForConditionalGeneration": "sum", "HiggsAudioModel": "mean"}

_DEPTH = 4


@dataclass(frozen=True, slots=True)
class Term:
    """One cross-entropy in the loss: of a head, or of one codebook of it, times ``weight``."""

    site: str
    codebook: int | None
    modality: Modality
    weight: float = 1.0


@dataclass(frozen=True, slots=True)
class Reduction:
    """How one model's loss is put together.

    Attributes:
        model_class: Class name of the core model.
        by: "items": Σ cross-entropy ÷ ``num_items_in_batch``, if the Trainer counts it, else as the other: "micro-batch": the mean over
            the labels of each micro-batch.
        terms: What is added up.
        together: The terms in words; "" where there is one head without codebooks.
        label_shift: As in :class:`ModelFacts`.
        auxiliary: The weight of the output's ``aux_loss`` in the loss, by the config; 0 if it has none.
        reason: Why the loss cannot be put together again; "" if it can.
    """

    model_class: str
    by: By = "micro-batch"
    terms: tuple[Term, ...] = ()
    together: str = ""
    label_shift: int = 0
    auxiliary: float = 0.0
    reason: str = ""


def read_reduction(model: nn.Module, sites: Sequence[Site], facts: ModelFacts) -> Reduction:
    """Decide how the loss of a model is put together. Reads source text, no tensor values.

    Args:
        model: The root.
        sites: All sites; its LM heads count.
        facts: The model's facts.
    """
    name, core = facts.model_class, core_model(model)
    heads = [site for site in sites if site.role == "lm_head"]
    if not heads:
        return Reduction(name, reason="no LM head was found")
    terms, together, unknown = _terms(name, heads)
    by, why = loss_mean(core)
    by = by or _KNOWN.get(name)
    if by is None:
        unknown = unknown or f"over what {name} takes the mean of its loss is not known: {why}"
    coefficient = next((c for config in all_configs(core) if isinstance(c := field_of(config, "router_aux_loss_coef"), (int, float))), 0.0)
    return Reduction(name, by or "micro-batch", terms, together, facts.label_shift, float(coefficient), unknown)


def loss_mean(module: nn.Module, depth: int = 0) -> tuple[By | None, str]:
    """Tell over what a module's loss is a mean, by the source of its ``forward``; ``None`` and the reason if that does not tell."""
    function = inspect.unwrap(getattr(module.forward, "__func__", module.forward))
    name = f"{type(module).__name__}.forward"
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    except (OSError, TypeError, SyntaxError):
        return None, f"the source of {name} cannot be read"
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    spread = next((node.args.kwarg.arg for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) and node.args.kwarg), "")
    found = {kind for call in calls if (kind := _kind(call, spread)) is not None}
    if len(found) == 1:
        kind = found.pop()
        return (None, f"{name} calls a cross-entropy without a mean") if kind == "sum" else (kind, "")
    if found:
        return None, f"{name} takes its mean in more than one way"
    inner = [part for call in calls if (part := _given_labels(call, module)) is not None]
    if len(inner) == 1 and depth < _DEPTH:
        by, why = loss_mean(inner[0][0], depth + 1)
        return ("micro-batch" if by == "items" and not _passes_on(inner[0][1], spread) else by), why
    return None, f"{name} calls no loss function that is known"


def _kind(call: ast.Call, spread: str) -> Literal["items", "micro-batch", "sum"] | None:
    """Tell what one call says of the mean; ``None`` if it calls no loss."""
    called = call.func.attr if isinstance(call.func, ast.Attribute) else call.func.id if isinstance(call.func, ast.Name) else ""
    if called in ("CrossEntropyLoss", "cross_entropy"):
        reduction = next((k.value for k in call.keywords if k.arg == "reduction"), None)
        return "micro-batch" if reduction is None or (isinstance(reduction, ast.Constant) and reduction.value == "mean") else "sum"
    if called in ("loss_function", "fixed_cross_entropy") or called.endswith("ForCausalLMLoss"):
        return "items" if _passes_on(call, spread) else "micro-batch"
    return None


def _passes_on(call: ast.Call, spread: str) -> bool:
    """Tell whether a call is given ``num_items_in_batch``: by name, or among the keyword arguments of ``forward``."""
    if any(k.arg == "num_items_in_batch" for k in call.keywords):
        return True
    return bool(spread) and any(k.arg is None and isinstance(k.value, ast.Name) and k.value.id == spread for k in call.keywords)


def _given_labels(call: ast.Call, module: nn.Module) -> tuple[nn.Module, ast.Call] | None:
    """Return the module of ``self.x.y(..., labels=labels)`` and the call."""
    if not any(k.arg == "labels" and isinstance(k.value, ast.Name) and k.value.id == "labels" for k in call.keywords):
        return None
    path: list[str] = []
    node: ast.AST = call.func
    while isinstance(node, ast.Attribute):
        path.append(node.attr)
        node = node.value
    if not path or not isinstance(node, ast.Name) or node.id != "self":
        return None
    found: Any = module
    for part in reversed(path):
        found = getattr(found, part, None)
    return (found, call) if isinstance(found, nn.Module) else None


def _terms(name: str, heads: Sequence[Site]) -> tuple[tuple[Term, ...], str, str]:
    """Return the terms of the loss, in words, and why they are not known ("" if they are)."""
    codebooks = max(head.codebooks for head in heads)
    if len(heads) == 1 and codebooks <= 1:
        return (Term(heads[0].name, None, heads[0].modality or "text"),), "", ""
    how = _TOGETHER.get(name)
    audio = [head for head in heads if head.modality == "audio"]
    if how is None or len(audio) > 1 or len(heads) - len(audio) > 1:
        many = f"{len(heads)} heads" if len(heads) > 1 else f"{codebooks} codebooks"
        return (), "", f"how {name} puts {many} together is not known"
    terms: list[Term] = []
    for head in heads:
        books = range(head.codebooks) if head.codebooks > 1 else (None,)
        share = 1.0 / len(books) if how == "mean" else 1.0
        terms += [Term(head.name, book, head.modality or "text", share) for book in books]
    words = f"{how} of {codebooks} codebooks"
    return tuple(terms), f"text + {words}" if len(heads) > len(audio) else words, ""
