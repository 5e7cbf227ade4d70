"""Gradient flow in real training: norms, clipping, updates, zero shares and activation gradients against what the Trainer itself holds."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback

import models
import probe
from models.case import Case
from models.running import VARIANTS, assert_identical, run
from probe.records import Part, StepRecord
from probe.sites.discovery import discover
from probe.sites.parts import divide
from watching import attacher, observed_run

CASES = [pytest.param(case, id=case.name) for case in models.available_cases()]
WHISPER, LLAMA = models.CASES["whisper"], models.CASES["llama"]
SEED, STEPS, BOUND = 5, 2, 0.5


class Ledger(TrainerCallback):
    """Notes of each step what probe measures, by its own means: gradients before and after clipping, weights, activation gradients."""

    def __init__(self) -> None:
        self.raw: list[dict[int, Tensor]] = []
        self.clipped: list[dict[int, Tensor]] = []
        self.before: list[dict[int, Tensor]] = []
        self.after: list[dict[int, Tensor]] = []
        self.activations: list[dict[str, list[tuple[float, int]]]] = []
        self.names: dict[int, tuple[str, str]] = {}
        self.ids: list[int] = []
        self._parameters: list[nn.Parameter] = []

    def watch(self, trainer: Trainer) -> None:
        """Stand between the Trainer and its clipping, and in the forwards of all sites of its model."""
        model = trainer.model
        found = discover(model)
        division = divide(model, found.sites.sites)
        self.names = {id(w.parameter): (division.units[w.unit].part, division.units[w.unit].layer) for w in division.weights}
        self._parameters = [p for p in model.parameters() if p.requires_grad]
        for name, module in found.modules.items():
            if name:
                self._stand_in(module, name)
        clip = trainer.accelerator.clip_grad_norm_

        def clipping(*args: Any, **kwargs: Any) -> Any:
            scaler = getattr(trainer.accelerator, "scaler", None)
            factor = 1.0 if scaler is None else scaler.get_scale()
            self.raw.append({key: gradient / factor for key, gradient in self._gradients().items()})
            return clip(*args, **kwargs)

        trainer.accelerator.clip_grad_norm_ = clipping
        trainer.add_callback(self)

    def _stand_in(self, module: nn.Module, name: str) -> None:
        forward = module.forward

        def noting(*args: Any, **kwargs: Any) -> Any:
            output = forward(*args, **kwargs)
            first = output[0] if isinstance(output, tuple) else getattr(output, "last_hidden_state", output)
            if first.requires_grad and torch._C._current_graph_task_id() == -1:
                first.register_hook(
                    lambda g: self.activations[-1].setdefault(name, []).append((float(g.double().square().sum()), g.numel()))
                )
            return output

        module.forward = noting

    def _gradients(self) -> dict[int, Tensor]:
        return {id(p): p.grad.double().clone() for p in self._parameters if p.grad is not None}

    def _weights(self) -> dict[int, Tensor]:
        return {id(p): p.detach().double().clone() for p in self._parameters}

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.activations.append({})

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.clipped.append(self._gradients())
        self.before.append(self._weights())

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.after.append(self._weights())

    def expected(self, step: int, name: str, *, by: int) -> dict[str, float | None]:
        """Return the numbers of one part (``by=0``) or layer (1), from all of its elements."""
        mine = [key for key in map(id, self._parameters) if self.names[key][by] == name]
        with_gradient = [key for key in mine if key in self.clipped[step]]
        raw = [self.raw[step][key] for key in with_gradient] if self.raw else [self.clipped[step][key] for key in with_gradient]
        clipped = [self.clipped[step][key] for key in with_gradient]
        before = torch.cat([self.before[step][key].reshape(-1) for key in mine])
        after = torch.cat([self.after[step][key].reshape(-1) for key in mine])
        gradient = torch.cat([self.clipped[step].get(key, torch.zeros_like(self.before[step][key])).reshape(-1) for key in mine])
        moving = gradient != 0
        return {
            "gradient_norm": norm(raw) if raw else None,
            "clipped_norm": norm(clipped) if raw else None,
            "without_gradient": len(mine) - len(with_gradient),
            "tensors": len(mine),
            "zero_share": float((torch.cat([g.reshape(-1) for g in raw]) == 0).double().mean()) if raw else None,
            "update_ratio": float((after - before).norm() / before.norm()) if before.norm() else None,
            "unchanged_share": float((after == before)[moving].double().mean()) if moving.any() else None,
            "weight_rms": float(before.square().mean().sqrt()),
        }


def norm(tensors: list[Tensor]) -> float:
    return math.sqrt(sum(float(tensor.square().sum()) for tensor in tensors))


def followed(case: Case, *, built: Callable[[Trainer], None] | None = None, **arguments: Any) -> tuple[Ledger, tuple[StepRecord, ...]]:
    """Train under observation and under a ledger. Every element is in the sample: the models are that small."""
    ledger = Ledger()

    def prepare(trainer: Trainer) -> None:
        if built is not None:
            built(trainer)
        ledger.watch(trainer)

    _, records = observed_run(case, seed=SEED, built=prepare, **{"max_steps": STEPS, "max_grad_norm": BOUND, **arguments})
    assert len(records) == len(ledger.clipped)
    return ledger, records


def assert_as_expected(row: Part, expected: dict[str, float | None]) -> None:
    """Compare one row with the truth: norms within what float32 sums allow, what is counted or sampled whole exactly."""
    exact = row.sampled == row.parameters * row.trainable_share
    for column, value in expected.items():
        found, tolerance = getattr(row, column), 1e-9 if exact else 0.05
        if column.endswith("_norm"):
            tolerance = 1e-5
        elif column.endswith("_share") and not exact:
            assert found == pytest.approx(value, abs=0.03), (row.name, column)
            continue
        assert found == (None if value is None else pytest.approx(value, rel=tolerance, abs=1e-12)), (row.name, column)


@pytest.mark.parametrize("variant", list(VARIANTS))
@pytest.mark.parametrize("case", CASES)
def test_every_number_of_every_row(case: Case, variant: str) -> None:
    """In every way of training each part, each layer and each site's activation gradient is what autograd and the optimizer made it."""
    if variant in case.unsupported:
        pytest.skip(case.unsupported[variant])
    ledger, records = followed(case, **VARIANTS[variant])
    for step, record in enumerate(records):
        assert {row.name for row in record.parts} == {part for part, _ in ledger.names.values()}
        assert {row.name for row in record.layers} == {layer for _, layer in ledger.names.values()}
        for by, rows in enumerate((record.parts, record.layers)):
            for row in rows:
                assert_as_expected(row, ledger.expected(step, row.name, by=by))
                assert row.dtype == "float32"
                assert not row.nonfinite
        assert record.metrics["probe/grad/norm"] > BOUND
        assert record.metrics["probe/grad/clipped_norm"] == pytest.approx(BOUND, rel=1e-4)
        assert_activations(record, ledger.activations[step], reentrant=variant == "checkpointing_reentrant")


