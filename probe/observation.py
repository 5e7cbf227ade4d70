"""One run being observed: its sites, its observers, and the way of a step from armed hooks to a finished record."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from probe.assemble.draft import RunContext
from probe.assemble.overhead import with_overhead
from probe.assemble.record import assemble
from probe.assemble.text import Decoder
from probe.capture.breaker import Breaker
from probe.capture.buffer import StepBuffer, fixed_bytes
from probe.capture.cells import Cell
from probe.capture.hooks import HookSet
from probe.capture.meter import Meter
from probe.capture.observer import Observer, StepEnd
from probe.capture.observers.all import all_observers
from probe.capture.observers.gradients import STILL_SCALED
from probe.capture.observers.modes import ModeWatcher
from probe.capture.schedule import PassCadence
from probe.capture.totals import Totals
from probe.capture.window import Window
from probe.counterfactual.groups import language_tokens
from probe.counterfactual.watcher import CounterfactualWatcher
from probe.errors import ProbeValueError
from probe.foreign.trainer_loss import LossSettings
from probe.merge.layout import make_layout
from probe.merge.packing import Transfer, pack
from probe.merge.ranks import agree, here
from probe.records import Site, StepRecord
from probe.settings import Options
from probe.sites.audio_inputs import first_encoder, log_mel_scale
from probe.sites.choices import choices_below
from probe.sites.discovery import Discovery, discover
from probe.sites.facts import core_model
from probe.sites.names import module_names
from probe.sites.parts import count, divide
from probe.sites.reduction import read_reduction
from probe.sites.tokenizers import read_tokenizer

MIB = 1024 * 1024


@dataclass(frozen=True, slots=True)
class Measured:
    """A sampled step whose numbers are on their way to the host, and the tensors that the user keeps of it."""

    step: int
    transfer: Transfer
    forwards: int
    kept: dict[str, Tensor]


class Observation:
    """Observes the training forwards of one model.

    The order of a sampled step: :meth:`micro_batch` round each ``training_step``, :meth:`after_backward` when the last one's
    gradients are complete, :meth:`finish` when the step has ended, :meth:`record` once the numbers are wanted on the host.
    """

    def __init__(
        self,
        model: nn.Module,
        options: Options,
        *,
        attached: nn.Module,
        around: nn.Module,
        processors: Sequence[Any],
        say: Callable[[str], None],
        loss: LossSettings | None = None,
    ) -> None:
        """Find the sites and make the observers; no hook is registered yet.

        Args:
            model: The root: what the Trainer trains, below DDP.
            options: What ``attach`` was asked for.
            attached: What it was asked for on: the root or a module in it, below which the names in the options lie.
            around: What the Trainer calls: the root, or a wrapper round it.
            processors: Tokenizers, feature extractors or processors, best first: the first that decodes turns ids into text, the
                first that extracts features tells the frame rate.
            say: Receives one line when something is switched off.
            loss: What the Trainer does with the loss; ``None`` without a Trainer.
        """
        prefix = module_names(model).find(attached) or ""
        self.discovery = discover(model, choices=choices_below(prefix, options.sites))
        self.breaker = Breaker(say)
        self._model = model
        keep = {name for kept in options.keep for name in (kept, f"{prefix}.{kept}")}
        self._counterfactual = _counterfactual(model, self.discovery, around, options)
        self._modes = ModeWatcher()
        self._run = _context(model, self.discovery, options, processors, say)
        found = all_observers(
            model,
            self.discovery,
            options.settings,
            self.breaker,
            keep=keep,
            tokenizer=self._run.tokenizer,
            log_mel_scale=self._run.log_mel_scale,
        )
        self._observers = [*found, self._modes, self._counterfactual]
        self._parts = [*(observer.name for observer in self._observers), "packing"]
        step_cell = Cell("step", counts=("ranks", "micro_batches", *(f"failed:{part}" for part in self._parts)))
        self._layout = make_layout([step_cell, *(cell for observer in self._observers for cell in observer.cells())])
        _check_budget(options, fixed_bytes(self._layout.cells))
        sites = {site.name: site for site in self.discovery.sites.sites}
        self._hooks = _hooks(self.discovery, sites, self._observers, self.breaker)
        layers = [self.discovery.modules[name] for name, site in sites.items() if site.role == "attention"]
        self.window = Window(self._hooks, self.breaker, around=around, compile_mode=options.compile, layers=layers)
        self.meter = Meter(self._device())
        budget = int(options.budget_mib * MIB)
        self.buffer = StepBuffer(budget_bytes=budget, sites=tuple(sites), cells=self._layout.cells, meter=self.meter)
        reduction = read_reduction(model, self.discovery.sites.sites, self.discovery.facts)
        self._run = replace(self._run, loss_settings=loss, reduction=reduction)
        self._run = replace(self._run, languages=language_tokens(core_model(model), processors))
        self.ranks = here()

    def join(self, every: Collection[int], *, stop_on: str | None = None) -> None:
        """Agree with the other ranks on what is observed, in the steps that these cadences sample, and when to stop. May wait for them.

        What has to stand during the whole training is registered here.
        Called when nothing can fail any more before the first step: ranks that have agreed wait for each other in every sampled step.
        """
        self.window.begin()
        self.ranks = agree(self._layout.fingerprint(), every=every, stop_on=stop_on)
        self._counterfactual.begin(every, compiled=self.window.compiled, closed=self.window.never_eager)
        alone = {"ranks": self.ranks.reason} if self.ranks.reason else {}
        self._run = replace(self._run, world=self.ranks.world, reasons={**self._run.reasons, **alone})
        self.meter.restart()

    @contextmanager
    def micro_batch(self, step: int, batch: Mapping[str, Any]) -> Iterator[None]:
        """Observe the training forwards inside the context as a part of sampled step ``step``.

        If the context is left by an exception, what was captured of the step is dropped: a retry of the step starts afresh.
        """
        try:
            with ExitStack() as stack:
                with self.meter.section("hooks"):
                    if self.buffer.step != step:
                        self.buffer.open(step)
                    stack.enter_context(self.window.armed(self.buffer, batch=batch))
                yield
        except BaseException:
            self.buffer.clear()
            raise

    def after_backward(self, loss: Any, end: StepEnd | None, *, items: Any = None) -> None:
        """See one micro-batch's loss and, when its gradients are complete over all micro-batches, the end of the step.

        Args:
            loss: What ``training_step`` returned.
            end: Facts of the step's end if this was its last micro-batch, else ``None``.
            items: The ``num_items_in_batch`` that ``training_step`` was given, if any.
        """
        counted = items if isinstance(items, (Tensor, int, float)) else None
        returned = loss if isinstance(loss, Tensor) else None

        def see(observer: Observer) -> None:
            observer.training_step(returned, counted, self.buffer)
            if end is not None:
                observer.step_end(end, self.buffer)

        self._tell(see)

    def before_update(self, *, still_scaled: bool = False) -> None:
        """See the moment before the optimizer's step, if a step is being observed: gradients are clipped, weights are old.

        Args:
            still_scaled: Gradients still carry the factor of fp16 training (nothing was clipped, so nothing has divided it out).
        """
        if self.buffer.step is not None:
            self.buffer.totals.tell(STILL_SCALED, still_scaled)
        self._tell(lambda observer: observer.before_update(self.buffer))

    def after_update(self) -> None:
        """See the moment after the optimizer's step, if a step is being observed: weights are new."""
        self._tell(lambda observer: observer.after_update(self.buffer))

    def evaluating(self) -> None:
        """See that the model has just run the first batch of an evaluation. Touches no tensor."""
        if not self.breaker.is_off(self._modes.name):
            with self.breaker.guard(self._modes.name):
                self._modes.evaluating(self._model)

    def _tell(self, event: Callable[[Observer], None]) -> None:
        """Let every observer that is on see an event of the step that is being observed, outside any forward."""
        for observer in self._observers if self.buffer.step is not None else ():
            if not self.breaker.is_off(observer.name):
                with self.meter.section(observer.name, launches=True), self.breaker.guard(observer.name), torch.no_grad():
                    event(observer)

    def finish(self) -> Measured | None:
        """Pack the step's numbers, combine them over ranks and send them to the host, without waiting for the copy.

        Runs on every rank for every sampled step, whatever has failed here: the others are waiting in the same all-reduce. The buffer
        keeps its content until the next step.
        """
        step, totals = self.buffer.step, self.buffer.totals
        if step is None:
            return None
        failed = [float(self.breaker.is_off(part)) for part in self._parts]
        totals.add("step", counts=[1.0, float(len(self.buffer.micro_batches)), *failed])
        device = self.ranks.device(self._device())
        packed = None
        with self.meter.section("packing", launches=True), self.breaker.guard("packing"):
            packed = pack(totals, self._layout, device=device)
        if packed is None:
            nothing = Totals(self._layout.cells)
            nothing.add("step", counts=[0.0, 0.0, *failed[:-1], 1.0])  # this rank's numbers are not in, and the others are told why
            packed = pack(nothing, self._layout, device=device)
        sums, maxima = packed
        if self.ranks.world > 1 and self.ranks.merged:
            self.ranks.reduce(sums, maxima)
        with self.meter.section("packing", launches=True):
            transfer = Transfer(totals, self._layout, sums, maxima)
        return Measured(step, transfer, len(self.buffer.micro_batches), self.buffer.kept())

    def any_rank(self, wish: bool) -> bool:
        """Tell whether this rank or, where ranks are merged, any other one wishes something. Every rank has to ask; waits for them."""
        return self.ranks.any(wish, self._device())

    def _device(self) -> torch.device:
        return next((p.device for p in self._model.parameters()), torch.device("cpu"))

    def record(self, measured: Measured, *, logged: float | None = None) -> StepRecord:
        """Return the record of a step. Waits for its numbers if they are still under way. ``logged``: the Trainer's log of this step alone.

        A part that failed on any rank is switched off on this one too: the merged record says so to all of them alike.
        """
        with self.meter.waiting():
            measured.transfer.wait()
        host = measured.transfer.result()
        for part in self._parts:
            ranks = host.cells["step"].counts[f"failed:{part}"]
            if ranks and not self.breaker.is_off(part):
                self.breaker.failures[part] = f"switched off after an error on {int(ranks)} other ranks"
        record = assemble(measured.step, host, self._run, failures=self.breaker.failures, logged=logged)
        return with_overhead(record, self.meter.take())

    def close(self) -> None:
        """Remove every hook and let go of inputs and captures."""
        self.window.end()
        self.buffer.clear()


