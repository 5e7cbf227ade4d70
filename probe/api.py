"""``attach``: the one line that a training script adds."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from probe.attachment import REGISTRY, Probe
from probe.callbacks import (
    InputLoggerCallback,
    OutputLoggerCallback,
    SharedAttentionLoggerCallback,
    ZeroShotVerificationLoggerCallback,
)
from probe.errors import AttachError, ProbeTypeError
from probe.settings import CompileMode, OnFinding, Options, Settings, SiteChoices, StopOn, check_keep
from probe.sites.choices import named_choices
from probe.trainer.record_callback import RecordCallback
from probe.trainer.wiring import is_switched_off, watch_trainers


def attach(
    model: nn.Module,
    *,
    every: int = 100,
    tokenizer: Any = None,
    sites: SiteChoices = "auto",
    keep: Collection[str] = (),
    budget_mib: float = 64,
    compile: CompileMode = "window",  # noqa: A002  (torch and transformers call it so)
    stop_on: StopOn | None = None,
    on_finding: OnFinding | None = None,
    settings: Settings | None = None,
) -> Probe:
    """Observe the training of a model by any Hugging Face Trainer, before or after the Trainer is built.

    Nothing is hooked until training begins, and then only inside sampled steps: the first one, and every ``every``-th. The Trainer
    needs no change: the callbacks of :mod:`probe.callbacks` that it lacks are added while it trains.

    Args:
        model: The model that will be trained, or any module of it. A wrapper, PEFT or DDP may go round it later.
        every: Cadence of sampled steps, at least 1.
        tokenizer: Turns token ids into text; a processor that holds one will do. Default: the Trainer's processing class.
        sites: "auto", or a mapping from role to module, name pattern, or a list of these. A list replaces what was found for its
            role; the word "auto" inside it keeps that; the role "custom" adds sites.
        keep: Names, roles or name patterns of sites whose output tensors stay in ``p.buffer`` until the next step begins.
        budget_mib: Upper bound in MiB of what the step buffer holds; what does not fit is left out and named.
        compile: "window" runs sampled steps of a compiled model eagerly; "in_graph" leaves them compiled, and sees less; "off" leaves
            compiled models unobserved. See "Compiled models" in the documentation.
        stop_on: "critical" or "warning": training ends, on every rank at the same step, when a finding at least that severe opens.
        on_finding: Called on rank 0 with every :class:`probe.records.Finding` that opens, changes its severity or closes, when the
            record of its step is published. An error in it is said once and switches it off.
        settings: What is rarer.

    Returns:
        The probe; the same one when called again with the same options.

    Raises:
        ProbeTypeError, ProbeValueError: if an argument is of the wrong type, or out of its bounds.
        SiteError: if ``sites`` names a module that the model does not have; the message names the nearest ones.
        AttachError: if the model has a probe with other options.
    """
    given: object = model  # scripts are rarely type-checked
    if not isinstance(given, nn.Module):
        inner = getattr(given, "model", None)
        hint = "; pass its .model instead" if isinstance(inner, nn.Module) else ""
        raise ProbeTypeError(f"attach(model): expected a torch.nn.Module, got {type(given).__name__}{hint}")
    rare = Settings() if settings is None else settings
    options = Options(every, tokenizer, sites, check_keep(keep), budget_mib, compile, rare, stop_on, on_finding)
    options = replace(options, sites=named_choices(model, options.sites))
    if is_switched_off():
        return Probe(model, options, callbacks=_four, enabled=False)
    known = REGISTRY.get(model)
    if known is not None:
        if known.options == options:
            return known
        differences = known.options.differences(options)
        raise AttachError(f"this {type(model).__name__} has a probe with other options ({differences}); call its detach() first")
    probe = Probe(model, options, callbacks=_four)
    REGISTRY.add(model, probe, patch=watch_trainers)
    return probe


def _four(every: int) -> Sequence[RecordCallback]:
    return (
        InputLoggerCallback(log_every_n_steps=every),
        OutputLoggerCallback(log_every_n_steps=every),
        SharedAttentionLoggerCallback(log_every_n_steps=every),
        ZeroShotVerificationLoggerCallback(log_every_n_steps=every),
    )