def assert_activations(record: StepRecord, truth: dict[str, list[tuple[float, int]]], *, reentrant: bool) -> None:
    """Every site whose output got a gradient is there with norm, rms and calls; every other that ran is named."""
    found = {row.site: row for row in record.activation_gradients}
    assert set(found) == set(truth)
    for name, calls in truth.items():
        squares, size = sum(square for square, _ in calls), sum(size for _, size in calls)
        assert found[name].calls == len(calls)
        assert found[name].norm == pytest.approx(math.sqrt(squares), rel=1e-6)
        assert found[name].rms == pytest.approx(math.sqrt(squares / size), rel=1e-6)
    for name in {row.site for row in record.statistics if row.calls} - set(truth):
        why = record.not_measured[f"activation_gradient:{name}"]
        assert "no backward reached" in why or (reentrant and "reentrant checkpoint" in why)  # Whisper may drop all decoder layers
    for role in ("audio_encoder", "projector"):
        for row in [row for row in record.statistics if row.role == role and row.calls][:1]:
            value = record.metrics.get(f"probe/{role}/gradient_norm")
            assert value == (found[row.site].norm if row.site in found else None)
            assert (value is None) == (f"probe/{role}/gradient_norm" in record.not_measured)


def test_forward_order() -> None:
    """Activation gradients come in the order in which the outputs were made: attention before the encoder that holds it, heads last."""
    _, records = followed(models.CASES["original"])
    order = [row.site for row in records[0].activation_gradients]
    encoder = order.index("model.audio_tower")
    assert all(order.index(name) < encoder for name in order if "audio_tower.layers" in name)
    assert encoder < order.index("model.audio_encoder_proj") < order.index("model.layers.0.self_attn") < order.index("model.layers.1.mlp")
    assert set(order[-2:]) == {"model.audio_decoder_proj.text_lm_head", "model.audio_decoder_proj.audio_lm_head"}


def test_without_clipping() -> None:
    """With max_grad_norm=0 the optimizer gets the gradient as it is: both norms are equal, and equal the truth."""
    ledger, records = followed(WHISPER, max_grad_norm=0)
    for step, record in enumerate(records):
        assert record.metrics["probe/grad/clipped_norm"] == pytest.approx(record.metrics["probe/grad/norm"], rel=1e-7)
        for row in record.parts:
            assert_as_expected(row, ledger.expected(step, row.name, by=0))


