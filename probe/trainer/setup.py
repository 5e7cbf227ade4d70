"""The facts of one ``train()`` call that findings judge by: read from the Trainer, its model and its tokenizer before the first step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from probe.foreign.sharding import is_sharded
from probe.records import Setup
from probe.sites.adapters import adapter_layers
from probe.sites.audio_inputs import first_encoder, mel_bins_of
from probe.sites.configs import config_of, field_of
from probe.sites.discovery import Discovery
from probe.sites.dropout import config_dropout
from probe.sites.facts import core_model, output_embeddings
from probe.sites.names import is_pretrained, module_names, unwrapped
from probe.sites.tokenizers import read_tokenizer


def read_setup(trainer: Any, model: nn.Module, discovery: Discovery, processors: Sequence[Any]) -> Setup:
    """Return what is known of a training that is about to begin. Changes nothing, and reads no value of any tensor.

    Args:
        trainer: The Trainer, ``on_train_begin``: its state knows the steps, its model is prepared.
        model: The root: what the Trainer trains, below DDP.
        discovery: The sites of it.
        processors: Tokenizers and processors, best first.
    """
    core, facts, tokenizer = core_model(model), discovery.facts, read_tokenizer(processors)
    embedding = _input_embedding(core)
    encoder = first_encoder(discovery.sites.sites, discovery.modules)
    ties, tied = _tied(core, embedding)
    return Setup(
        model_class=facts.model_class,
        encoder_decoder=facts.encoder_decoder,
        vocabulary=facts.vocabulary,
        tokenizer_size=None if tokenizer is None else tokenizer.size,
        added_tokens=None if tokenizer is None or tokenizer.added is None else len(tokenizer.added),
        embedding_trains=_embedding_trains(model, embedding),
        ties_head=ties,
        head_is_tied=tied,
        mel_bins=mel_bins_of(encoder),
        codebooks=facts.codebooks,
        dropout=config_dropout(core),
        adapters=len(adapter_layers(model)),
        **_of_trainer(trainer),
    )


def _of_trainer(trainer: Any) -> dict[str, Any]:
    args, state = trainer.args, trainer.state
    steps = state.max_steps if isinstance(state.max_steps, int) and state.max_steps > 0 else None
    clip = getattr(args, "max_grad_norm", None)
    return {
        "max_steps": steps,
        "warmup_steps": _warmup(getattr(trainer, "lr_scheduler", None)),
        "accumulation": int(args.gradient_accumulation_steps),
        "max_grad_norm": None if clip is None else float(clip),
        "ranks": int(getattr(trainer.accelerator, "num_processes", 1)),
    }


def _warmup(scheduler: Any) -> int | None:
    """Return the steps of warm-up that a scheduler of transformers was made with; ``None`` where it does not tell."""
    told = [getattr(rate, "keywords", {}).get("num_warmup_steps") for rate in getattr(scheduler, "lr_lambdas", ())]
    return int(told[0]) if told and isinstance(told[0], (int, float)) else None


def _input_embedding(core: nn.Module) -> nn.Module | None:
    get = getattr(core, "get_input_embeddings", None)
    try:
        found = get() if callable(get) else None
    except Exception:  # code of any model; many raise on purpose
        return None
    return found if isinstance(found, nn.Module) else None


def _embedding_trains(model: nn.Module, embedding: nn.Module | None) -> bool | None:
    """Tell whether any weight at the place of the input embedding trains: its own, an adapter's, or that of a copy that is trained."""
    if embedding is None:
        return None
    names = module_names(model)
    here = names.find(embedding)
    if here is None:
        return any(p.requires_grad for p in embedding.parameters())
    modules = (module for module in model.modules() if names.find(module) == here)
    return any(p.requires_grad for module in modules for p in module.parameters())


def _tied(core: nn.Module, embedding: nn.Module | None) -> tuple[bool | None, bool | None]:
    """Return whether config and class say that head and input embedding share their weight, and whether they do.

    The config's ``tie_word_embeddings`` is true by default, so that it stands in configs of models whose class ties nothing: the class
    must name the head's weight among those that it ties, too (``_tied_weights_keys``).
    """
    owner = _owner_of_head(core)
    head = None if owner is None else output_embeddings(owner)
    if owner is None or head is None or embedding is None:
        return None, None
    head_weight, weight = (getattr(unwrapped(module), "weight", None) for module in (head, embedding))
    if head_weight is None or weight is None or is_sharded(head_weight) or is_sharded(weight):
        return None, None
    return _config_ties(config_of(owner)) and _class_ties(owner, head), head_weight is weight


def _owner_of_head(core: nn.Module) -> nn.Module | None:
    """Return the innermost model that has the head: transformers 4 keeps it inside the language model of a model of several."""
    head = output_embeddings(core)
    owners = [module for module in core.modules() if is_pretrained(module) and output_embeddings(module) is head]
    return owners[-1] if head is not None and owners else None


def _config_ties(config: Any) -> bool:
    text = field_of(config, "text_config")
    return all(bool(field_of(part, "tie_word_embeddings")) for part in (config, text) if part is not None)


def _class_ties(owner: nn.Module, head: nn.Module) -> bool:
    keys = getattr(owner, "_tied_weights_keys", None) or ()
    name = next((name for name, module in owner.named_modules() if module is head), None)
    return name is not None and any(str(key) == f"{name}.weight" for key in keys)
