"""The observer of the counterfactual passes: in which steps they are made, why in others not, and where their sums go."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import get_args

from torch import Tensor, nn

from probe.capture.buffer import StepBuffer
from probe.capture.cells import Cell
from probe.capture.observer import Call, StepEnd
from probe.capture.observers.root_call import RootCall, RootCallKeeper, device_of, take_root_call
from probe.capture.schedule import PassCadence
from probe.counterfactual.conditions import find_conditions
from probe.counterfactual.cost import Stopwatch
from probe.counterfactual.effects import effect_cell, effect_cells
from probe.counterfactual.passes import Experiment, Outcome, run_passes
from probe.foreign.sharding import is_sharded
from probe.records import Intervention, Modality
from probe.sites.batch import text_labels
from probe.sites.discovery import Discovery
from probe.sites.reference import audio_roles

NAME = "counterfactual"
FACTS = NAME
WAITING = f"{NAME}/waiting"
"""The fact that passes are made in other steps of the run."""
GROUP, LANGUAGE = f"{NAME}/group", f"{NAME}/language"
"""This rank's tensors that groups are read off: the user's column (B,), or the first tokens of the labels (B, up to 4)."""

SHARDED = "sharded parameters: a forward of one rank would wait for the others"
DATA_PARALLEL = "nn.DataParallel runs a replica a device, and none of them sees the whole batch"
NO_CALL = "training_step made no call of the model itself"
OFF = "switched off by counterfactual_every=0"
NO_AUDIO = "the model takes no audio: it has no audio encoder and no audio codebooks"
_LANGUAGE_POSITIONS = 4  # Whisper's labels begin with start (perhaps), language, task, no timestamps


@dataclass(frozen=True, slots=True)
class PassFacts:
    """What the host knows of this rank's passes of a step.

    Attributes:
        inputs: Names of the inputs that were changed.
        made: By modality the interventions made: the columns of its table of samples.
        cost: The time they took.
        groups: A name for each sample from the user's column, where that is no tensor.
    """

    inputs: tuple[str, ...]
    made: Mapping[Modality, tuple[Intervention, ...]]
    cost: Stopwatch
    groups: tuple[str, ...] = ()


def table_key(modality: Modality) -> str:
    """Return the key of this rank's table of samples, see :class:`~probe.counterfactual.passes.Outcome`."""
    return f"{NAME}/table/{modality}"


