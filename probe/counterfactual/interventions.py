"""What is done to the audio of a batch: another sample's in its place, silence, reversed in time. Inputs in, new inputs out.

Nothing here waits for the device, draws a random number or changes an input. Memory: one new tensor of the size of each condition, and
for one clip at a time some six tensors of its size.

Shapes: C clips, R rows (mel bins, codebooks, 1 for a waveform), T frames (or samples).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from probe.counterfactual.conditions import Condition
from probe.counterfactual.content import Content, content_of
from probe.measure.rows import hash_positions
from probe.records import Intervention
from probe.sites.batch import samples_in
from probe.sites.facts import ModelFacts
from probe.sites.reference import AudioRoles

WHISPER_SILENCE = -1.5
"""Whisper's extractor on zeros: (max(log10(1e-10), max - 8) + 4) / 4, the maximum being log10(1e-10) = -10 as well."""
WHISPER_SPAN = 2.0
"""No value of a clip is further below its maximum: the 8 of the same formula, divided by 4."""
_SILENCE = {"voxtral_realtime": -0.625}  # the maximum is fixed at 1.5 (``global_log_mel_max``), so the floor is (1.5 - 8 + 4) / 4
_SLACK = 0.02  # bfloat16 has steps of 1/128 from 1 to 2, so both ends of the span together may be off by that


@torch.no_grad()
def intervene(
    what: Intervention, inputs: Mapping[str, Any], conditions: Sequence[Condition], *, facts: ModelFacts, roles: AudioRoles
) -> dict[str, Tensor] | str:
    """Return the conditions changed, by name, or the reason why this change is not defined here.

    swap: each clip gets the content of the next clip that belongs to another sample and differs from it (cyclically), cut or repeated to
    the receiver's own length where a mask says what is valid (codes: always), because placeholders must equal frames; masks, padding,
    targets and the codes that begin and end a stream stay. Without a mask the model takes all frames alike, and the clip comes whole.
    A clip for which no such donor is in the batch stays as it is: which ones these are, only the device knows.

    silence: what the feature extractor gives for it, in every frame. For log-mel features -1.5, which Whisper's gives; where a batch
    leaves the range of Whisper's features (below -1.5, or more than 2 below its maximum), each clip's own smallest value, zeros apart
    (SpecAugment writes them). For a waveform 0. Not defined for codes: no model's config names a code of silence.

    reverse: reversed in time within the content, padding left where it is.

    Args:
        what: The change.
        inputs: What the model was given, by name.
        conditions: What :func:`~probe.counterfactual.conditions.find_conditions` found among them.
        facts: Of the model.
        roles: What its audio may be.

    Returns:
        New tensors of the same shapes, dtypes and devices.
    """
    if not conditions:
        return "nothing conditions the model"
    if what == "silence":
        return _silenced(inputs, conditions, facts)
    contents: dict[str, Content] = {}
    for condition in conditions:
        refused = _refusal(what, condition, inputs)
        found = refused or content_of(condition, inputs, facts=facts, roles=roles, sounding=what == "reverse")
        if isinstance(found, str):
            return found
        contents[condition.name] = found
    if what == "reverse":
        return {name: _changed(content, None) for name, content in contents.items()}
    donors = _donors(tuple(contents.values()))
    return {name: _changed(content, donor_C) for (name, content), donor_C in zip(contents.items(), donors, strict=True)}


def _refusal(what: Intervention, condition: Condition, inputs: Mapping[str, Any]) -> str:
    """Return why the shapes alone forbid a change, "" if they do not."""
    tensor = inputs[condition.name]
    if what == "reverse" and condition.kind == "features" and tensor.dim() == 2:
        return f"{condition.name!r}, {tuple(tensor.shape)}, has no dimension of time"
    if what == "swap" and samples_in(inputs) < 2:
        return "the batch holds one sample: there is no other sample's audio"
    if what == "swap" and condition.kind != "codes" and tensor.shape[0] < 2:
        return f"{condition.name!r} holds one clip: there is no other sample's audio"
    return ""


def _silenced(inputs: Mapping[str, Any], conditions: Sequence[Condition], facts: ModelFacts) -> dict[str, Tensor] | str:
    silenced: dict[str, Tensor] = {}
    for condition in conditions:
        tensor = inputs[condition.name]
        if condition.kind == "codes":
            return f"the model has no silence code (for {condition.name!r})"
        if condition.kind == "waveform":
            silenced[condition.name] = torch.zeros_like(tensor)
        elif tensor.dim() < 3:
            return f"nobody says what {condition.name!r}, {tuple(tensor.shape)}, is for silence"
        else:
            silenced[condition.name] = _silent_features(tensor, facts)
    return silenced


