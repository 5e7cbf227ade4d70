"""The passes of one micro-batch: as it is, then under each intervention that is defined, compared head by head as they come."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from probe.capture.observers.root_call import RootCall
from probe.counterfactual.conditions import Condition
from probe.counterfactual.effects import INTERVENTIONS, effect_sums, own_table, paired_table, samples_known
from probe.counterfactual.interventions import intervene
from probe.counterfactual.reach import reached_samples
from probe.counterfactual.replay import Replayed, run_again
from probe.counterfactual.scoring import Distribution, HeadRows, distribution, divergence, head_rows
from probe.measure.chunks import MIB, accumulator
from probe.records import Intervention, Modality, Site
from probe.sites.facts import ModelFacts
from probe.sites.reference import AudioRoles

POSITIONS = 64
"""Labelled rows of a head that divergence is taken over at most."""
KEPT_MIB = 8.0
"""Bound of the log-probabilities that are kept of the pass as it is, over all heads."""

JOINED = "the labels of all samples lie joined, and nothing tells which sample a label is of"
NO_LOGITS = "the model's output offers log-probabilities of the labels only"
OTHER_ROWS = "under it the head returned another number of rows"


Reserve = Callable[[str, int], bool]
"""Counts bytes for a part of what is measured against the buffer's budget; false, with the reason noted, if they do not fit."""


@dataclass(frozen=True, slots=True)
class Experiment:
    """What does not change from one micro-batch to the next.

    Attributes:
        heads: The LM heads by name.
        modules: Their modules.
        facts: Of the model.
        roles: What its audio may be.
        compiled: Whether something of the model is compiled.
    """

    heads: Mapping[str, Site]
    modules: Mapping[str, nn.Module]
    facts: ModelFacts
    roles: AudioRoles
    compiled: bool = False


@dataclass(slots=True)
class Outcome:
    """What the passes of one micro-batch gave.

    Attributes:
        sums: ``effects.SUMS`` by modality and intervention, float64 on the device.
        known: By modality, whether samples could be told apart.
        tables: By modality (B, 2 + 2 · interventions made) float64: loss and tokens as it is, then of each intervention in the order of
            ``made`` the loss under it and the tokens that it is over.
        made: By modality the interventions made.
        reasons: What could not be had, and why, below "counterfactual": "" is all of it.
    """

    sums: dict[tuple[Modality, Intervention], Tensor] = field(default_factory=dict)
    known: dict[Modality, bool] = field(default_factory=dict)
    tables: dict[Modality, Tensor] = field(default_factory=dict)
    made: dict[Modality, tuple[Intervention, ...]] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)


@dataclass(slots=True)
class _Baseline:
    """The pass as it is: the rows of each head without their logits, and the distributions that are kept."""

    heads: dict[str, HeadRows]
    kept: dict[str, Distribution]


def run_passes(call: RootCall, conditions: Sequence[Condition], experiment: Experiment, *, salt: int, reserve: Reserve) -> Outcome:
    """Run and compare the passes. No sync but the model's own.

    At any time it holds one pass's logits, one changed copy of the conditions, and of the pass as it is 4 bytes a row and at most
    ``KEPT_MIB`` of log-probabilities.

    Args:
        call: The training forward.
        conditions: The inputs to change.
        experiment: The model.
        salt: Which rows divergence is taken over.
        reserve: Asks the buffer's budget.

    Raises:
        Exception: What the model raises.
    """
    outcome, before = Outcome(), None
    for what in INTERVENTIONS:
        replaced = intervene(what, call.micro.inputs, conditions, facts=experiment.facts, roles=experiment.roles)
        if isinstance(replaced, str):
            outcome.reasons[what] = replaced
            continue
        if before is None:
            before = _as_it_is(call, experiment, outcome, salt=salt, reserve=reserve)
            if before is None:
                return outcome
        reached_B = reached_samples(call.micro.inputs, replaced, conditions, facts=experiment.facts, roles=experiment.roles)
        changed = _replay(call, replaced, experiment)
        if isinstance(changed, str):
            outcome.reasons[what] = changed
            continue
        _compare(what, before, changed, experiment, outcome, reached_B=reached_B)
        del changed, replaced  # before the next ones are made
    return outcome


