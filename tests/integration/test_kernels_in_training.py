"""Attention under kernels that torch functions do not show: the rows are eager attention's weights, and training is untouched."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from transformers import modeling_utils

import flash_stand_in
import flex_stand_in
import models
import probe
from flash_stand_in import REAL, VERSION, WINDOW_EXCESS, Blind, built_for, with_implementation
from models.case import Case
from models.running import VARIANTS, RunResult, assert_identical, run
from probe.capture.kernels import run_kernel
from probe.foreign.attention_kernels import WatchedKernel, watched_kernels
from probe.measure.blocks import RowSource
from probe.records import StepRecord
from rows_together import Rows, together
from tapping import Taps
from watching import observed_run, records_of

B, S, WINDOW = 2, 9, 4
HAS_INTERFACE = pytest.mark.skipif(VERSION < (4, 48), reason="this transformers has no attention interface")
HAS_BLOCK_MASKS = pytest.mark.skipif(VERSION < (4, 53), reason="this transformers makes no block masks for flex attention")
SIZES = {"num_attention_heads": 4, "num_hidden_layers": 2, "vocab_size": 40, "attn_implementation": "eager"}
TEXT = {
    **SIZES,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def llama(window: int) -> nn.Module:
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**TEXT))


def mistral(window: int) -> nn.Module:
    return transformers.MistralForCausalLM(transformers.MistralConfig(**TEXT, sliding_window=window))


def gemma2(window: int) -> nn.Module:
    more = {"head_dim": 8, "attn_logit_softcapping": 2.0, "query_pre_attn_scalar": 3, "sliding_window": window}
    return transformers.Gemma2ForCausalLM(transformers.Gemma2Config(**TEXT, **more))


def gpt_oss(window: int) -> nn.Module:
    more = {"head_dim": 8, "num_local_experts": 2, "num_experts_per_tok": 1, "sliding_window": window}
    return transformers.GptOssForCausalLM(transformers.GptOssConfig(**TEXT, **more, layer_types=["sliding_attention", "full_attention"]))


TEXT_MODELS = [
    pytest.param(build, marks=[] if build is not gpt_oss or hasattr(transformers, "GptOssConfig") else pytest.mark.skip("no GPT-OSS"))
    for build in (llama, mistral, gemma2, gpt_oss)
]


def made(build: Callable[[int], nn.Module], window: int) -> nn.Module:
    torch.manual_seed(0)
    model = build(window)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.mul_(3.0)  # far from uniform attention
            if name.endswith("sinks"):
                nn.init.normal_(parameter)
    return model.eval()


def text(padding: str) -> dict[str, Any]:
    ids = torch.randint(3, 40, (B, S), generator=torch.Generator().manual_seed(1))
    if padding == "packed":
        return {"input_ids": ids[:1], "position_ids": torch.tensor([[0, 1, 2, 3, 4, 5, 0, 1, 2]]), "use_cache": False}
    mask = torch.ones(B, S, dtype=torch.long)
    if padding == "left":
        mask[1, :3] = 0
    if padding == "right":
        mask[1, -3:] = 0
    return {"input_ids": ids, "attention_mask": mask, "use_cache": False}  # as in training


def rows_of(model: nn.Module, given: dict[str, Tensor]) -> tuple[dict[str, Rows], Any]:
    """Run the model with taps in its layers and its kernels watched; return all rows by layer, each layer reported once."""
    seen: dict[str, Rows] = {}

    def see(name: str, source: RowSource) -> None:
        assert name not in seen
        samples, _, queries, _ = source.shape
        rows = together(source, torch.arange(queries, device=source.device).expand(samples, queries))
        seen[name] = Rows(rows.p_BHRK, rows.visible_BRK.cpu())

    with Taps(model, see) as taps, watched_kernels(taps.layers.values(), model, run_kernel):
        output = model(**given)
    assert taps.errors == []
    assert set(seen) == set(taps.layers)
    return seen, output


def assert_same(found: dict[str, Rows], truth: dict[str, Rows], *, tolerance: float = 1e-6) -> dict[str, Tensor]:
    """Fail unless rows are equal wherever the kernel computes them; return where that is, (B, S) by layer."""
    assert set(found) == set(truth)
    computed = {name: rows.visible_BRK.any(-1) for name, rows in found.items()}
    for name, rows in found.items():
        some, other = (part.p_BHRK.transpose(1, 2)[computed[name]] for part in (rows, truth[name]))
        torch.testing.assert_close(some.float(), other.float(), atol=tolerance, rtol=0)
        assert other.std() > 0.02, "near uniform: any kernel would do"
    return computed


@pytest.fixture(params=["stand-in", pytest.param("real", marks=pytest.mark.skipif(not REAL, reason="no GPU, or no flash_attn"))])
def flash(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Return a function that moves a model or inputs to where the kernel runs."""
    if request.param == "stand-in":
        flash_stand_in.install(monkeypatch)
        return lambda thing: thing

    def there(thing: Any) -> Any:
        if isinstance(thing, dict):
            return {name: there(part) if isinstance(part, Tensor) else part for name, part in thing.items()}
        whole = isinstance(thing, Tensor) and not thing.is_floating_point()
        return thing.to("cuda") if whole else thing.to("cuda", torch.bfloat16)

    return there


