"""Watches what goes into the root: every input tensor, token ids, labels, audio features and codes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from probe.capture.buffer import StepBuffer
from probe.capture.cells import Cell
from probe.capture.observer import Call, Watcher
from probe.measure.clips import COLUMNS as CLIP_COLUMNS
from probe.measure.clips import describe_clips
from probe.measure.fused_statistics import FUSED, FusedStatistics
from probe.measure.statistics import summarise
from probe.sites.batch import audio_codes, audio_features, samples_in, text_labels
from probe.sites.facts import ModelFacts

FIRST_VALUES = 10
SHOWN_SAMPLES = 2
SHOWN_TOKENS = 8192
SHOWN_CLIPS = 16
CELL = Cell(
    "inputs",
    counts=("samples", "ids", "tokens", "label_positions", "clips", "batches_without_clips"),
    sums=("padding", "labels_masked", "ids_outside", "clips_constant"),
)
CODES = Cell("audio_codes", counts=("batches",), sums=("positions",))


class InputWatcher(Watcher):
    """Statistics of every input of the step's first micro-batch, and counts over all micro-batches."""

    name = "inputs"

    def __init__(self, facts: ModelFacts, *, keep_text: bool) -> None:
        """Watch the root of a model with these facts; without ``keep_text`` no token id leaves the device."""
        self._facts = facts
        self._keep_text = keep_text
        self._fused = FusedStatistics()
        self._tokens = Cell("audio_tokens", counts=("batches",), sums=tuple(name for name, _ in facts.audio_tokens))

    def cells(self) -> Sequence[Cell]:
        """Return the cells of counts over all micro-batches."""
        return (CELL, CODES, self._tokens)

    def sites(self) -> Sequence[str]:
        """Return the root."""
        return ("",)

    def enter(self, call: Call, buffer: StepBuffer) -> None:
        """Measure the inputs of one micro-batch."""
        inputs = call.micro.inputs
        features = audio_features(inputs)
        clips_C3 = None if features is None else describe_clips(features[1])
        if call.micro.index == 0:
            for name, value in inputs.items():
                self._describe(name, value, buffer)
            self._show(inputs, clips_C3, buffer)
        self._count(inputs, clips_C3, buffer)

    def _describe(self, name: str, value: Any, buffer: StepBuffer) -> None:
        """Tell shape, dtype and device of one input, and put its statistics or first values."""
        known = buffer.totals.facts.setdefault("inputs", {})
        if not isinstance(value, Tensor):
            if isinstance(value, (bool, int, float)):
                known[name] = ((), type(value).__name__, "host", value)
            return
        known[name] = (tuple(value.shape), str(value.dtype).removeprefix("torch."), str(value.device), None)
        sums, maxima = summarise(value, fused=self._fused)
        if self._fused.failure is not None:
            buffer.totals.omit(FUSED, self._fused.failure)
        buffer.put(f"input:{name}", torch.cat([sums, maxima]))
        if self._keep_text and not value.is_floating_point() and value.numel():
            buffer.put(f"first:{name}", value.reshape(-1)[:FIRST_VALUES])

    def _show(self, inputs: Mapping[str, Any], clips_C3: Tensor | None, buffer: StepBuffer) -> None:
        """Put the token ids and labels of the first samples, and how the audio clips lie."""
        labels = text_labels(inputs)
        for key, tensor in (("ids", inputs.get("input_ids")), ("labels", labels[1] if labels else None)):
            if not isinstance(tensor, Tensor) or tensor.dim() != 2:
                continue
            if self._keep_text:
                buffer.put(key, tensor[:SHOWN_SAMPLES, :SHOWN_TOKENS])
        features = audio_features(inputs)
        if features is not None and clips_C3 is not None:
            buffer.totals.tell("audio_features", (features[0], tuple(features[1].shape)))
            buffer.put("clips", clips_C3[:SHOWN_CLIPS])

    def _count(self, inputs: Mapping[str, Any], clips_C3: Tensor | None, buffer: StepBuffer) -> None:
        ids, mask = inputs.get("input_ids"), inputs.get("attention_mask")
        labels, features = text_labels(inputs), audio_features(inputs)
        sums: dict[str, Tensor] = {}
        if isinstance(ids, Tensor):
            if self._facts.vocabulary is not None:
                sums["ids_outside"] = ((ids < 0) | (ids >= self._facts.vocabulary)).sum()
            if self._facts.audio_tokens:
                counted = torch.stack([(ids == token).sum() for _, token in self._facts.audio_tokens]).double()
                buffer.totals.add(self._tokens.name, counts=(1,), sums=counted)
        tokens = 0
        if isinstance(ids, Tensor) and isinstance(mask, Tensor) and mask.shape == ids.shape:
            tokens = ids.numel()
            sums["padding"] = torch.eq(mask, 0).sum()
        if labels is not None:
            sums["labels_masked"] = (labels[1] == -100).sum()
        if clips_C3 is not None and clips_C3.shape[0]:
            sums["clips_constant"] = clips_C3[:, CLIP_COLUMNS.index("constant")].sum()
        for _, codes, code_mask in audio_codes(inputs, codebooks=self._facts.codebooks):
            positions = codes.new_full((), codes.numel() // self._facts.codebooks) if code_mask is None else code_mask.sum()
            buffer.totals.add(CODES.name, counts=(1,), sums=positions.double().reshape(1))
        counts = (
            samples_in(inputs),
            ids.numel() if isinstance(ids, Tensor) else 0,
            tokens,
            labels[1].numel() if labels is not None else 0,
            features[1].shape[0] if features is not None else 0,
            int(features is not None and features[1].shape[0] == 0),
        )
        buffer.totals.add(CELL.name, counts=counts, sums=_vector(CELL.sums, sums))


def _vector(columns: Sequence[str], values: Mapping[str, Tensor]) -> Tensor | None:
    """Return the values in the order of the columns, float64, zero where there is none; ``None`` if there are none at all."""
    if not values:
        return None
    some = next(iter(values.values()))
    zero = torch.zeros((), dtype=torch.float64, device=some.device)
    return torch.stack([values[c].double().to(some.device, non_blocking=True) if c in values else zero for c in columns])