def _silent_features(features: Tensor, facts: ModelFacts) -> Tensor:
    new = torch.empty_like(features)
    if facts.model_type in _SILENCE:
        return new.fill_(_SILENCE[facts.model_type])
    lows: list[Tensor] = []
    spans: list[Tensor] = []
    for clip in features:
        counts = clip.isfinite() & (clip != 0)
        lows.append(torch.where(counts, clip, torch.inf).amin().float())
        spans.append(torch.where(counts, clip, -torch.inf).amax().float() - lows[-1])
    low_C, span_C = torch.stack(lows), torch.stack(spans)
    of_whisper = (low_C >= WHISPER_SILENCE - _SLACK).all() & (span_C <= WHISPER_SPAN + _SLACK).all()
    own_C = torch.where(low_C.isinf(), 0.0, low_C)  # nothing but zeros: silent already
    silence_C = torch.where(of_whisper, WHISPER_SILENCE, own_C).to(features.dtype)
    return new.copy_(silence_C.view(-1, *[1] * (features.dim() - 1)).expand_as(features))


def _changed(content: Content, donor_C: Tensor | None) -> Tensor:
    """Return the input with the content of each clip replaced by its donor's, or without donors by its own from the end to the start."""
    new = content.tensor.clone(memory_format=torch.contiguous_format)
    target_CRT = content.clips(new)
    number_C = torch.arange(content.count, device=new.device)
    for clip in range(content.count):
        own = number_C[clip : clip + 1]
        _, valid_RT = content.clip(own)
        rank_RT = (valid_RT.cumsum(-1) - 1).clamp(min=0)
        theirs_RT, there_RT = content.clip(own if donor_C is None else donor_C[clip : clip + 1])
        length_R1 = there_RT.sum(-1, keepdim=True).clamp(min=1)
        wanted_RT = length_R1 - 1 - rank_RT if donor_C is None else rank_RT % length_R1
        # The places of the content, in order: what is not content goes to the end, and is never asked for.
        place_RT = there_RT.logical_not().to(torch.uint8).argsort(dim=-1, stable=True).gather(-1, wanted_RT)
        picked_RT = theirs_RT.gather(-1, place_RT.expand_as(theirs_RT))
        target_CRT[clip].copy_(torch.where(valid_RT, picked_RT, target_CRT[clip]))
    return new


def _donors(contents: Sequence[Content]) -> list[Tensor]:
    """Return for each input the clip that each clip takes its content from, int64 (C,); its own number where no other will do.

    Inputs with equally many clips are one audio in several forms: they take from the same donors, which differ in one of them at least.
    """
    if any(content.count != contents[0].count for content in contents):
        return [_donors((content,))[0] for content in contents]
    count, device = contents[0].count, contents[0].tensor.device
    prints = [_fingerprints(content) for content in contents]
    differ_CC = torch.zeros(count, count, dtype=torch.bool, device=device)
    empty_C = torch.zeros(count, dtype=torch.bool, device=device)
    for print_C, held_C in prints:
        differ_CC |= print_C[:, None] != print_C[None, :]
        empty_C |= held_C == 0
    owner_C = contents[0].owner_C
    number_C = torch.arange(count, device=device)
    ahead_CC = (number_C[None, :] - number_C[:, None]) % count
    usable_CC = differ_CC & (owner_C[:, None] != owner_C[None, :]) & ~empty_C[None, :]
    # Itself stands behind every donor, in front of what is none.
    order_CC = torch.where(usable_CC, ahead_CC, torch.where(ahead_CC == 0, count, count + 1))
    return [order_CC.argmin(1)] * len(contents)


def _fingerprints(content: Content) -> tuple[Tensor, Tensor]:
    """Return a number made of each clip's content, float64 (C,), and how much content it has, int64 (C,).

    Equal content has equal numbers; different content has different ones but for a chance of 2^-30 or so.
    """
    device = content.tensor.device
    rows, frames = content.clips(content.tensor).shape[1:]
    weight_R1 = hash_positions(1, rows, 1, device).view(-1, 1).double() / 2**32 + 0.5
    weight_T = hash_positions(1, frames, 2, device).view(-1).double() / 2**32 + 0.5
    number_C = torch.arange(content.count, device=device)
    prints: list[Tensor] = []
    held: list[Tensor] = []
    for clip in range(content.count):
        values_RT, valid_RT = content.clip(number_C[clip : clip + 1])
        weights_RT = weight_T[(valid_RT.cumsum(-1) - 1).clamp(min=0)]
        weighed_RT = torch.where(valid_RT, values_RT, 0).double().mul_(weights_RT).mul_(weight_R1)
        prints.append(weighed_RT.sum())
        held.append(valid_RT.sum())
    return torch.stack(prints), torch.stack(held)
