"""Watches whether the audio features of a batch are sound, and whether there are as many placeholders for them as frames."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from probe.capture.buffer import StepBuffer
from probe.capture.cells import Cell
from probe.capture.observer import Call, Watcher, main_tensor
from probe.capture.observers.batch_checks import on_one_device
from probe.measure.audio_checks import COLUMNS_MAXIMA, COLUMNS_SUMS, LogMelScale, check_log_mel, check_waveform
from probe.records import Site
from probe.sites.audio_inputs import audio_clips, first_encoder, frames_by_mask, mel_bins_in
from probe.sites.facts import ModelFacts
from probe.sites.reference import stands_for_given

MEL_BINS = "mel_bins"
CLIPS = Cell("clip_checks", counts=("batches", "clips", "waveforms"), sums=COLUMNS_SUMS, maxima=COLUMNS_MAXIMA)
FRAMES = Cell("audio_frames", counts=("batches", "calls", "rows", "masked"), sums=("placeholders", "valid"))


class AudioChecker(Watcher):
    """Checks the clips of every micro-batch at the root, before SpecAugment overwrites them in place, and counts frames by shape."""

    name = "audio_checks"

    def __init__(self, sites: Sequence[Site], facts: ModelFacts, modules: Mapping[str, nn.Module], scale: LogMelScale | None) -> None:
        """Check for a model with these sites and facts; ``scale`` is what its feature extractor can give, where that is known."""
        self._facts = facts
        self._log_mel = scale
        encoders = [site.name for site in sites if site.role == "audio_encoder"]
        projectors = [site.name for site in sites if site.role == "projector"]
        self._encoder = first_encoder(sites, modules)
        # What fills the placeholders; with several of them nobody knows which does.
        last = projectors or encoders
        self._last = last[0] if len(last) == 1 else None
        given = [token for name, token in facts.audio_tokens if stands_for_given(name)]
        takes = self._last is not None and not facts.encoder_decoder
        self._placeholders = (tuple(given) or facts.audio_placeholders) if takes else ()

    def cells(self) -> Sequence[Cell]:
        """Return the cells of clips and frames."""
        return (CLIPS, FRAMES)

    def sites(self) -> Sequence[str]:
        """Return the root, and the module whose output stands at the placeholders."""
        return ("",) if self._last is None else ("", self._last)

    def enter(self, call: Call, buffer: StepBuffer) -> None:
        """Check the clips of one micro-batch, and count its placeholders."""
        if call.site.name != "":
            return
        inputs = on_one_device(call.micro)
        found = audio_clips(inputs)
        if found is not None:
            self._check(*found, buffer)
        self._count(inputs, buffer)

    def leave(self, call: Call, buffer: StepBuffer) -> None:
        """Count the frames of one call: all dimensions of its output but the last."""
        output = main_tensor(call.output) if call.site.name != "" else None
        if output is not None and output.dim() > 1:
            buffer.totals.add(FRAMES.name, counts=(0, 1, output.shape[:-1].numel(), 0))

    def _check(self, kind: str, clips: Tensor, buffer: StepBuffer) -> None:
        is_waveform = kind == "waveform"
        buffer.totals.add(CLIPS.name, counts=(1, clips.shape[0], int(is_waveform)))
        if not is_waveform:
            bins = mel_bins_in(clips, self._encoder)
            if bins is not None:
                buffer.totals.tell(MEL_BINS, bins)
        sums, maxima = check_waveform(clips) if is_waveform else check_log_mel(clips, self._log_mel)
        buffer.totals.add(CLIPS.name, sums=sums, maxima=maxima)

    def _count(self, inputs: Mapping[str, Any], buffer: StepBuffer) -> None:
        ids = inputs.get("input_ids")
        if not self._placeholders or not isinstance(ids, Tensor):
            return
        count = sum(((ids == token).sum() for token in self._placeholders), torch.zeros((), dtype=torch.int64, device=ids.device))
        valid = frames_by_mask(inputs, self._facts.model_type)
        sums = torch.stack([count, torch.zeros_like(count) if valid is None else valid.to(count.device)])
        buffer.totals.add(FRAMES.name, counts=(1, 0, 0, int(valid is not None)), sums=sums.double())
