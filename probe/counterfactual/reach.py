"""Which samples of a batch a change of its audio reached: those without audio, or without another's to take, are as they were.

No sync. Temporaries: of one clip at a time, a few bool masks of its size.

Shapes: B samples, C clips, R rows, T frames.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from probe.counterfactual.conditions import Condition
from probe.counterfactual.content import Content, content_of
from probe.sites.batch import samples_in
from probe.sites.facts import ModelFacts
from probe.sites.reference import AudioRoles


@torch.no_grad()
def reached_samples(
    inputs: Mapping[str, Any], replaced: Mapping[str, Tensor], conditions: Sequence[Condition], *, facts: ModelFacts, roles: AudioRoles
) -> Tensor | None:
    """Return which samples own a clip that is not as it was, (B,) bool; all of them where nothing tells whose a clip is.

    A sample that a change did not reach says nothing about it: of a batch that is partly text, the loss of the text would count as
    undisturbed.

    Args:
        inputs: What the model was given, by name.
        replaced: What :func:`~probe.counterfactual.interventions.intervene` made of some of it.
        conditions: Those that it changed.
        facts: Of the model.
        roles: What its audio may be.

    Returns:
        ``None`` if the content of an input cannot be told, which ``intervene`` would have said.
    """
    samples, found = samples_in(inputs), []
    for condition in conditions:
        content = content_of(condition, inputs, facts=facts, roles=roles)
        if isinstance(content, str):
            return None
        found.append(_reached(content, replaced[condition.name], samples))
    return torch.stack(found).any(0) if found else None


def _reached(content: Content, new: Tensor, samples: int) -> Tensor:
    number_C = torch.arange(content.count, device=new.device)
    changed: list[Tensor] = []
    for clip, new_RT in enumerate(content.clips(new.contiguous())):
        old_RT, valid_RT = content.clip(number_C[clip : clip + 1])
        differs_RT = new_RT != old_RT
        changed.append((differs_RT & valid_RT if content.joined else differs_RT).any())
    # Owners that nobody knows are numbered from B on: the places behind the samples take them.
    reached = torch.zeros(samples + content.count, dtype=torch.int32, device=new.device)
    reached.scatter_reduce_(0, content.owner_C, torch.stack(changed).to(torch.int32), "amax")
    return (reached[:samples] != 0) | (content.owner_C >= samples).any()
