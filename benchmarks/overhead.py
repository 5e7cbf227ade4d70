"""Plain, idle and sampled steps of the same model, interleaved and paired."""

from __future__ import annotations

import random
import statistics
import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, WhisperConfig, WhisperForConditionalGeneration

import probe

KINDS = ("plain", "idle", "sampled")
NEVER = 10**9
WARM_UP = 3


@dataclass(frozen=True)
class Ratio:
    """A median ratio and the interval of its bootstrapped medians."""

    median: float
    low: float
    high: float

    def text(self) -> str:
        """Return the ratio with its interval."""
        return f"{self.median:.3f} [{self.low:.3f}, {self.high:.3f}]"


@dataclass(frozen=True)
class Row:
    """What one model's steps took."""

    model: str
    batch: str
    plain_ms: float
    idle: Ratio
    sampled: Ratio


def whisper() -> tuple[str, nn.Module, dict[str, Tensor]]:
    """Return a model of Whisper-tiny's shape, with full 30 s clips and its real vocabulary."""
    config = WhisperConfig(
        d_model=384, encoder_layers=4, decoder_layers=4, encoder_attention_heads=6, decoder_attention_heads=6,
        encoder_ffn_dim=1536, decoder_ffn_dim=1536, vocab_size=51865,
    )  # fmt: skip
    batch = {"input_features": torch.randn(2, 80, 3000), "labels": torch.randint(0, 50000, (2, 64))}
    return "Whisper, tiny's shape", WhisperForConditionalGeneration(config), batch


def llama() -> tuple[str, nn.Module, dict[str, Tensor]]:
    """Return a Llama-like model of realistic width, with few layers."""
    config = LlamaConfig(
        vocab_size=32000, hidden_size=768, intermediate_size=2048, num_hidden_layers=4, num_attention_heads=12, num_key_value_heads=4
    )
    ids = torch.randint(0, 32000, (2, 256))
    return "Llama, 4 layers of 768", LlamaForCausalLM(config), {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}


def measure(pairs: int) -> list[Row]:
    """Measure every model; each step is forward, backward and an SGD update."""
    return [_measure(make, pairs) for make in (whisper, llama)]


def _measure(make: Callable[[], tuple[str, nn.Module, dict[str, Tensor]]], pairs: int) -> Row:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    name, first, batch = make()
    batch = {key: tensor.to(device) for key, tensor in batch.items()}
    models = {"plain": first.to(device), "idle": make()[1].to(device), "sampled": make()[1].to(device)}
    probes = {kind: _attach(models[kind], NEVER if kind == "idle" else 1) for kind in ("idle", "sampled")}
    steps = {kind: _step(models[kind], batch, probes.get(kind)) for kind in KINDS}
    order, rng = list(KINDS), random.Random(0)
    times: dict[str, list[float]] = {kind: [] for kind in KINDS}
    for i in range(WARM_UP + pairs):
        rng.shuffle(order)
        for kind in order:
            took = _timed(steps[kind])
            if i >= WARM_UP:
                times[kind].append(took)
    for p in probes.values():
        p.detach()
    shape = " and ".join(str(tuple(tensor.shape)) for key, tensor in batch.items() if key != "attention_mask")
    plain = statistics.median(times["plain"]) * 1e3
    return Row(name, shape, plain, _ratio(times["idle"], times["plain"]), _ratio(times["sampled"], times["plain"]))


def _attach(model: nn.Module, every: int) -> probe.Probe:
    settings = probe.Settings(terminal=False, run_folder=tempfile.mkdtemp(prefix="probe-benchmark-"))
    return probe.attach(model, every=every, settings=settings)


def _step(model: nn.Module, batch: dict[str, Tensor], p: probe.Probe | None) -> Callable[[], None]:
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)

    def step() -> None:
        optimizer.zero_grad()
        with nullcontext() if p is None else p.step():
            model(**batch).loss.backward()
            optimizer.step()

    return step


def _timed(step: Callable[[], None]) -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    begin = time.perf_counter()
    step()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - begin


def _ratio(over: list[float], under: list[float]) -> Ratio:
    ratios = [a / b for a, b in zip(over, under, strict=True)]
    rng = random.Random(1)
    medians = sorted(statistics.median(rng.choices(ratios, k=len(ratios))) for _ in range(2000))
    return Ratio(statistics.median(ratios), medians[50], medians[-51])
