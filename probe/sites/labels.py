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

if TYPE_CHECKING:
    from probe.sites.facts import ModelFacts

IGNORED = -100
TEXT_LABELS = ("labels", "label_ids")
AUDIO_LABELS = ("audio_labels", "label_audio_ids")
EXPANDED_LABELS = "expanded_labels"
SHIFTED_LABELS = "shift_labels"
LOGITS_TO_KEEP = ("logits_to_keep", "num_logits_to_keep")

# Model types whose own loss leaves out labels under padding, whatever they are (Qwen2AudioForConditionalGeneration.forward).
_UNLEARNT_UNDER_PADDING = frozenset({"qwen2_audio"})


@dataclass(frozen=True, slots=True)
class Aligned:
    """Labels that lie over logits, one for each row.

    Attributes:
        labels: int64 on the logits' device, (..., ) or (..., K) for an audio head; -100 where nothing is to be predicted.
        logits: A view of the head's logits, (..., V) or (..., K, V) for an audio head with K codebooks, without the positions that
            predict nothing. It keeps the whole of the logits alive.
        how: How they were laid over each other, for the record ("shifted by one", "not shifted", ...).
    """

    labels: Tensor
    logits: Tensor
    how: str


@dataclass(frozen=True, slots=True)
class NotAligned:
    """Why there are no labels for a head. ``later``: the root's output may still bring labels; ask again when it has returned."""

    reason: str
    later: bool = False


def align(logits: Tensor, *, site: Site, facts: ModelFacts, micro: MicroBatch) -> Aligned | NotAligned:
    """Find the labels of a head and lay them over its logits as the model's own loss does.

    The shift is a property of the model (``facts.label_shift``), never chosen by what fits: a fit would hide labels that are shifted
    twice. No sync; labels on another device are moved without waiting. Memory: a few int64 tensors of the labels' size.

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


def _align_text(logits: Tensor, facts: ModelFacts, micro: MicroBatch) -> Aligned | NotAligned:
    inputs, pending = micro.inputs, micro.output is None
    ready = _find(inputs, (SHIFTED_LABELS,)) if facts.label_shift else None
    if ready is not None and ready[1].shape == logits.shape[:-1]:
        return Aligned(_moved(ready[1], logits), logits, f"already shifted ({SHIFTED_LABELS})")
    expanded = named_output(micro.output, EXPANDED_LABELS)
    found = [(EXPANDED_LABELS, expanded)] if _is_labels(expanded) else []
    found += [pair for pair in (_find(inputs, TEXT_LABELS),) if pair is not None]
    for name, labels in found:
        kept = _kept(labels, logits, inputs, positions=-1)
        if kept is None:
            continue
        how = f"{name}, " if name == EXPANDED_LABELS else ""
        if kept is not labels:
            how += f"the last {kept.shape[-1]}, "
        elif facts.model_type in _UNLEARNT_UNDER_PADDING:
            kept = _without_padding(labels, inputs.get("attention_mask"))
        return _shifted(_moved(kept, logits), logits, facts.label_shift, how)
    if not found:
        return NotAligned(f"no labels among the inputs (looked for {', '.join((*TEXT_LABELS, SHIFTED_LABELS))})", later=pending)
    return NotAligned(_mismatch(*found[0], logits, inputs), later=pending)


def _align_audio(logits: Tensor, codebooks: int, facts: ModelFacts, micro: MicroBatch) -> Aligned | NotAligned:
    inputs = micro.inputs
    found = _find(inputs, AUDIO_LABELS)
    if found is None:
        return NotAligned(f"no audio labels among the inputs (looked for {', '.join(AUDIO_LABELS)})")
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
    kept = _kept(labels, split, inputs, positions=-2) if labels.dim() > 1 else None
    if kept is None:
        return NotAligned(_mismatch(name, found[1], logits, inputs))
    how = "laid over the audio placeholders, " if over_placeholders else ""
    how += "" if kept is labels else f"the last {kept.shape[-2]}, "
    return _shifted(kept, split, facts.label_shift, how, positions=-2)


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


def _kept(labels: Tensor, logits: Tensor, inputs: Mapping[str, Any], *, positions: int) -> Tensor | None:
    """Return the labels of the positions that the logits kept, or None if they do not lie over each other.

    ``positions`` is the dimension of the labels that counts positions. With ``logits_to_keep=n`` the logits are of the last n.
    """
    shape = logits.shape[:-1]
    if labels.shape == shape:
        return labels
    if len(shape) != labels.dim():
        return None
    keep, total = shape[positions], labels.shape[positions]
    asked = next((inputs[name] for name in LOGITS_TO_KEEP if name in inputs), None)
    if not isinstance(asked, int) or asked != keep or keep > total:
        return None
    last = labels.narrow(positions, total - keep, keep)
    return last if last.shape == shape else None


def _shifted(labels: Tensor, logits: Tensor, shift: int, how: str, *, positions: int = -1) -> Aligned:
    """Lay the logits of each position over the label ``shift`` positions later."""
    if not shift:
        return Aligned(labels, logits, f"{how}not shifted")
    total = labels.shape[positions]
    rest = max(total - shift, 0)
    later = labels.narrow(positions, total - rest, rest)
    return Aligned(later, logits.narrow(positions - 1, 0, rest), f"{how}shifted by {'one' if shift == 1 else shift}")


def _without_padding(labels: Tensor, mask: Any) -> Tensor:
    if not isinstance(mask, Tensor) or mask.shape != labels.shape:
        return labels
    return torch.where(mask.to(labels.device, non_blocking=True) != 0, labels, IGNORED)


def _find(inputs: Mapping[str, Any], names: Sequence[str]) -> tuple[str, Tensor] | None:
    return next(((name, inputs[name]) for name in names if _is_labels(inputs.get(name))), None)


def _is_labels(value: Any) -> bool:
    return isinstance(value, Tensor) and not value.is_floating_point() and not value.is_complex() and value.dim() > 0


def _moved(labels: Tensor, logits: Tensor) -> Tensor:
    return labels.detach().to(logits.device, torch.int64, non_blocking=True)


def _mismatch(name: str, labels: Tensor, logits: Tensor, inputs: Mapping[str, Any]) -> str:
    reason = f"{name} of shape {tuple(labels.shape)} does not lie over logits of shape {tuple(logits.shape)}"
    asked = next((f"{keep}={_said(inputs[keep])}" for keep in LOGITS_TO_KEEP if keep in inputs), "")
    return f"{reason} ({asked})" if asked else reason


def _said(value: Any) -> str:
    return f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)
