"""The watcher of attention layers on hand-made calls: what is held, what the budget leaves out, what a kernel's check is told."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from probe.capture.breaker import Breaker
from probe.capture.buffer import StepBuffer
from probe.capture.microbatch import MicroBatch
from probe.capture.observer import Call
from probe.capture.observers import attention as watching
from probe.capture.observers.attention import AttentionWatcher, attention_cell
from probe.measure.probabilities import FromScores
from probe.measure.quantities import COLUMNS, MASSES, SHAPE, weight_of
from probe.measure.scores import Scores
from probe.records import Site

B, H, S = 2, 3, 10
SITE = Site("layer", "attention", "", "joint")
ROOT = Site("", "model", "")


class Layer(nn.Module):
    """Calls ``scaled_dot_product_attention`` on what it is given."""

    def forward(self, q: Tensor, k: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, k)


def attend(q: Tensor, k: Tensor, mask: Tensor | None = None) -> Tensor:
    return F.scaled_dot_product_attention(q, k, k, attn_mask=mask)


def watch(
    monkeypatch: pytest.MonkeyPatch,
    *,
    late: Tensor | None = None,
    known: Tensor | None = None,
    budget: int = 1 << 20,
    calls: int = 1,
    forward: Callable[[Call], Any] | None = None,
    say: Callable[[str], Any] = pytest.fail,
) -> StepBuffer:
    """Show the watcher one forward of a root with one layer, called some times; modalities are known at once, late, or never."""
    monkeypatch.setattr(watching, "modalities", lambda call, shape: (known, known))
    monkeypatch.setattr(watching, "late_modality", lambda micro, site: late)
    breaker = Breaker(say)
    watcher = AttentionWatcher([ROOT, SITE], breaker, rows=64)
    buffer = StepBuffer(budget_bytes=budget, sites=("layer",), cells=watcher.cells())
    buffer.open(1)
    micro = MicroBatch(0)
    root = Call(ROOT, nn.Identity(), micro, (), {})
    watcher.enter(root, buffer)
    for seed in range(calls):
        q, k = (torch.randn(B, H, S, 4, generator=torch.Generator().manual_seed(2 * seed + n)) for n in (0, 1))
        call = Call(SITE, Layer(), micro, (q, k), {})
        watcher.enter(call, buffer)
        call.output = call.module(*call.args) if forward is None else forward(call)
        call.entered.close()
        watcher.leave(call, buffer)
    watcher.leave(root, buffer)
    return buffer


def sums(buffer: StepBuffer) -> dict[str, float]:
    return dict(zip(COLUMNS, buffer.totals.sums[attention_cell("layer")].tolist(), strict=True))


def modality() -> Tensor:
    return torch.tensor([[1, 1, 2, 2, 2, 3, 3, 1, 1, 0], [0, 0, 1, 1, 2, 2, 2, 3, 1, 1]], dtype=torch.int8)


def test_late_is_as_at_once_but_for_what_needs_the_heads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows that waited give the same sums; what they cannot give is named, and nothing stays reserved or held."""
    now, late = watch(monkeypatch, known=modality(), calls=2), watch(monkeypatch, late=modality(), calls=2)
    for what in (*SHAPE, *MASSES):
        assert sums(late)[what] == pytest.approx(sums(now)[what], rel=1e-5), what
        assert sums(late)[weight_of(what)] == pytest.approx(sums(now)[weight_of(what)]), what
    assert sums(now)["coverage_weight"] > 0 == sums(late)["coverage_weight"]
    assert late.totals.facts["headwise:attention:layer"] == SHAPE
    assert "no masses of each head, no monotonicity" in late.totals.reasons["attention:layer/per_head"]
    assert not now.totals.reasons
    assert now.bytes == late.bytes
    assert now.totals.counts["attention:layer"] == late.totals.counts["attention:layer"] == [2.0]