def _counterfactual(model: nn.Module, found: Discovery, around: nn.Module, options: Options) -> CounterfactualWatcher:
    """Return the observer that comes last: what it does at a step's end is done when the others have read the gradients."""
    settings = options.settings
    cadence = PassCadence(options.every, settings.counterfactual_every)
    return CounterfactualWatcher(model, found, around=around, cadence=cadence, named=settings.conditions, group_by=settings.group_by)


def _check_budget(options: Options, fixed: int) -> None:
    if fixed > options.budget_mib * MIB:
        least = f"the sums of this model's sites alone take {fixed / MIB:.3g} MiB"
        raise ProbeValueError(f"budget_mib={options.budget_mib:g}: {least}; give at least that (the default is 64)")


def _hooks(found: Discovery, sites: Mapping[str, Site], observers: Sequence[Observer], breaker: Breaker) -> HookSet:
    """Return the hooks of the sites and of what is watched beside them; the latter's calls are captured by nobody."""
    beside = {name: Site(name, "custom", "watched, no site") for name in found.watched}
    return HookSet({**found.watched, **found.modules}, {**beside, **sites}, observers, breaker)


def _context(model: nn.Module, found: Discovery, options: Options, processors: Sequence[Any], say: Callable[[str], None]) -> RunContext:
    units = count(divide(model, found.sites.sites))
    reasons = {} if options.settings.keep_text else {"inputs/text": "token ids and text are left out by keep_text=False"}
    decoder = Decoder(processors, say)
    return RunContext(
        sites=found.sites,
        facts=found.facts,
        units=units,
        world=1,
        decoder=decoder,
        reasons=reasons,
        frames_per_second=_frames_per_second(processors),
        tokenizer=read_tokenizer(processors),
        log_mel_scale=log_mel_scale(first_encoder(found.sites.sites, found.modules), processors),
    )


def _frames_per_second(processors: Sequence[Any]) -> float | None:
    """Return the frame rate of the audio features as the first feature extractor defines it, or ``None``."""
    for processor in processors:
        extractor = getattr(processor, "feature_extractor", processor)
        rate, hop = getattr(extractor, "sampling_rate", None), getattr(extractor, "hop_length", None)
        if isinstance(rate, int) and isinstance(hop, int) and hop:
            return rate / hop
    return None
