"""Where labels hide among a model's inputs and outputs, and how they lie over the logits of a head."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from probe.capture.microbatch import MicroBatch, named_output
from probe.measure.heads import split_codebooks
from probe.records import Site
from probe.sites.laying import IGNORED as IGNORED
from probe.sites.laying import Aligned, asked_to_keep, kept_positions, lay, lay_shifted, padding_of

if TYPE_CHECKING:
    from probe.sites.facts import ModelFacts

TEXT_LABELS = ("labels", "label_ids")
AUDIO_LABELS = ("audio_labels", "label_audio_ids")
EXPANDED_LABELS = "expanded_labels"
SHIFTED_LABELS = "shift_labels"

# Model types whose own loss leaves out labels under padding, whatever they are (Qwen2AudioForConditionalGeneration.forward).
_UNLEARNT_UNDER_PADDING = frozenset({"qwen2_audio"})


@dataclass(frozen=True, slots=True)
class NotAligned:
    """Why there are no labels for a head.

    ``later``: the root's output may still bring labels; ask again when it has returned. ``absent``: there are no labels for it at all.
    """

    reason: str
    later: bool = False
    absent: bool = False


def align(logits: Tensor, *, site: Site, facts: ModelFacts, micro: MicroBatch) -> Aligned | NotAligned:
    """Find the labels of a head and lay them over its logits as the model's own loss does.

    The shift is a property of the model (``facts.label_shift``), never chosen by what fits: a fit would hide labels that are shifted
    twice. No sync; labels on another device are moved without waiting. Memory: 16 bytes a label that stay with the result, 24 while it is
    made (more for labels that are laid over placeholders); the logits are not copied.

    Args:
        logits: What the head returned: (B, S, V); for an audio head of K codebooks (B, S, K*V), or (n, K*V) or (n, K, V) over the n
            audio positions of the batch.
        site: The head.
        facts: What the model's class and config say.
        micro: The micro-batch. While its ``output`` is None, labels that the model expands itself cannot be seen.
    """
    logits = logits.detach()
    if site.modality == "audio":
        return _align_audio(logits, max(site.codebooks, 1), facts, micro)
    return _align_text(logits, facts, micro)


def leaves_out_padding(facts: ModelFacts) -> bool:
    """Tell whether the model's own loss leaves out labels under padding, whatever they are."""
    return facts.model_type in _UNLEARNT_UNDER_PADDING


def _align_text(logits: Tensor, facts: ModelFacts, micro: MicroBatch) -> Aligned | NotAligned:
    inputs, pending = micro.inputs, micro.output is None
    ready = _find(inputs, (SHIFTED_LABELS,)) if facts.label_shift else None
    if ready is not None and ready[1].shape == logits.shape[:-1]:
        labels = _moved(ready[1], logits)
        return lay_shifted(labels, logits=logits, padding=_padding(labels, facts, inputs), how=f"already shifted ({SHIFTED_LABELS})")
    expanded = named_output(micro.output, EXPANDED_LABELS)
    found = [(EXPANDED_LABELS, expanded)] if _is_labels(expanded) else []
    found += [pair for pair in (_find(inputs, TEXT_LABELS),) if pair is not None]
    for name, labels in found:
        kept = kept_positions(labels, logits.shape[:-1], inputs, positions=-1)
        if kept is None:
            continue
        mask = named_output(micro.output, "attention_mask") if name == EXPANDED_LABELS else None
        labels = _moved(labels, logits)
        if leaves_out_padding(facts):
            labels = _without_padding(labels, inputs.get("attention_mask"))
        padding = _padding(labels, facts, inputs, mask=mask)
        how = f"{name}, " if name == EXPANDED_LABELS else ""
        return lay(labels, logits=logits, shift=facts.label_shift, kept=kept, padding=padding, how=how)
    if not found:
        reason = f"no labels among the inputs (looked for {', '.join((*TEXT_LABELS, SHIFTED_LABELS))})"
        return NotAligned(reason, later=pending, absent=True)
    return NotAligned(_mismatch(*found[0], logits, inputs), later=pending)