class CounterfactualWatcher(RootCallKeeper):
    """At the end of the last backward of a step of its cadence, has that micro-batch's forward run again, as it is and changed.

    It issues no collective: what it adds up travels with the step's other sums. Between steps it holds nothing.
    """

    name = NAME

    def __init__(
        self,
        model: nn.Module,
        found: Discovery,
        *,
        around: nn.Module,
        cadence: PassCadence,
        named: Collection[str] = (),
        group_by: str = "",
    ) -> None:
        """Prepare for a run.

        Args:
            model: The root.
            found: Its sites and facts.
            around: What the Trainer calls: the root, or a wrapper round it.
            cadence: In which of the sampled steps passes are made.
            named: Inputs that the user named as conditions.
            group_by: The user's column of groups, "" for none.
        """
        self._model, self._named, self._group_by, self._cadence = model, tuple(named), group_by, cadence
        roles, heads = audio_roles(found.facts, found.sites.sites), {site.name: site for site in found.sites.of("lm_head")}
        self._experiment = Experiment(heads, {name: found.modules[name] for name in heads}, found.facts, roles)
        deaf = not found.sites.of("audio_encoder") and not found.facts.codebooks and not roles.predicts and not named
        parallel = any(isinstance(module, nn.DataParallel) for module in around.modules())
        self._never = OFF if cadence.own == 0 else DATA_PARALLEL if parallel else NO_AUDIO if deaf else ""
        self._first: int | None = None

    def begin(self, sampled: Collection[int], *, compiled: bool, closed: str) -> None:
        """Learn by which cadences steps are sampled, whether something is compiled, and why nothing can be seen ("" if it can)."""
        self._cadence = replace(self._cadence, sampled=tuple(sorted(sampled)))
        self._experiment = replace(self._experiment, compiled=compiled)
        self._never = self._never or closed

    def cells(self) -> Sequence[Cell]:
        """Return one cell for each modality that has a head, and each intervention."""
        predicted = {site.modality for site in self._experiment.heads.values()}
        return effect_cells([modality for modality in get_args(Modality) if modality in predicted])

    def enter(self, call: Call, buffer: StepBuffer) -> None:
        """Keep the root's call, unless no pass is ever made."""
        if not self._never:
            super().enter(call, buffer)

    def step_end(self, end: StepEnd, buffer: StepBuffer) -> None:
        """Make the passes, or say why none is made."""
        call, step = take_root_call(buffer), buffer.step or 0
        self._first = step if self._first is None else self._first
        why = self._never or self._not_now(step, buffer)
        if not why and any(is_sharded(parameter) for parameter in self._model.parameters()):
            why = SHARDED
        if not why and call is None:
            why = NO_CALL
        if why or call is None:
            buffer.totals.omit(NAME, why)
        else:
            self._run(call, buffer)

    def _not_now(self, step: int, buffer: StepBuffer) -> str:
        first = step if self._first is None else self._first
        if self._cadence.has(step, first=first):
            return ""
        buffer.totals.tell(WAITING, True)
        return f"the counterfactual passes run every {self._cadence.steps} steps (next: {self._cadence.after(step, first=first)})"

    def _run(self, call: RootCall, buffer: StepBuffer) -> None:
        cost, inputs = Stopwatch(device_of(self._model)), call.micro.inputs
        facts, roles = self._experiment.facts, self._experiment.roles
        conditions = find_conditions(inputs, facts=facts, roles=roles, named=self._named)
        if isinstance(conditions, str):
            buffer.totals.omit(NAME, conditions)
            return
        held = buffer.bytes
        try:
            outcome = run_passes(
                call,
                conditions,
                self._experiment,
                salt=buffer.step or 0,
                reserve=lambda part, nbytes: buffer.reserve(f"{NAME}/{part}" if part else NAME, nbytes),
            )
        finally:
            buffer.release(buffer.bytes - held)
        cost.stop()
        self._enter_outcome(outcome, buffer)
        if outcome.sums:
            groups = self._groups(inputs, buffer)
            made = {modality: outcome.made[modality] for modality in outcome.tables}
            buffer.totals.tell(FACTS, PassFacts(tuple(condition.name for condition in conditions), made, cost, groups))

    def _enter_outcome(self, outcome: Outcome, buffer: StepBuffer) -> None:
        for (modality, what), sums in outcome.sums.items():
            counts = (1.0, float(not outcome.known[modality]))
            buffer.totals.add(effect_cell(modality, what), counts=counts, sums=sums)
        for modality, table in outcome.tables.items():
            buffer.put(table_key(modality), table)
        for part, why in outcome.reasons.items():
            buffer.totals.omit(f"{NAME}/{part}" if part else NAME, why)
        if not outcome.sums:
            buffer.totals.omit(NAME, "; ".join(dict.fromkeys(outcome.reasons.values())))

    def _groups(self, inputs: Mapping[str, object], buffer: StepBuffer) -> tuple[str, ...]:
        """Keep what tells the group of each sample: return the user's column if the host knows it, else put a tensor."""
        labels = text_labels(inputs)
        column = inputs.get(self._group_by) if self._group_by else None
        if isinstance(column, (list, tuple)):
            return tuple(map(str, column))
        if isinstance(column, Tensor) and column.numel() == (column.shape[0] if column.dim() else 1):
            buffer.put(GROUP, column.reshape(-1))
        elif self._group_by:
            why = f"no column {self._group_by!r} of one value a sample among the inputs of training_step"
            buffer.totals.omit(f"{NAME}/groups", why)
        elif self._experiment.facts.encoder_decoder and labels is not None:
            buffer.put(LANGUAGE, labels[1][:, :_LANGUAGE_POSITIONS])
        return ()
