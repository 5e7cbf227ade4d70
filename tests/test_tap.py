from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from torch.overrides import BaseTorchFunctionMode, _get_current_function_mode, _get_current_function_mode_stack
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    WhisperConfig,
    WhisperForConditionalGeneration,
)

from probe.capture.tap import AttentionTap
from probe.foreign.function_modes import innermost, stepped_out_of
from probe.measure.blocks import NotObservable, RowSource
from probe.measure.probabilities import FromScores, FromSoftmax
from probe.measure.scores import Scores
from rows_together import Rows, together
from tapping import Taps

B, S, H = 3, 12, 4
SIZES = {"hidden_size": 32, "num_attention_heads": H, "num_hidden_layers": 2, "intermediate_size": 32, "vocab_size": 40}
TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


def whisper(**more: Any) -> nn.Module:
    config = WhisperConfig(
        d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=H, decoder_attention_heads=H, encoder_ffn_dim=32,
        decoder_ffn_dim=32, max_source_positions=20, max_target_positions=20, vocab_size=40, num_mel_bins=8, decoder_start_token_id=1,
        **TOKENS, **more,
    )  # fmt: skip
    return WhisperForConditionalGeneration(config)


BUILDERS: dict[str, Callable[..., nn.Module]] = {
    "whisper": whisper,
    "llama": lambda **more: LlamaForCausalLM(LlamaConfig(**SIZES, **TOKENS, num_key_value_heads=2, **more)),
    "mistral": lambda **more: MistralForCausalLM(MistralConfig(**SIZES, **TOKENS, num_key_value_heads=2, sliding_window=4, **more)),
    "gpt2": lambda **more: GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=H, vocab_size=40, **TOKENS, **more)),
}


def build(name: str, implementation: str, **more: Any) -> nn.Module:
    torch.manual_seed(0)
    model = BUILDERS[name](attn_implementation=implementation, **more)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3.0)  # far from uniform attention
    return model


def batch(name: str, padding: str = "none") -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 40, (B, S), generator=generator)
    if name == "whisper":
        return {"input_features": torch.randn(B, 8, 40, generator=generator), "decoder_input_ids": ids, "labels": ids}
    given = {"input_ids": ids, "labels": ids}
    if padding != "none":
        mask = torch.arange(S) < torch.tensor([S, S - 5, 3])[:, None]
        given["attention_mask"] = (mask.flip(1) if padding == "left" else mask).long()
    return given


def every_row(source: RowSource) -> Rows:
    samples, _, queries, _ = source.shape
    return together(source, torch.arange(queries).expand(samples, queries))


def scores_of(source: RowSource) -> Scores:
    assert isinstance(source, FromScores)
    return source.scores


def softmax_of(source: RowSource) -> FromSoftmax:
    assert isinstance(source, FromSoftmax)
    return source


def rows_of(model: nn.Module, given: dict[str, Tensor], **forward: Any) -> tuple[dict[str, Rows], Any]:
    seen: dict[str, Rows] = {}

    how = "materialised softmax" if model.config._attn_implementation == "eager" else "recomputed from q and k"

    def see(name: str, source: RowSource) -> None:
        assert name not in seen
        assert source.how == how
        seen[name] = every_row(source)

    with Taps(model, see) as taps:
        output = model(**given, **forward)
    assert taps.errors == []
    return seen, output


def eager_weights(name: str, given: dict[str, Tensor]) -> dict[str, Tensor]:
    """What the model itself returns as attention weights, by module name."""
    output = build(name, "eager").eval()(**given, output_attentions=True)
    if name == "whisper":
        kinds = {"encoder": output.encoder_attentions, "decoder": output.decoder_attentions, "cross": output.cross_attentions}
        parts = {"encoder": "model.encoder.layers.{}.self_attn", "decoder": "model.decoder.layers.{}.self_attn"}
        parts["cross"] = "model.decoder.layers.{}.encoder_attn"
        return {parts[kind].format(i): weights for kind, layers in kinds.items() for i, weights in enumerate(layers)}
    path = "transformer.h.{}.attn" if name == "gpt2" else "model.layers.{}.self_attn"
    return {path.format(i): weights for i, weights in enumerate(output.attentions)}