def test_calls_wait_for_each_other_and_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Calls are summed up when the root returns, all at once; sooner where they would hold more than they may, to the same sums."""
    summed: list[int] = []
    sum_up = watching.sum_up
    monkeypatch.setattr(watching, "sum_up", lambda calls, prepared: summed.append(len(calls)) or sum_up(calls, prepared))
    together = watch(monkeypatch, known=modality(), calls=3)
    assert summed == [3]
    summed.clear()
    monkeypatch.setattr(watching, "_WAITING_BYTES", 12 * B * H * S * 4 + B * H * S * 4)  # those of one call
    apart = watch(monkeypatch, known=modality(), calls=3)
    assert summed == [2, 1]
    for key in ("own:attention:layer", "heads:attention:layer"):
        torch.testing.assert_close(together.totals.local[key], apart.totals.local[key], rtol=1e-12, atol=1e-12)
    assert sums(together) == pytest.approx(sums(apart), rel=1e-12)


def test_calls_that_see_other_keys_are_summed_up_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """Calls that waited are summed up with what they were prepared with before another takes its place."""
    summed: list[int] = []
    sum_up = watching.sum_up
    monkeypatch.setattr(watching, "sum_up", lambda calls, prepared: summed.append(len(calls)) or sum_up(calls, prepared))
    mask = torch.ones(S, S, dtype=torch.bool).tril()
    masks = [None, mask, mask, None]
    left = iter(masks)
    found = watch(monkeypatch, known=modality(), calls=4, forward=lambda call: attend(*call.args, next(left)))
    assert summed == [1, 2, 1]
    alone = 0.0
    for seed, one in enumerate(masks):
        q, k = (torch.randn(B, H, S, 4, generator=torch.Generator().manual_seed(2 * seed + n)) for n in (0, 1))
        alone += sums(watch(monkeypatch, known=modality(), forward=lambda call, q=q, k=k, one=one: attend(q, k, one)))["entropy_nats"]
    assert sums(found)["entropy_nats"] == pytest.approx(alone, rel=1e-9)


@pytest.mark.parametrize("late", [None, torch.ones(B, S + 1, dtype=torch.int8)])
def test_what_nobody_tells_is_named(monkeypatch: pytest.MonkeyPatch, late: Tensor | None) -> None:
    """Where the output tells nothing, or of another sequence, padding rows are counted in, and that is said."""
    buffer = watch(monkeypatch, late=late)
    assert sums(buffer)["sampled"] == B * S
    assert sums(buffer)["padding_weight"] == sums(buffer)["text_to_audio_weight"] == 0
    assert "padding rows are counted in" in buffer.totals.reasons["attention:layer/modality"]


def test_over_budget_nothing_is_held_but_the_shape_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows that may not wait are measured at once, without a modality, and the budget is named as the reason."""
    buffer = watch(monkeypatch, late=modality(), budget=2_000)
    free = watch(monkeypatch, known=None)
    assert "would exceed the budget" in buffer.totals.reasons["attention:layer/modality"]
    assert sums(buffer)["entropy_nats"] == pytest.approx(sums(free)["entropy_nats"])
    assert sums(buffer)["text_to_audio_weight"] == 0
    assert buffer.bytes <= 2_000


class Check:
    """A check that a source carries; tells a given mismatch and looks at what it is given."""

    def __init__(self, value: float) -> None:
        self.value = value
        self.rows: tuple[int, ...] = ()

    def mismatch(self, source: Any, index_BR: Tensor) -> Tensor:
        self.rows = tuple(index_BR.shape)
        assert source.shape == (B, H, S, S)
        return torch.tensor(self.value)


@pytest.mark.parametrize(("value", "expected"), [(0.003, 0.003), (0.7, 0.7), (float("nan"), float("inf"))])
def test_the_check_of_a_kernel_is_asked_and_kept(monkeypatch: pytest.MonkeyPatch, value: float, expected: float) -> None:
    """The mismatch of a source that carries a check goes into the layer's maximum, NaN as infinity; without a check there is none."""
    check = Check(value)

    def forward(call: Call) -> None:
        class Source(FromScores):
            pass

        source = Source(Scores(*call.args))
        object.__setattr__(source, "check", check)
        call.notes["attention"].report(lambda: source)

    buffer = watch(monkeypatch, known=modality(), forward=forward)
    assert buffer.totals.maxima["attention:layer"].tolist() == pytest.approx([expected])
    assert check.rows == (B, S)
    assert "attention:layer" not in watch(monkeypatch, known=modality()).totals.maxima


def test_learned_sinks_of_a_module_are_no_key(monkeypatch: pytest.MonkeyPatch) -> None:
    """The last column of the softmax of a module with ``sinks`` is its sink; of another module, a key."""
    for has_sinks in (True, False):

        def forward(call: Call) -> None:
            torch.softmax(torch.randn(B, H, S, S + has_sinks), -1)  # noqa: B023

        monkeypatch.setattr(Layer, "sinks", torch.zeros(H) if has_sinks else None, raising=False)
        buffer = watch(monkeypatch, forward=forward)
        assert buffer.totals.facts["attention:layer"][1] == S
        assert (sums(buffer)["sink_weight"] > 0) == has_sinks


def test_an_empty_call_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """A call without samples gives no numbers but the reason, and is counted."""
    buffer = watch(monkeypatch, forward=lambda call: call.module(*(part[:0] for part in call.args)))
    assert "an empty call: 0 samples" in buffer.totals.reasons["attention:layer"]
    assert not buffer.totals.sums


def test_a_layer_that_cannot_be_read_gives_its_bytes_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows that were to wait, and could not be had, are named with their reason and take nothing of the budget."""

    def forward(call: Call) -> None:
        call.notes["attention"].report(lambda: FromScores(Scores(*call.args, may=lambda b, h, q, k: None)))

    buffer = watch(monkeypatch, late=modality(), forward=forward)
    assert "the mask function cannot be evaluated" in buffer.totals.reasons["attention:layer"]
    assert buffer.bytes == watch(monkeypatch, calls=0).bytes


def test_an_error_of_its_own_ends_the_watching(monkeypatch: pytest.MonkeyPatch) -> None:
    """An error inside the probe is said once; calls after it are counted and no longer measured."""
    said: list[str] = []
    calls: list[int] = []

    def fail(*given: Any, **named: Any) -> None:
        calls.append(1)
        raise RuntimeError("mine")

    monkeypatch.setattr(watching, "reduce_rows", fail)
    buffer = watch(monkeypatch, known=modality(), calls=3, say=said.append)
    assert len(said) == len(calls) == 1
    assert "attention switched off after RuntimeError: mine at layer" in said[0]
    assert buffer.totals.counts["attention:layer"] == [3.0]
    assert not buffer.totals.sums
