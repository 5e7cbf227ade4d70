"""Puts the record of one step together from its host numbers, concern by concern."""

from __future__ import annotations

import time
from collections.abc import Mapping

from probe.assemble.attention import attention
from probe.assemble.checks import checks
from probe.assemble.conditioning import branches, conditioning, optimisation
from probe.assemble.counterfactual import counterfactual
from probe.assemble.draft import Draft, RunContext
from probe.assemble.gradients import activation_gradients, layers, parts
from probe.assemble.inputs import inputs
from probe.assemble.loss_audit import loss_audit
from probe.assemble.modes import modes
from probe.assemble.outputs import heads, statistics
from probe.capture.compiled_sites import UNSEEN
from probe.merge.packing import HostStep
from probe.records import StepRecord

_GRADIENTS = ("activation_gradients", "reference_gradient")
_BY_HOOKS = ("inputs", "statistics", "heads", "attention", "branches", "counterfactual", "checks", "audio_checks", "modes", *_GRADIENTS)
_ROLES_WORTH_NAMING = ("audio_encoder", "projector", "attention", "lm_head")


def assemble(step: int, host: HostStep, run: RunContext, *, failures: Mapping[str, str], logged: float | None = None) -> StepRecord:
    """Return the record of a step.

    Args:
        step: Its number.
        host: Its numbers; the ranks' are combined in the cells.
        run: What is known of the whole run.
        failures: Parts of the probe that an error has switched off, and why.
        logged: The training loss that the Trainer logs of this step alone, if it does.
    """
    closed = host.reasons.get("model") or failures.get("hooks")
    unseen = {what.removeprefix(UNSEEN): why for what, why in host.reasons.items() if what.startswith(UNSEEN)}
    blind = {**unseen, **(dict.fromkeys(_BY_HOOKS, closed) if closed else {}), **failures}
    draft = Draft(host, run, blind=blind)
    draft.reasons.update(run.reasons)
    draft.reasons.update({role: run.sites.missing[role] for role in _ROLES_WORTH_NAMING if role in run.sites.missing})
    draft.reasons.update(blind)
    tables, gradients = statistics(draft), activation_gradients(draft)
    record = StepRecord(
        step=step,
        time=time.time(),
        ranks=int(draft.count("step", "ranks")) or 1,
        metrics=draft.metrics,
        not_measured=draft.reasons,
        inputs=inputs(draft),
        statistics=tables,
        heads=heads(draft, tables),
        attention=attention(draft),
        branches=branches(draft),
        parts=parts(draft),
        layers=layers(draft),
        activation_gradients=gradients,
        conditioning=conditioning(draft, tables, gradients),
        optimisation=optimisation(draft),
        loss_audit=loss_audit(draft, logged=logged),
        checks=checks(draft),
        modes=modes(draft),
        counterfactual=counterfactual(draft),
    )
    for what, why in host.reasons.items():
        if what not in draft.metrics and not what.startswith(UNSEEN):  # said beforehand, of what might not come out
            draft.reasons.setdefault(what, why)
    return record