def in_half(scale: float) -> Callable[[Trainer], None]:
    """Return what makes a Trainer on a CPU scale its loss as fp16 training on a GPU does."""

    def prepare(trainer: Trainer) -> None:
        accelerator = trainer.accelerator
        accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        accelerator.native_amp = True
        accelerator.state._mixed_precision = "fp16"

    return prepare


@pytest.mark.parametrize("bound", [BOUND, 0])
def test_scaled_loss(bound: float) -> None:
    """With a gradient scaler all numbers are those of the unscaled loss, whether clipping has divided the factor out or nothing has."""
    scaled, records = followed(LLAMA, built=in_half(1024.0), max_grad_norm=bound)
    factor = 1.0 if scaled.raw else 1024.0  # 5.x takes the norm also where it does not clip, and for that divides the factor out
    for step, record in enumerate(records):
        for row in record.parts:
            expected = scaled.expected(step, row.name, by=0)
            expected["clipped_norm"] /= factor
            if not scaled.raw:
                expected["gradient_norm"] /= factor
            assert_as_expected(row, expected)
        for row in record.activation_gradients:
            squares = sum(square for square, _ in scaled.activations[step][row.site])
            assert row.norm == pytest.approx(math.sqrt(squares) / 1024.0, rel=1e-6)


def test_a_step_that_the_scaler_skips() -> None:
    """Where gradients overflow and the optimizer's step is skipped, that is said, and unchanged weights are not taken for lost updates."""
    _, records = followed(LLAMA, built=in_half(2.0**127), max_steps=1)
    (record,) = records
    assert any(row.nonfinite for row in record.parts)
    for row in record.parts:
        assert row.update_ratio is None
        assert row.unchanged_share is None
        assert "the step was skipped" in record.not_measured[f"probe/grad/{row.name}/unchanged_share"]
    assert all(row.unchanged_share is None for row in record.layers)
    assert "NaN or Inf" in record.not_measured["probe/grad/norm"]
    assert any(row.nonfinite and row.norm is None for row in record.activation_gradients)


def test_weights_in_bf16_lose_small_updates() -> None:
    """Trained in bf16 itself with a rate below its resolution, most weights stay as they are, and that is what is measured."""
    case = replace(LLAMA, build=lambda seed: LLAMA.build(seed).to(torch.bfloat16))
    ledger, records = followed(case, learning_rate=1e-7)
    for step, record in enumerate(records):
        for row in record.parts:
            assert row.dtype == "bfloat16"
            expected = ledger.expected(step, row.name, by=0)
            assert row.unchanged_share == pytest.approx(expected["unchanged_share"], abs=1e-9)
            assert row.update_ratio == pytest.approx(expected["update_ratio"], rel=1e-9)
        assert min(row.unchanged_share for row in record.parts) > 0.5


def without_layerdrop(model: nn.Module) -> nn.Module:
    """Return Whisper with all its layers in every step."""
    for stack in (model.model.encoder, model.model.decoder):
        stack.layerdrop = 0.0
    return model


def test_lora() -> None:
    """With LoRA only adapters train: their numbers are right, and each other part says that it is frozen."""
    peft = pytest.importorskip("peft")

    def build(seed: int) -> nn.Module:
        return peft.get_peft_model(without_layerdrop(WHISPER.build(seed)), peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))

    ledger, records = followed(replace(WHISPER, build=build))
    for step, record in enumerate(records):
        rows = {row.name: row for row in record.parts}
        assert_as_expected(rows["adapters"], ledger.expected(step, "adapters", by=0))
        for name in ("audio_encoder", "lm_head", "rest"):
            assert (rows[name].trainable_share, rows[name].tensors, rows[name].gradient_norm) == (0, 0, None)
            for what in ("norm", "clipped_norm", "update_ratio", "zero_share", "unchanged_share"):
                assert "frozen: none of the" in record.not_measured[f"probe/grad/{name}/{what}"]
        trained = [row for row in record.layers if row.tensors]
        assert {row.name for row in trained} == {layer for part, layer in ledger.names.values() if part == "adapters"}
        for row in trained:
            assert_as_expected(row, ledger.expected(step, row.name, by=1))


def test_a_backward_that_never_ran() -> None:
    """If training_step runs no backward, every tensor that trains is without gradient, in every part, and no norm is made up."""

    class NoBackward(WHISPER.trainer_class):
        def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
            model.train()
            return self.compute_loss(model, self._prepare_inputs(inputs)).detach()

    result, records = observed_run(replace(WHISPER, trainer_class=NoBackward), seed=SEED, max_steps=1)
    (record,) = records
    for row in (*record.parts, *record.layers):
        assert row.without_gradient == row.tensors > 0
        assert row.gradient_norm is row.clipped_norm is row.update_ratio is row.zero_share is None
    assert record.activation_gradients == ()
    assert "no parameter that trains has a .grad" in record.not_measured["probe/grad/norm"]
    assert "no backward reached" in record.not_measured["probe/audio_encoder/gradient_norm"]
    assert result.trainer.state.global_step == 1


