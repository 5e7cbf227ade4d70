"""What a step costs, as a table of bounds that needs no clock: tensor operations by part, hook calls, host allocations, memory."""

from __future__ import annotations

import gc
import tracemalloc
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import TrainerCallback, WhisperConfig, WhisperForConditionalGeneration

import costs
import models
import probe
from benchmarks.overhead.counting import SYNCS
from models.running import run
from probe.attachment import REGISTRY
from probe.capture.meter import Meter
from probe.capture.observer import StepEnd
from probe.observation import Observation
from watching import attacher

LAYERS = 4
SITES = 3 * LAYERS + 2  # attention layers, the encoder and the head; the root's output is the head's
# Tensor operations that launch work (views and aliases do not) in one sampled step of a model with Whisper tiny's layers, by part of the
# probe: the most there may be, and beside it what there are. A bound is lowered when a part gets cheaper, and never raised in silence.
BOUNDS = {
    "statistics": 6 * (SITES + 1),  # 35
    "attention": 920,  # 905: some 30 a layer and block, and what a kind's layers share: 100, and 20 to sum up, or 75 with walks
    "heads": 150,  # 146: one chunk of logits
    "checks": 122,  # 119: hashes of two tensors, ids and labels
    "audio_checks": 48,  # 46
    "inputs": 28,  # 27
    "gradients": 41,  # 40: before clipping and after
    "updates": 41,  # 40
    "activation_gradients": 34,  # 33: one norm a site, and as many again at the step's end
    "modality": 15,  # 14
    "loss": 27,  # 26
    "packing": 4,  # 3: two vectors and the small tensors of this rank
}
PROBE = str(Path(probe.__file__).parent)


class ByPart(TorchDispatchMode):
    """Counts operations that launch work by the part of the probe that is at work, and those that would wait for the device."""

    def __init__(self, meter: Meter) -> None:
        super().__init__()
        self.meter = meter
        self.launched: Counter[str] = Counter()
        self.waits: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self.meter._open:
            part = self.meter._open[-1].part
            self.launched[part] += costs.launches(func)
            self.waits[part] += func.overloadpacket.__name__ in SYNCS
        return func(*args, **(kwargs or {}))


def whisper(vocabulary: int = 2_000, *, layers: int = LAYERS, frames: int = 64) -> tuple[nn.Module, dict[str, torch.Tensor]]:
    """Return a narrow model with Whisper tiny's layers, and a batch for it."""
    torch.manual_seed(1)
    config = WhisperConfig(
        vocab_size=vocabulary,
        d_model=16,
        encoder_layers=layers,
        decoder_layers=layers,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=16,
        decoder_ffn_dim=16,
        max_source_positions=frames,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=1,
    )
    batch = {"input_features": torch.randn(2, 80, 2 * frames), "labels": torch.randint(3, vocabulary, (2, 12))}
    return WhisperForConditionalGeneration(config).train(), batch


def whole_step(model: nn.Module, observation: Observation, batch: dict[str, torch.Tensor], step: int) -> None:
    """Run one sampled step as a Trainer does, update included, and read its numbers."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    with observation.micro_batch(step, batch):
        loss = model(**batch).loss
        loss.backward()
    observation.after_backward(loss.detach(), StepEnd())
    observation.before_update()
    optimizer.step()
    observation.after_update()
    measured = observation.finish()
    optimizer.zero_grad()
    assert measured is not None
    observation.record(measured)


@pytest.fixture
def watched() -> Any:
    """Return model, observation and batch; a first step has been made."""
    model, batch = whisper()
    attached = probe.attach(model, every=1, settings=probe.Settings(terminal=False, counterfactual_every=0))
    with attached.step():
        model(**batch).loss.backward()
    model.zero_grad()
    observation = attached._loop.observation
    whole_step(model, observation, batch, 2)
    yield model, observation, batch
    attached.detach()


def test_operations_by_part(watched: Any) -> None:
    """No part of a sampled step launches more work than its bound, none is left out of the table, and none waits for the device."""
    model, observation, batch = watched
    with ByPart(observation.meter) as counted:
        whole_step(model, observation, batch, 3)
    assert observation.breaker.failures == {}
    found = {part: count for part, count in counted.launched.items() if count}
    assert set(found) == set(BOUNDS), found
    over = {part: (count, BOUNDS[part]) for part, count in found.items() if count > BOUNDS[part]}
    assert over == {}
    loose = {part: (count, BOUNDS[part]) for part, count in found.items() if count < 0.6 * BOUNDS[part]}
    assert set(loose) <= {"statistics"}, "lower these bounds"  # that is a bound of the contract, a site
    assert {part: count for part, count in counted.waits.items() if count} == {}


def test_what_is_said_to_be_on_the_host_launches_nothing(watched: Any) -> None:
    """An observer that says of one of its methods that it puts no work on the device dispatches no operation in it."""
    model, observation, batch = watched
    said = [(observer, event) for observer in observation._observers for event in observer.on_host]
    launched: Counter[str] = Counter()
    for observer, event in said:
        act = getattr(observer, event)

        def counted(*args: Any, act: Any = act, key: str = f"{observer.name}.{event}") -> None:
            launched[key] += costs.kernels(lambda: act(*args))

        setattr(observer, event, counted)
    whole_step(model, observation, batch, 3)
    assert len(said) >= 2
    assert set(launched) == {f"{observer.name}.{event}" for observer, event in said}
    assert set(launched.values()) == {0}


def test_a_bound_notices_one_operation_more(watched: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The counter sees what a part does: a few operations more in one observer's work stand in its row and in no other."""
    model, observation, batch = watched
    with ByPart(observation.meter) as before:
        whole_step(model, observation, batch, 3)
    observer = next(each for each in observation._observers if each.name == "loss")
    see = observer.leave

    def more(call: Any, buffer: Any) -> None:
        see(call, buffer)
        torch.ones(3).sum().item()

    monkeypatch.setattr(observer, "leave", more)
    with ByPart(observation.meter) as after:
        whole_step(model, observation, batch, 4)
    assert dict(after.launched - before.launched) == {"loss": 3}
    assert dict(after.waits) == {"loss": 1, **dict.fromkeys(set(after.waits) - {"loss"}, 0)}