def _align_audio(logits: Tensor, codebooks: int, facts: ModelFacts, micro: MicroBatch) -> Aligned | NotAligned:
    inputs = micro.inputs
    found = _find(inputs, AUDIO_LABELS)
    if found is None:
        return NotAligned(f"no audio labels among the inputs (looked for {', '.join(AUDIO_LABELS)})", absent=True)
    name, labels = found
    labels, over_placeholders = _moved(labels, logits), False
    if labels.dim() == 2 and labels.shape[0] == codebooks and (name == "label_audio_ids" or labels.shape[1] != codebooks):
        columns = labels.transpose(0, 1)  # (K, n) -> (n, K)
        labels = columns if logits.shape[0] == columns.shape[0] else labels
    elif labels.dim() == 3 and (inputs.get("audio_input_ids_mask") is not None or labels.shape[:2] != logits.shape[:2]):
        laid = _over_placeholders(labels, facts.audio_placeholders, inputs)
        labels, over_placeholders = (labels, False) if laid is None else (laid, True)
    if codebooks == 1 and labels.shape == logits.shape[:-1] and labels.shape[-1:] != (1,):
        labels = labels.unsqueeze(-1)
    split = logits
    if logits.dim() == labels.dim():
        if logits.shape[-1] % codebooks:
            return NotAligned(f"logits of shape {tuple(logits.shape)} do not divide by {codebooks} codebooks")
        split = split_codebooks(logits, codebooks)
    kept = kept_positions(labels, split.shape[:-1], inputs, positions=-2) if labels.dim() > 1 else None
    if kept is None:
        return NotAligned(_mismatch(name, found[1], logits, inputs))
    how = "laid over the audio placeholders, " if over_placeholders else ""
    return lay(labels, logits=split, shift=facts.label_shift, kept=kept, how=how, positions=-2)


def _padding(labels: Tensor, facts: ModelFacts, inputs: Mapping[str, Any], *, mask: Any = None) -> Tensor | None:
    """Return (B, S) bool, True where a label belongs to padding, or ``None``; ``mask`` is the model's own if it expands the labels."""
    if mask is None:
        mask = inputs.get("decoder_attention_mask" if facts.encoder_decoder else "attention_mask")
    return padding_of(labels, mask, pad=facts.padding_token, ends_with_pad=facts.ends_with_padding)


def _over_placeholders(labels_BFK: Tensor, placeholders: Sequence[int], inputs: Mapping[str, Any]) -> Tensor | None:
    """Lay the labels of valid audio frames over the placeholder positions of ``input_ids``, in order: (B, F, K) -> (B, S, K).

    The k-th placeholder of the batch, in row-major order, receives the k-th valid frame; every other position -100. None without
    ``input_ids`` or without known placeholders.

    Source: ``HiggsAudioV2ForConditionalGeneration.forward``, ``expanded[audio_token_mask] = audio_labels[audio_input_ids_mask]``; here
    by counting, because a boolean index waits for the device.
    """
    ids = inputs.get("input_ids")
    if not isinstance(ids, Tensor) or not placeholders:
        return None
    ids_BS = ids.to(labels_BFK.device, non_blocking=True)
    slots = torch.zeros_like(ids_BS, dtype=torch.bool)
    for token in placeholders:
        slots |= ids_BS == token
    frames_NK = labels_BFK.reshape(-1, labels_BFK.shape[-1])
    frames, mask = frames_NK.shape[0], inputs.get("audio_input_ids_mask")
    if frames == 0:
        return labels_BFK.new_full((*ids_BS.shape, labels_BFK.shape[-1]), IGNORED)
    if isinstance(mask, Tensor):
        if mask.numel() != frames:
            return None
        valid = mask.to(labels_BFK.device, non_blocking=True).reshape(-1) != 0
    else:
        valid = torch.ones(frames, dtype=torch.bool, device=labels_BFK.device)
    # source[r] is the r-th valid frame; what is not valid is written to a place past the end.
    place = torch.where(valid, valid.cumsum(0) - 1, frames)
    source = place.new_zeros(frames + 1).scatter_(0, place, torch.arange(frames, device=place.device))
    rank = slots.reshape(-1).cumsum(0) - 1
    taken = slots.reshape(-1) & (rank < valid.sum())
    rows = frames_NK.index_select(0, source[:frames].gather(0, rank.clamp(0, frames - 1)))
    return torch.where(taken.unsqueeze(-1), rows, IGNORED).view(*ids_BS.shape, -1)


def _without_padding(labels: Tensor, mask: Any) -> Tensor:
    hidden = padding_of(labels, mask, pad=None, ends_with_pad=False)
    return labels if hidden is None else labels.masked_fill(hidden, IGNORED)


def _find(inputs: Mapping[str, Any], names: Sequence[str]) -> tuple[str, Tensor] | None:
    return next(((name, inputs[name]) for name in names if _is_labels(inputs.get(name))), None)


def _is_labels(value: Any) -> bool:
    return isinstance(value, Tensor) and not value.is_floating_point() and not value.is_complex() and value.dim() > 0


def _moved(labels: Tensor, logits: Tensor) -> Tensor:
    return labels.detach().to(logits.device, torch.int64, non_blocking=True)


def _mismatch(name: str, labels: Tensor, logits: Tensor, inputs: Mapping[str, Any]) -> str:
    reason = f"{name} of shape {tuple(labels.shape)} does not lie over logits of shape {tuple(logits.shape)}"
    asked = asked_to_keep(inputs)
    return reason if asked is None else f"{reason} ({asked[0]}={_said(asked[1])})"


def _said(value: Any) -> str:
    return f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)