def test_gradients_that_an_engine_takes_away() -> None:
    """If the optimizer steps inside the backward and leaves no .grad (DeepSpeed), nothing counts as missing; activations are measured."""

    class Engine(LLAMA.trainer_class):
        def training_step(self, model: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
            loss = super().training_step(model, *args, **kwargs)
            model.zero_grad(set_to_none=True)
            return loss

    _, records = observed_run(replace(LLAMA, trainer_class=Engine), seed=SEED, max_steps=1)
    (record,) = records
    for row in record.parts:
        assert row.tensors > 0
        assert row.without_gradient is row.gradient_norm is row.update_ratio is None
        for what in ("norm", "clipped_norm", "update_ratio", "zero_share"):
            assert ".grad is empty after it" in record.not_measured[f"probe/grad/{row.name}/{what}"]
    assert len(record.activation_gradients) > 2
    assert all(row.norm > 0 for row in record.activation_gradients)


def test_a_loop_without_a_trainer() -> None:
    """In p.step() gradients and activations are measured; what the optimizer gets and does is not, with that reason."""
    model = WHISPER.build(SEED)
    batch = WHISPER.collate([WHISPER.dataset(2, SEED)[index] for index in range(2)])
    with probe.attach(model, every=1, settings=probe.Settings(terminal=False)) as observed:
        with observed.step():
            model(**batch).loss.backward()
        expected = norm([p.grad.double() for p in model.parameters() if p.grad is not None])
        with observed.step():
            pass
        record = observed.last
    assert record is not None
    assert record.metrics["probe/grad/norm"] == pytest.approx(expected, rel=1e-5)
    assert record.metrics["probe/audio_encoder/gradient_norm"] > 0
    for row in record.parts:
        assert row.zero_share is not None
        assert row.clipped_norm is row.update_ratio is row.unchanged_share is None
        for what in ("clipped_norm", "update_ratio", "unchanged_share"):
            assert "without a Trainer" in record.not_measured[f"probe/grad/{row.name}/{what}"]
    assert "without a Trainer" in record.not_measured["probe/grad/clipped_norm"]


def test_unfrozen_while_training_runs() -> None:
    """A part that is unfrozen in the middle of the run is frozen in the records before and trains in those after."""

    class Unfreeze(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, model: nn.Module, **kwargs: Any) -> None:
            model.model.encoder.layers.requires_grad_(state.global_step >= 1)

    case = replace(WHISPER, build=lambda seed: without_layerdrop(WHISPER.build(seed)))
    _, records = observed_run(case, seed=SEED, max_steps=2, built=lambda trainer: trainer.add_callback(Unfreeze()))
    rows = [{row.name: row for row in record.layers} for record in records]
    assert [row["model.encoder.layers.0"].trainable_share for row in rows] == [0.0, 1.0]
    assert rows[0]["model.encoder.layers.0"].gradient_norm is None
    assert rows[1]["model.encoder.layers.0"].gradient_norm > 0


def test_sparse_embedding() -> None:
    """An embedding with sparse gradients is named and left as it is; the other parts are measured."""
    model = LLAMA.build(SEED)
    model.model.embed_tokens.sparse = True
    batch = LLAMA.collate([LLAMA.dataset(2, SEED)[index] for index in range(2)])
    with probe.attach(model, every=1, settings=probe.Settings(terminal=False)) as observed:
        with observed.step():
            model(**batch).loss.backward()
        assert model.model.embed_tokens.weight.grad.is_sparse
        with observed.step():
            pass
        record = observed.last
    assert not [why for why in record.not_measured.values() if "switched off" in why]
    for what in ("embedding/norm", "embedding/zero_share", "norm"):
        assert "sparse gradient" in record.not_measured[f"probe/grad/{what}"]
    assert record.metrics["probe/grad/rest/norm"] > 0


def test_numbers_of_the_trainer_itself_are_untouched() -> None:
    """With a sampled step in every step, logged gradient norms are those of a run without the probe."""
    plain = run(WHISPER, seed=SEED, max_steps=3, max_grad_norm=BOUND)
    watched = run(WHISPER, seed=SEED, max_steps=3, max_grad_norm=BOUND, attach=attacher(every=1))
    watched.attached.detach()
    assert_identical(plain, watched)