CASES = [("whisper", "none"), *((name, padding) for name in ("llama", "mistral", "gpt2") for padding in ("none", "right", "left"))]


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize(("name", "padding"), CASES)
def test_rows_are_the_models_attention(name: str, padding: str, implementation: str) -> None:
    """For real models, under eager and SDPA, the rows equal the weights that the eager model returns, for every token not padding."""
    given = batch(name, padding)
    expected = eager_weights(name, given)
    model = build(name, implementation).eval()
    seen, _ = rows_of(model, given)
    assert set(seen) == set(expected)
    real = given.get("attention_mask", torch.ones(B, S)).bool()
    for site, rows in seen.items():
        kept = real if rows.p_BHRK.shape[2] == S else torch.ones(B, rows.p_BHRK.shape[2], dtype=torch.bool)
        found, truth = rows.p_BHRK.transpose(1, 2)[kept], expected[site].transpose(1, 2)[kept]
        torch.testing.assert_close(found, truth, atol=1e-6, rtol=0)
        assert torch.equal(rows.visible_BRK[kept], (truth > 0).any(1))
        assert truth.std() > 0.02  # far from uniform


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("name", list(BUILDERS))
def test_training_is_untouched_and_dropout_is_left_out(name: str, implementation: str) -> None:
    """With dropout the loss, the gradients and the RNG are bit-identical with the tap, and the rows are from before dropout."""
    dropout = {"attn_pdrop": 0.3} if name == "gpt2" else {"attention_dropout": 0.3}
    given = batch(name, "none" if name == "whisper" else "left")
    results = []
    for tapped in (False, True):
        model = build(name, implementation, **dropout).train()
        torch.manual_seed(2)
        seen, output = rows_of(model, given) if tapped else ({}, model(**given))
        output.loss.backward()
        results.append((output.loss, [parameter.grad for parameter in model.parameters()], torch.get_rng_state()))
    (loss, gradients, rng), (loss_tapped, gradients_tapped, rng_tapped) = results
    assert torch.equal(loss, loss_tapped)
    assert all(a is b or torch.equal(a, b) for a, b in zip(gradients, gradients_tapped))
    assert torch.equal(rng, rng_tapped)
    assert seen
    for rows in seen.values():
        sums = rows.p_BHRK.sum(-1)
        torch.testing.assert_close(sums, rows.visible_BRK.any(-1)[:, None].expand_as(sums).float(), atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", ["whisper", "llama"])
def test_under_autocast_rows_are_what_the_kernel_computes(name: str) -> None:
    """Under a bfloat16 autocast the rows are within 1e-5 of float64 from the values that autocast gives the kernel."""
    model = build(name, "sdpa").eval()
    compared = []

    def see(site: str, source: RowSource) -> None:
        call = scores_of(source)
        assert call.autocast_dtype == torch.bfloat16
        q, k, mask = call.q_BHSD.bfloat16().double(), call.k_BhKD.bfloat16().double(), call.mask
        if mask is not None and mask.dtype != torch.bool:
            mask = mask.double()
        identity = torch.eye(k.shape[2]).double().expand(*k.shape[:2], -1, -1)
        with torch.autocast("cpu", enabled=False):
            more = {"is_causal": call.causal_offset == 0, "scale": call.scale, "enable_gqa": True}
            expected = F.scaled_dot_product_attention(q, k, identity, attn_mask=mask, **more)
        torch.testing.assert_close(every_row(source).p_BHRK.double(), expected, atol=1e-5, rtol=0)
        compared.append(site)

    with Taps(model, see) as taps, torch.autocast("cpu", dtype=torch.bfloat16):
        model(**batch(name))
    assert taps.errors == []
    assert compared


def seen_in(run: Callable[[], Any], **options: Any) -> tuple[list[RowSource], list[Exception], Any]:
    calls: list[RowSource] = []
    errors: list[Exception] = []
    with AttentionTap(calls.append, errors.append, **options) as tap:
        result = run()
    assert tap.reported == len(calls)
    return calls, errors, result


def test_arguments_by_position_by_name_and_by_default() -> None:
    """The call that is reported holds the arguments as given, however they were passed, detached and by reference."""
    q, k, v = (torch.randn(2, H, 5, 8, requires_grad=True) for _ in range(3))
    mask = torch.ones(5, 5).tril().bool()
    sdpa = F.scaled_dot_product_attention
    (plain,), _, _ = seen_in(lambda: sdpa(q, k, v))
    assert plain.shape == (2, H, 5, 5)
    call = scores_of(plain)
    assert (call.mask, call.causal_offset, call.scale, call.autocast_dtype) == (None, None, None, None)
    assert (call.q_BHSD.data_ptr(), call.k_BhKD.data_ptr()) == (q.data_ptr(), k.data_ptr())
    assert not call.q_BHSD.requires_grad
    assert not call.k_BhKD.requires_grad
    (placed,), _, _ = seen_in(lambda: sdpa(q, k, v, mask, 0.5, False, scale=0.1))
    call = scores_of(placed)
    assert call.mask is not None
    assert (call.mask.data_ptr(), call.causal_offset, call.scale) == (mask.data_ptr(), None, 0.1)
    (named,), _, _ = seen_in(lambda: sdpa(query=q, key=k[:, :2], value=v[:, :2], is_causal=True, dropout_p=0.2, enable_gqa=True))
    call = scores_of(named)
    assert (call.mask, call.causal_offset, call.k_BhKD.shape[1]) == (None, 0, 2)


@pytest.mark.parametrize(
    "softmax",
    [
        lambda x: F.softmax(x, dim=-1),
        lambda x: F.softmax(x, -1, dtype=torch.float32),
        lambda x: F.softmax(input=x, dim=3),
        lambda x: torch.softmax(x, -1),
        lambda x: torch.softmax(input=x, dim=-1),
        lambda x: x.softmax(-1),
        lambda x: x.softmax(dim=3),
        nn.Softmax(dim=-1),
    ],
)
def test_every_way_to_call_softmax(softmax: Callable[[Tensor], Tensor]) -> None:
    """A softmax over the last of four dimensions is seen however it is called; the model gets the function's own result object."""
    scores = torch.randn(2, H, 5, 7, requires_grad=True)
    (source,), errors, result = seen_in(lambda: softmax(scores))
    assert errors == []
    call = softmax_of(source)
    assert (call.shape, call.sinks) == ((2, H, 5, 7), 0)
    assert call.weights_BHSK.data_ptr() == result.data_ptr()
    assert call.scores_BHSK.data_ptr() == scores.data_ptr()
    assert result.grad_fn is not None
    assert not call.weights_BHSK.requires_grad


def test_what_is_no_attention_is_not_reported() -> None:
    """A softmax over another dimension, of another rank, or log_softmax is not attention; nothing is said of it."""
    x = torch.randn(2, H, 5, 7)
    calls, errors, _ = seen_in(lambda: (x.softmax(1), x[0, 0].softmax(-1), F.log_softmax(x, -1), torch.sigmoid(x), x.shape))
    assert calls == errors == []


def test_all_sdpa_calls_count_and_only_the_first_softmax() -> None:
    """Every SDPA call is reported; a softmax counts only as the first attention of the module's call."""
    q = torch.randn(2, H, 5, 8)
    calls, _, _ = seen_in(lambda: [F.scaled_dot_product_attention(q, q, q), q.softmax(-1), F.scaled_dot_product_attention(q, q, q)])
    assert [type(call) for call in calls] == [FromScores, FromScores]
    calls, _, _ = seen_in(lambda: [q.softmax(-1), q.softmax(-1), F.scaled_dot_product_attention(q, q, q)])
    assert [type(call) for call in calls] == [FromSoftmax, FromScores]


def test_folded_heads() -> None:
    """A softmax over (B * H, S, K) is opened with ``num_heads``; without, it is told at the exit, unless attention was seen after it."""
    scores, q = torch.randn(2 * H, 5, 7), torch.randn(2, H, 5, 8)
    (call,), errors, result = seen_in(lambda: scores.softmax(-1), num_heads=H)
    assert errors == []
    assert call.shape == (2, H, 5, 7)
    assert torch.equal(every_row(call).p_BHRK, result.view(2, H, 5, 7))
    for heads in (None, 3):
        calls, errors, _ = seen_in(lambda: scores.softmax(-1), num_heads=heads)
        assert calls == []
        assert [type(error) for error in errors] == [NotObservable]
        assert "(8, 5, 7)" in str(errors[0])
    calls, errors, _ = seen_in(lambda: (scores.softmax(-1), F.scaled_dot_product_attention(q, q, q)))
    assert [type(call) for call in calls] == [FromScores]
    assert errors == []
    calls, errors, _ = seen_in(lambda: F.scaled_dot_product_attention(q[0], q[0], q[0]))
    assert calls == []
    assert "(4, 5, 8)" in str(errors[0])


def test_an_error_of_the_callback_stays_out_of_the_model() -> None:
    """What the callback raises goes to ``on_error`` with its traceback; the model gets its result and runs on."""
    q = torch.randn(2, H, 5, 8)
    errors: list[Exception] = []

    def fail(call: RowSource) -> None:
        raise LookupError("broken")

    with AttentionTap(fail, errors.append):
        result = F.scaled_dot_product_attention(q, q, q)
        again = torch.softmax(q, -1)
    assert torch.equal(result, F.scaled_dot_product_attention(q, q, q))
    assert torch.equal(again, q.softmax(-1))
    assert [str(error) for error in errors] == ["broken"]
    assert errors[0].__traceback__ is not None


def test_an_error_of_the_model_passes_and_leaves_no_mode() -> None:
    """An exception inside attention reaches the caller as it is, no mode stays entered, and nothing is claimed of the call."""
    model = build("llama", "sdpa").train()
    errors: list[Exception] = []

    def raise_error(module: nn.Module, args: Any) -> None:
        raise ZeroDivisionError("in the model")

    handle = model.model.layers[1].self_attn.o_proj.register_forward_pre_hook(raise_error)
    with Taps(model, lambda name, call: None) as taps, pytest.raises(ZeroDivisionError, match="in the model"):
        model(**batch("llama"))
    handle.remove()
    assert _get_current_function_mode() is None
    assert taps.open == []

    def softmax_and_raise() -> None:
        raise ZeroDivisionError(torch.randn(2, 3, 4).softmax(-1))

    with pytest.raises(ZeroDivisionError), AttentionTap(lambda call: None, errors.append):
        softmax_and_raise()
    assert errors == []
    assert _get_current_function_mode() is None


def test_blind_outside_and_in_other_threads() -> None:
    """Only what runs in this thread between enter and exit is seen."""
    q = torch.randn(2, H, 5, 8)
    calls: list[RowSource] = []
    tap = AttentionTap(calls.append, lambda error: None)
    F.scaled_dot_product_attention(q, q, q)
    with tap:
        thread = threading.Thread(target=lambda: F.scaled_dot_product_attention(q, q, q))
        thread.start()
        thread.join()
    F.scaled_dot_product_attention(q, q, q)
    assert calls == []


def test_a_function_put_in_the_place_of_torchs_is_seen_through(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that swaps ``F.scaled_dot_product_attention`` for its own wrapper is seen where the wrapper calls the operator."""
    q = torch.randn(2, H, 5, 8)
    original = F.scaled_dot_product_attention
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda *args, **kwargs: original(*args, **kwargs, scale=0.25))
    (call,), _, _ = seen_in(lambda: F.scaled_dot_product_attention(q, q, q))
    assert scores_of(call).scale == 0.25


def test_the_callback_builds_no_graph() -> None:
    """The callback runs without gradient, and what the model computes keeps its graph."""
    q = torch.randn(2, H, 5, 8, requires_grad=True)
    enabled: list[bool] = []
    with AttentionTap(lambda call: enabled.append(torch.is_grad_enabled()), lambda error: None):
        result = F.scaled_dot_product_attention(q, q, q)
        assert torch.is_grad_enabled()
    assert enabled == [False]
    assert result.grad_fn is not None


def test_a_kernel_that_is_no_torch_function_is_reported_from_outside() -> None:
    """What stands round a kernel reports its source; it counts, and the softmax that may follow is no attention then."""
    q = torch.randn(2, H, 5, 8, requires_grad=True)
    enabled: list[bool] = []

    def read() -> RowSource:
        enabled.append(torch.is_grad_enabled())
        return FromScores(Scores(q.detach(), q.detach()))

    def run() -> None:
        innermost(AttentionTap).report(read)
        q.softmax(-1)

    calls, errors, _ = seen_in(run)
    assert [type(call) for call in calls] == [FromScores]
    assert enabled == [False]
    assert errors == []
    calls, errors, _ = seen_in(lambda: innermost(AttentionTap).report(lambda: None))
    assert calls == errors == []


def test_what_cannot_be_read_is_told_once_at_the_exit() -> None:
    """A reason why a call cannot be read is told when the module returns, unless another call was read; other errors are told at once."""

    def unreadable() -> RowSource:
        raise NotObservable("of an unknown kind")

    calls, errors, _ = seen_in(lambda: innermost(AttentionTap).report(unreadable))
    assert calls == []
    assert [str(error) for error in errors] == ["of an unknown kind"]
    q = torch.randn(2, H, 5, 8)
    calls, errors, _ = seen_in(lambda: (innermost(AttentionTap).report(unreadable), q.softmax(-1)))
    assert [type(call) for call in calls] == [FromSoftmax]
    assert errors == []
    calls, errors, _ = seen_in(lambda: innermost(AttentionTap).report(lambda: {}["missing"]))
    assert [type(error) for error in errors] == [KeyError]


def test_function_modes_are_found_and_stepped_out_of() -> None:
    """The innermost mode of a class is found below others; stepping out leaves that class only, and ends as it began, also by errors."""

    def tap() -> AttentionTap:
        return AttentionTap(lambda source: None, print)

    with tap() as outer, BaseTorchFunctionMode() as between, tap() as inner, BaseTorchFunctionMode() as above:
        before = _get_current_function_mode_stack()
        assert before == [outer, between, inner, above]
        assert innermost(AttentionTap) is inner
        with pytest.raises(ZeroDivisionError), stepped_out_of(AttentionTap):
            assert _get_current_function_mode_stack() == [between, above]
            assert innermost(AttentionTap) is None
            raise ZeroDivisionError
        assert _get_current_function_mode_stack() == before
    assert innermost(AttentionTap) is None


@pytest.mark.skipif(not hasattr(transformers, "GptOssConfig"), reason="this transformers has no GPT-OSS")
def test_the_sink_of_an_eager_softmax_is_no_key() -> None:
    """GPT-OSS, eager: with ``sinks`` the keys are the keys, the sink's probability stands in its own column, and all sum to 1."""
    torch.manual_seed(0)
    config = transformers.GptOssConfig(
        **{**SIZES, "num_hidden_layers": 1}, **TOKENS, num_key_value_heads=2, head_dim=8, num_local_experts=2, num_experts_per_tok=1,
        sliding_window=4, layer_types=["sliding_attention"], attn_implementation="eager",
    )  # fmt: skip
    model = transformers.GptOssForCausalLM(config).eval()
    nn.init.normal_(model.model.layers[0].self_attn.sinks)
    seen: list[Rows] = []
    tap = AttentionTap(lambda source: seen.append(every_row(source)), print, sinks=True)
    module = model.model.layers[0].self_attn
    module.register_forward_pre_hook(lambda *_: tap.__enter__() and None)
    module.register_forward_hook(lambda *_: tap.__exit__(None, None, None), always_call=True)
    weights = model(**batch("gpt_oss"), output_attentions=True).attentions[0]
    assert weights.shape[-1] == S
    (rows,) = seen
    torch.testing.assert_close(rows.p_BHRK[..., :S], weights, atol=1e-6, rtol=0)
    torch.testing.assert_close(rows.p_BHRK.sum(-1), torch.ones(B, H, S))
    assert rows.p_BHRK[..., S].min() > 0.01
    assert torch.equal(rows.visible_BRK, (weights > 0).any(1))