def test_hooks_fire_twice_a_call(watched: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every call of a watched module fires one hook before it and one after it; beside these the hooks are set, taken away, and no more."""
    model, observation, batch = watched
    calls, sections = Counter(), Counter()
    handles = [
        module.register_forward_hook(lambda *_, name=name: calls.update([name])) for name, module in observation._hooks._modules.items()
    ]
    enter = Meter.enter

    def counting(meter: Meter, section: Any) -> None:
        sections[section.part] += 1
        enter(meter, section)

    monkeypatch.setattr(Meter, "enter", counting)
    whole_step(model, observation, batch, 3)
    for handle in handles:
        handle.remove()
    called = sum(calls[name] for name in observation._hooks._watching)
    assert called > SITES
    assert sections["hooks"] == 2 * called + 3


def kept_by_the_probe(before: tracemalloc.Snapshot, after: tracemalloc.Snapshot) -> dict[str, int]:
    """Return the bytes that the package's own lines hold in ``after`` beyond ``before``, by line."""
    ours = [tracemalloc.Filter(True, f"{PROBE}/*")]
    changed = after.filter_traces(ours).compare_to(before.filter_traces(ours), "lineno")
    return {str(line.traceback): line.size_diff for line in changed if line.size_diff > 0}


def test_other_steps_of_a_loop_allocate_nothing_that_stays() -> None:
    """A step that is not sampled leaves no byte behind on the host, and at its peak takes less than two kilobytes."""
    model, batch = whisper(layers=1)
    attached = probe.attach(model, every=1_000, settings=probe.Settings(terminal=False, counterfactual_every=0))
    for _ in range(3):
        with attached.step():
            model(**batch).loss.backward()

    def steps(count: int) -> None:
        for _ in range(count):
            with attached.step():
                pass

    tracemalloc.start()
    try:
        steps(5)
        gc.collect()
        before = tracemalloc.take_snapshot()
        steps(50)
        gc.collect()
        left = kept_by_the_probe(before, tracemalloc.take_snapshot())
        tracemalloc.reset_peak()
        now = tracemalloc.get_traced_memory()[0]
        steps(5)
        peak = tracemalloc.get_traced_memory()[1] - now
    finally:
        tracemalloc.stop()
        attached.detach()
    assert left == {}
    assert peak < 2_048


def test_other_steps_of_a_trainer_allocate_nothing_that_stays() -> None:
    """In a Trainer's run the package holds as many bytes after further steps that are not sampled as before them."""
    found: list[tracemalloc.Snapshot] = []

    class Snapshots(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step in (4, 8):
                gc.collect()
                found.append(tracemalloc.take_snapshot())

    def built(trainer: Any) -> None:
        trainer.add_callback(Snapshots())

    tracemalloc.start()
    try:
        result = run(models.CASES["llama"], seed=3, attach=attacher(every=1_000), built=built, max_steps=9)
    finally:
        tracemalloc.stop()
    result.attached.detach()
    assert len(found) == 2
    assert kept_by_the_probe(*found) == {}


def test_peak_memory_of_a_large_vocabulary_and_long_audio() -> None:
    """With 262,144 tokens and 1,500 frames a sampled step's peak stands above the plain step's by less than the default budget."""
    model, batch = whisper(262_144, layers=1, frames=1_500)
    assert extra_mib(model, lambda: model(**batch).loss.backward()) < 64


def extra_mib(model: nn.Module, step: Callable[[], Any]) -> float:
    """Return by how much a sampled step's peak exceeds that of the same step without the probe."""

    def plain() -> None:
        step()
        model.zero_grad()

    alone = costs.peak_mib(plain)
    attached = probe.attach(model, every=1, settings=probe.Settings(terminal=False, counterfactual_every=0))

    def observed() -> None:
        with attached.step():
            step()
        model.zero_grad()

    peak = costs.peak_mib(observed)
    assert attached.last is not None
    assert attached._loop.observation.breaker.failures == {}
    attached.detach()
    assert REGISTRY.get(model) is None
    return peak - alone