def _replay(call: RootCall, replaced: Mapping[str, Tensor], experiment: Experiment) -> Replayed | str:
    return run_again(call, replaced, heads={name: experiment.modules[name] for name in experiment.heads}, compiled=experiment.compiled)


def _as_it_is(call: RootCall, experiment: Experiment, outcome: Outcome, *, salt: int, reserve: Reserve) -> _Baseline | None:
    """Run the pass as it is and keep what others are compared with; ``None`` if there is nothing to compare, with the reason."""
    replayed = _replay(call, {}, experiment)
    if isinstance(replayed, str):
        outcome.reasons[""] = replayed
        return None
    scored = {name: head_rows(site, replayed, experiment.facts) for name, site in experiment.heads.items()}
    rows = {name: found for name, found in scored.items() if isinstance(found, HeadRows)}
    for name, found in scored.items():
        if isinstance(found, str):
            outcome.reasons.setdefault(_modality(experiment, name), found)
    if not rows:
        outcome.reasons[""] = next(iter(outcome.reasons.values()), "the model has no LM head")
        return None
    if not reserve("", sum(4 * one.loss_N.numel() for one in rows.values())):
        return None
    before = _Baseline({}, {})
    for name, one in rows.items():
        before.heads[name] = replace(one, logits=None)
        part = f"{_modality(experiment, name)}/divergence"
        kept = _kept(one, len(rows), salt, lambda nbytes, part=part: reserve(part, nbytes))  # type: ignore[misc]
        if kept is not None:
            before.kept[name] = kept
        elif one.logits is None:
            outcome.reasons[part] = NO_LOGITS
    for modality, names in _by_modality(experiment, before).items():
        heads = [before.heads[name] for name in names]
        outcome.known[modality] = samples_known(heads)
        outcome.tables[modality], outcome.made[modality] = own_table(heads), ()
        if not outcome.known[modality]:
            outcome.reasons[f"{modality}/samples"] = JOINED
    return before


def _kept(one: HeadRows, heads: int, salt: int, reserve: Callable[[int], bool]) -> Distribution | None:
    """Keep the distributions of a few rows, as many as the head's share of ``KEPT_MIB`` and the budget admit."""
    if one.logits is None:
        return None
    row_bytes = 4 * one.logits.shape[-1]
    most = min(POSITIONS, int(KEPT_MIB * MIB // heads // row_bytes), one.loss_N.numel())
    return distribution(one, most=most, salt=salt) if most and reserve(most * row_bytes) else None


def _compare(
    what: Intervention, before: _Baseline, changed: Replayed, experiment: Experiment, outcome: Outcome, *, reached_B: Tensor | None
) -> None:
    """Enter what an intervention did to the samples that it reached, modality by modality."""
    for modality, names in _by_modality(experiment, before).items():
        after: list[HeadRows] = []
        for name in names:
            found = head_rows(experiment.heads[name], changed, experiment.facts)
            if isinstance(found, str) or found.loss_N.shape != before.heads[name].loss_N.shape:
                outcome.reasons[f"{modality}/{what}"] = found if isinstance(found, str) else OTHER_ROWS
                break
            after.append(found)
        else:
            table_B3 = paired_table([before.heads[name] for name in names], after, reached_B)
            compared = [(before.kept[name], rows) for name, rows in zip(names, after, strict=True) if name in before.kept]
            apart = [divergence(kept, rows, reached_B) for kept, rows in compared]
            nothing = torch.zeros(2, dtype=accumulator(table_B3.device), device=table_B3.device)
            outcome.sums[modality, what] = effect_sums(table_B3, sum((one.to(nothing) for one in apart), nothing))
            outcome.tables[modality] = torch.cat([outcome.tables[modality], table_B3[:, 1:]], 1)
            outcome.made[modality] = (*outcome.made[modality], what)


def _by_modality(experiment: Experiment, before: _Baseline) -> dict[Modality, list[str]]:
    names: dict[Modality, list[str]] = {}
    for name in before.heads:
        names.setdefault(_modality(experiment, name), []).append(name)
    return names


def _modality(experiment: Experiment, name: str) -> Modality:
    return experiment.heads[name].modality or "text"