def is_real(flash: Callable[..., Any]) -> bool:
    return bool(flash(torch.ones(1)).dtype != torch.float32)


def comparable(truth: dict[str, Rows], flash: Callable[..., Any]) -> tuple[dict[str, Rows], float]:
    """Return what to compare and how closely: in bfloat16 the first layers only, as later ones see other values."""
    return ({name: rows for name, rows in truth.items() if ".layers.0." in name}, 3e-2) if is_real(flash) else (truth, 1e-6)


@pytest.mark.parametrize("padding", ["none", "left", "right", "packed"])
@pytest.mark.parametrize("build", TEXT_MODELS)
def test_flash_rows_are_eager_weights(build: Any, padding: str, flash: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Grouped heads, windows, softcap and sinks; padded on either side or packed: rows equal eager weights, for every real token."""
    if build is gemma2 and padding == "packed" and VERSION < (4, 48):
        pytest.skip("this Gemma2 does not tell flash attention of packed sequences")
    if build is gpt_oss and is_real(flash):
        pytest.skip("flash_attn 2 knows no sinks")
    given = flash(text(padding))
    eager = flash(made(build, WINDOW + WINDOW_EXCESS))
    kernel = flash(built_for(monkeypatch, lambda: made(build, WINDOW)))
    if padding == "packed":
        packed = given["position_ids"][0].eq(0).cumsum(0)
        truth, expected = rows_of(eager, {**given, "attention_mask": added_mask(eager, packed, WINDOW + WINDOW_EXCESS)})
        if build is not llama:  # one added mask for all layers: those without a window see another
            truth, expected = {k: v for k, v in truth.items() if k.startswith("model.layers.0")}, None
    else:
        truth, expected = rows_of(eager, given)
    found, output = rows_of(kernel, given)
    truth, tolerance = comparable(truth, flash)
    computed = assert_same({name: found[name] for name in truth}, truth, tolerance=tolerance)
    real = given.get("attention_mask", torch.ones_like(given["input_ids"])).bool().cpu()
    assert all(torch.equal(where, real) for where in computed.values())
    if expected is not None and not is_real(flash):
        torch.testing.assert_close(output.logits[real], expected.logits[real], atol=1e-4, rtol=1e-5)
    if build in (mistral, gemma2, gpt_oss):
        assert found["model.layers.0.self_attn"].visible_BRK.sum(-1).max() == WINDOW + WINDOW_EXCESS


def added_mask(model: nn.Module, packed: Tensor, window: int) -> Tensor:
    """Return the added 4-D mask of packed sequences, with the window if the model's first layer has one."""
    may = packed[:, None].eq(packed).tril()
    if not type(model).__name__.startswith("Llama"):
        may = may.triu(1 - window)
    dtype = next(model.parameters()).dtype
    return torch.zeros(may.shape, dtype=dtype, device=may.device).masked_fill(~may, torch.finfo(dtype).min)[None, None]


def speech(case: Case, implementation: str | None, monkeypatch: pytest.MonkeyPatch) -> nn.Module:
    def build(_: int = 0) -> nn.Module:
        model = case.build(0)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.mul_(12.0 if "q_proj" in name or "k_proj" in name else 1.0)  # far from uniform attention
        return model.eval()

    return with_implementation(build(), "eager") if implementation is None else built_for(monkeypatch, build, implementation)


@pytest.mark.parametrize("name", ["whisper", "qwen2_audio"])
def test_flash_rows_in_speech_models(name: str, flash: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Encoder, decoder, cross and joint attention: every layer is reported once, with eager attention's weights."""
    case = models.CASES[name]
    dataset = case.dataset(2, 0)
    given = flash({key: part for key, part in case.collate([dataset[0], dataset[1]]).items() if isinstance(part, Tensor)})
    eager = speech(case, "eager" if VERSION < (4, 48) else None, monkeypatch)
    truth, expected = rows_of(flash(eager), given)
    found, output = rows_of(flash(speech(case, "flash_attention_2", monkeypatch)), given)
    assert set(found) == {layer for layers in case.attention.values() for layer in layers}
    truth, tolerance = comparable(truth, flash)
    computed = assert_same({name: found[name] for name in truth}, truth, tolerance=tolerance)
    assert all(where.any(1).all() for where in computed.values())
    real = given.get("attention_mask", torch.ones(output.logits.shape[:2])).bool()
    if not is_real(flash) and real.shape == output.logits.shape[:2]:  # 4.46 expands Qwen2-Audio's
        torch.testing.assert_close(output.logits[real], expected.logits[real], atol=1e-3, rtol=1e-4)


@HAS_INTERFACE
def test_kernels_of_several_kinds_in_one_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """An eager encoder before a flash decoder: each layer by its own kernel, reported once."""
    flash_stand_in.install(monkeypatch)
    case = models.CASES["qwen2_audio"]
    dataset = case.dataset(2, 0)
    given = case.collate([dataset[0], dataset[1]])
    truth, _ = rows_of(speech(case, None, monkeypatch), given)
    mixed = speech(case, None, monkeypatch)
    for module in mixed.modules():
        if type(getattr(module, "config", None)).__name__ == "Qwen2Config":
            module.config._attn_implementation = "flash_attention_2"
    sources: dict[str, str] = {}
    taps = Taps(mixed, lambda layer, source: sources.setdefault(layer, source.how))
    with taps, watched_kernels(taps.layers.values(), mixed, run_kernel):
        mixed(**given)
    kinds = {kind: {sources[layer] for layer in layers} for kind, layers in case.attention.items()}
    encoder = "materialised softmax" if VERSION >= (4, 57) else "recomputed from q and k"  # before, classes: it stays on SDPA
    assert kinds == {"encoder": {encoder}, "joint": {"recomputed from q and k"}}
    assert_same(rows_of(mixed, given)[0], truth)


@HAS_BLOCK_MASKS
@pytest.mark.parametrize("padding", ["none", "left", "right", "packed"])
@pytest.mark.parametrize("build", TEXT_MODELS[:3])
def test_flex_rows_are_eager_weights(build: Any, padding: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Under the block masks that transformers itself makes: causal, windows, padding, packed sequences, softcap."""
    flex_stand_in.install(monkeypatch)
    given = text(padding)
    if padding == "packed":
        packed = given["position_ids"][0].eq(0).cumsum(0)
        truth, _ = rows_of(made(build, WINDOW), {**given, "attention_mask": added_mask(made(build, WINDOW), packed, WINDOW)})
        truth = truth if build is llama else {k: v for k, v in truth.items() if k.startswith("model.layers.0")}
    else:
        truth, _ = rows_of(made(build, WINDOW), given)
    found, _ = rows_of(with_implementation(made(build, WINDOW), "flex_attention"), given)
    real = given.get("attention_mask", torch.ones_like(given["input_ids"])).bool()
    for name, rows in truth.items():
        torch.testing.assert_close(found[name].p_BHRK.transpose(1, 2)[real], rows.p_BHRK.transpose(1, 2)[real], atol=1e-6, rtol=0)


# ------------------------------------------------------------------------------------------------------------------ with a Trainer


def running(name: str, implementation: str, monkeypatch: pytest.MonkeyPatch, *, dropout: bool = True) -> Case:
    """Return a case whose model runs that kernel; without ``dropout`` nothing in it is random."""
    case = models.CASES[name]

    def build(seed: int) -> nn.Module:
        model = built_for(monkeypatch, lambda: case.build(seed), implementation)
        for module in model.modules() if not dropout else ():
            for what in ("attention_dropout", "dropout", "activation_dropout", "layerdrop"):
                if isinstance(getattr(module, what, None), float):
                    setattr(module, what, 0.0)
            config = getattr(module, "config", None)
            if config is not None:
                for what in ("apply_spec_augment", "attention_dropout", "dropout", "activation_dropout"):
                    if hasattr(config, what):
                        setattr(config, what, False if what == "apply_spec_augment" else 0.0)
        return model

    return replace(case, build=build)


def compared(case: Case, **arguments: Any) -> tuple[StepRecord, ...]:
    """Train without and with a probe, fail unless all is identical, and return the records."""
    plain = run(case, seed=3, max_steps=4, **arguments)
    watched, records = observed_run(case, options={"every": 2}, seed=3, max_steps=4, **arguments)
    assert_identical(plain, watched)
    assert [record.step for record in records] == [1, 2, 4]
    return records


def registry_state() -> Any:
    own = getattr(modeling_utils, "ALL_ATTENTION_FUNCTIONS", {})
    return dict(getattr(own, "_local_mapping", own)), dict(getattr(own, "_global_mapping", {}))


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", ["llama", "whisper", "qwen2_audio"])
def test_training_on_flash_attention_is_untouched(name: str, variant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With dropout, in every way of training: bit-identical, every layer measured in every micro-batch once, recompute not counted."""
    if variant in models.CASES[name].unsupported:
        pytest.skip(models.CASES[name].unsupported[variant])
    flash_stand_in.install(monkeypatch)
    before = registry_state()
    records = compared(running(name, "flash_attention_2", monkeypatch), **VARIANTS[variant])
    assert registry_state() == before
    micro_batches = VARIANTS[variant].get("gradient_accumulation_steps", 1)
    layers = {layer for group in models.CASES[name].attention.values() for layer in group}
    measured: set[str] = set()
    for record in records:
        for row in record.attention:
            assert row.calls <= micro_batches
            assert row.how in ("recomputed from q and k", "materialised softmax" if row.kind == "encoder" and VERSION < (5, 0) else "")
            assert row.entropy is not None
            measured.add(row.site)
    assert measured == layers  # in some step: layerdrop leaves some out
    assert not any("kernel" in why for record in records for why in record.not_measured.values())


@pytest.mark.parametrize("name", ["llama", "whisper", "qwen2_audio"])
def test_a_record_is_that_of_eager_attention(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without dropout the metrics of the first step are the same as with eager attention, whatever they are of."""
    if name == "qwen2_audio" and VERSION < (4, 48):
        pytest.skip("this model lays tokens out itself: padding rows, which flash attention does not compute, are counted in")
    flash_stand_in.install(monkeypatch)
    options = {"options": {"every": 1, "rows": 10_000}, "seed": 3, "max_steps": 1}
    _, (eager,) = observed_run(running(name, "eager", monkeypatch, dropout=False), **options)
    _, (flash,) = observed_run(running(name, "flash_attention_2", monkeypatch, dropout=False), **options)
    keys = {key for key in eager.metrics if key.startswith("probe/attention/")}
    assert len(keys) > 5
    assert {key for key in flash.metrics if key.startswith("probe/attention/")} == keys
    for key in keys:
        # Two rows whose centres of attention are just about the distance apart at which they tie count, or do not.
        tolerance = 5e-4 if key.endswith("/monotonicity") else 2e-5
        assert flash.metrics[key] == pytest.approx(eager.metrics[key], abs=tolerance), key


@HAS_BLOCK_MASKS
@pytest.mark.parametrize("variant", ["plain", "checkpointing", "checkpointing_reentrant"])
def test_training_on_flex_attention_is_untouched(variant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bit-identical, each layer once, and no function mode is entered while the kernel runs (the stand-in checks it)."""
    flex_stand_in.install(monkeypatch)
    records = compared(running("llama", "flex_attention", monkeypatch, dropout=False), **VARIANTS[variant])
    for record in records:
        assert [(row.calls, row.how, row.entropy is not None) for row in record.attention] == [(1, "recomputed from q and k", True)] * 2


# ------------------------------------------------------------------------------------------------------- kernels that others register


def register(monkeypatch: pytest.MonkeyPatch, name: str, scale_by: float = 1.0, *, fail: bool = False) -> list[str]:
    """Register a kernel that no function mode sees into and that knows no padding; return the threads that called it."""
    callers: list[str] = []

    def kernel(
        module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, scaling: Any = None, dropout: Any = 0.0, **more: Any
    ) -> Any:
        callers.append(threading.current_thread().name)
        if fail and len(callers) > 2:
            raise ZeroDivisionError("in the kernel")

        def compute(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scaling * scale_by, enable_gqa=True).transpose(1, 2)

        return Blind.apply(compute, query, key, value), None

    own = modeling_utils.ALL_ATTENTION_FUNCTIONS
    monkeypatch.setitem(getattr(own, "_global_mapping", own), name, kernel)
    return callers


@HAS_INTERFACE
def test_a_registered_kernel_is_measured_and_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel that the probe does not know is measured by the interface's convention, and its own output confirms it."""
    register(monkeypatch, "honest")
    records = compared(running("llama", "honest", monkeypatch, dropout=False))
    for record in records:
        for row in record.attention:
            assert row.entropy is not None
            assert "checked against the kernel's output" in row.how


@HAS_INTERFACE
def test_a_registered_kernel_that_does_something_else_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel that scales otherwise gives no attention numbers, and the reason with the difference."""
    register(monkeypatch, "liar", 3.0)
    case = running("llama", "liar", monkeypatch, dropout=False)

    def build(seed: int) -> nn.Module:
        model = case.build(seed)
        with torch.no_grad():
            [parameter.mul_(5.0) for name, parameter in model.named_parameters() if "self_attn" in name]
        return model

    for record in compared(replace(case, build=build)):
        assert all(row.entropy is None for row in record.attention)
        reasons = [record.not_measured[key] for key in record.not_measured if "self_attn" in key]
        assert reasons
        assert all("something else" in why for why in reasons)


@HAS_INTERFACE
def test_a_registered_kernel_with_dropout_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """With dropout inside the kernel its output cannot confirm anything: the layer is named, with the kernel and why."""
    register(monkeypatch, "theirs")
    for record in compared(running("llama", "theirs", monkeypatch)):
        reasons = [record.not_measured[key] for key in record.not_measured if "self_attn" in key]
        assert reasons
        assert all("'theirs'" in why and "dropout 0.1" in why for why in reasons)


@HAS_INTERFACE
def test_another_model_in_another_thread_passes_through(monkeypatch: pytest.MonkeyPatch) -> None:
    """A second model that runs the same kernel in another thread, amid a sampled forward, is neither seen nor disturbed."""
    callers = register(monkeypatch, "honest")
    case = running("llama", "honest", monkeypatch, dropout=False)
    other = case.build(9).train()
    ids = torch.arange(3, 12)[None]
    expected = other(input_ids=ids).logits
    outputs: list[Tensor] = []

    def meanwhile(*_: Any) -> None:
        own = modeling_utils.ALL_ATTENTION_FUNCTIONS
        assert isinstance(own["honest"], WatchedKernel)
        thread = threading.Thread(target=lambda: outputs.append(other(input_ids=ids).logits), name="other")
        thread.start()
        thread.join()

    def built(trainer: Any) -> None:
        trainer.model.model.layers[0].self_attn.q_proj.register_forward_hook(meanwhile)

    _, records = observed_run(case, options={"every": 1}, seed=3, max_steps=2, built=built)
    assert len(outputs) == 2
    assert callers.count("other") == 4
    assert all(torch.equal(output, expected) for output in outputs)
    for record in records:
        assert [(row.calls, row.entropy is not None) for row in record.attention] == [(1, True)] * 2


@HAS_INTERFACE
def test_an_error_in_the_kernel_leaves_everything_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    """An exception of the kernel ends training as it would without the probe, and no entry stays replaced."""
    register(monkeypatch, "broken", fail=True)
    before = registry_state()
    held: list[probe.Probe] = []

    def attach(model: nn.Module) -> probe.Probe:
        held.append(probe.attach(model, every=1, settings=probe.Settings(terminal=False)))
        return held[0]

    with pytest.raises(ZeroDivisionError, match="in the kernel"):
        run(running("llama", "broken", monkeypatch, dropout=False), seed=3, attach=attach, max_steps=4)
    assert registry_state() == before
    assert torch.overrides._get_current_function_mode_stack() == []
    held[0].detach()


# --------------------------------------------------------------------------------------------------------------------- torch.compile

COMPILED = {"torch_compile": True, "torch_compile_backend": "eager"}


@pytest.fixture
def dynamo() -> Any:
    """Start without compiled graphs; return a function that counts them."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield lambda: torch._dynamo.utils.counters["stats"]["unique_graphs"]
    torch._dynamo.reset()


def of_one_shape(samples: Any) -> dict[str, Tensor]:
    batch = models.CASES["llama"].collate(samples)
    return {name: F.pad(tensor, (0, 40 - tensor.shape[1]), value=-100 if name == "labels" else 0) for name, tensor in batch.items()}


@HAS_INTERFACE
def test_a_registered_kernel_in_a_compiled_model(monkeypatch: pytest.MonkeyPatch, dynamo: Callable[[], int]) -> None:
    """Sampled steps run eagerly and are seen; replacing and restoring the registry's entry compiles nothing anew."""
    register(monkeypatch, "honest")
    own = modeling_utils.ALL_ATTENTION_FUNCTIONS
    sdpa = own["sdpa"]
    monkeypatch.setitem(getattr(own, "_global_mapping", own), "honest", lambda *args, **kwargs: sdpa(*args, **{**kwargs, "dropout": 0.0}))
    case = replace(running("llama", "honest", monkeypatch, dropout=False), collate=of_one_shape)
    run(case, max_steps=6, **COMPILED)
    expected = dynamo()
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    observed = run(case, attach=lambda model: probe.attach(model, every=3), max_steps=6, **COMPILED)
    observed.attached.detach()
    assert 1 <= dynamo() <= expected
    assert [[row.entropy is not None for row in record.attention] for record in records_of(observed)] == [[True, True]] * 3


@HAS_BLOCK_MASKS
def test_flex_attention_in_a_compiled_model_is_left_alone(monkeypatch: pytest.MonkeyPatch, dynamo: Callable[[], int]) -> None:
    """A compiled model with flex attention runs as without the probe: nothing replaced, no graph more, and the reason is named."""
    flex_stand_in.install(monkeypatch)
    replaced: list[bool] = []
    case = replace(running("llama", "flex_attention", monkeypatch, dropout=False), collate=of_one_shape)

    def look(trainer: Any) -> None:
        step = trainer.training_step

        def training_step(*args: Any, **kwargs: Any) -> Any:
            replaced.append(isinstance(modeling_utils.ALL_ATTENTION_FUNCTIONS["flex_attention"], WatchedKernel))
            return step(*args, **kwargs)

        trainer.training_step = training_step

    results: list[RunResult] = []
    graphs: list[int] = []
    for attach in (None, lambda model: probe.attach(model, every=1)):
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        results.append(run(case, attach=attach, built=look, seed=3, max_steps=2, **COMPILED))
        graphs.append(dynamo())
    results[1].attached.detach()
    assert_identical(*results)
    assert graphs[0] == graphs[1] >= 1
    assert not any(replaced)
    assert all("flex attention" in record.not_measured["model"] for record in records_of(results[1]))
