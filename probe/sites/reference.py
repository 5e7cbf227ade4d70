"""Reference against target: of a model that predicts audio, which audio it is only given (a reference voice, a prompt).

Told by runs: a *run* is a stretch of consecutive audio positions of one sample. A run of which not one position is labelled with audio
is given to the model and not learnt; a run with a labelled position is a target (the first frames of a target often have no label).

No function waits for the device. Temporaries: a few int64 tensors of the size of the tokens or of the audio frames.

Shapes: B batch, S tokens, F audio frames of a sample, N of all samples, K codebooks.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from probe.records import Site
from probe.sites.labels import AUDIO_LABELS, TEXT_LABELS

if TYPE_CHECKING:
    from probe.sites.facts import ModelFacts

_IGNORED_LABEL = -100
_JOINED_LABELS = "label_audio_ids"
_FRAMES_MASK = "audio_input_ids_mask"
_GIVEN_TOKENS = ("audio_in_token_idx", "audio_prompt_token_id")
_PREDICTED_TOKENS = ("audio_out_token_idx", "audio_latent_token_id")


@dataclass(frozen=True, slots=True)
class AudioRoles:
    """What a model's audio may be, as far as that does not depend on the data.

    Attributes:
        predicts: The model predicts audio. Else all its audio is input, and none of it is called reference.
        given: Ids whose placeholders stand for given audio by definition.
        labels: Names under which labels of audio come, the first that is there counts.
        codebooks: Codebooks of discrete audio, at least 1.
    """

    predicts: bool
    given: frozenset[int] = frozenset()
    labels: tuple[str, ...] = AUDIO_LABELS
    codebooks: int = 1


INPUT_ONLY = AudioRoles(predicts=False)
"""The roles of a model that predicts no audio."""


def audio_roles(facts: ModelFacts, sites: Iterable[Site]) -> AudioRoles:
    """Read the roles off the model's facts and its heads.

    Where the only heads are audio heads, the plain ``labels`` are labels of audio, too (CSM).
    """
    heads = {site.modality for site in sites if site.role == "lm_head"}
    predicts = facts.codebooks > 0 or "audio" in heads or any(name in _PREDICTED_TOKENS for name, _ in facts.audio_tokens)
    return AudioRoles(
        predicts=predicts,
        given=frozenset(token for name, token in facts.audio_tokens if stands_for_given(name)),
        labels=(*AUDIO_LABELS, *TEXT_LABELS) if heads == {"audio"} else AUDIO_LABELS,
        codebooks=max(facts.codebooks, 1),
    )


def stands_for_given(token: str) -> bool:
    """Tell whether the config's name of an audio token says that it stands for audio that is given to the model."""
    return token in _GIVEN_TOKENS


def labels_of_audio(inputs: Mapping[str, Any], roles: AudioRoles) -> tuple[str, Tensor] | None:
    """Return name and tensor of the labels of audio among the inputs, ``None`` if there are none."""
    for name in roles.labels:
        value = inputs.get(name)
        if isinstance(value, Tensor) and value.dim() > 1 and not value.is_floating_point() and not value.is_complex():
            return name, value
    return None


def unlabelled_runs(audio_BS: Tensor, inputs: Mapping[str, Any], roles: AudioRoles) -> Tensor | None:
    """Return which positions lie in a run of audio without any label, (B, S) bool.

    Args:
        audio_BS: Where audio stands that may be predicted, bool.
        inputs: What the model was given, labels among it.
        roles: The names of the labels, and how many codebooks they are of.

    Returns:
        ``None`` if no labels are among the inputs, or if they cannot be laid over the positions.
    """
    labelled_BS = labelled_positions(audio_BS, inputs, roles)
    return None if labelled_BS is None else runs_without(audio_BS, labelled_BS)


def labelled_positions(audio_BS: Tensor, inputs: Mapping[str, Any], roles: AudioRoles) -> Tensor | None:
    """Return which positions have a label in at least one codebook, (B, S) bool; ``None`` if the labels do not tell.

    Labels come as (K, N), one column a predicted frame of the batch; as (B, F, K), or (B, F) of a single codebook, in the order of the
    audio positions, with a mask of which frames are real; or over the tokens: (B, S) or (B, S, K).
    """
    found = labels_of_audio(inputs, roles)
    if found is None:
        return None
    name, labels = found
    real = labels.detach().to(audio_BS.device, non_blocking=True) != _IGNORED_LABEL
    shape, over_tokens = tuple(real.shape), tuple(real.shape[:2]) == tuple(audio_BS.shape)
    mask = inputs.get(_FRAMES_MASK)
    if name == _JOINED_LABELS and real.dim() == 2 and shape[0] == roles.codebooks:
        return laid_over(audio_BS, real.any(0))
    if over_tokens and not (isinstance(mask, Tensor) and real.dim() == 3):
        return audio_BS & (real if real.dim() == 2 else real.flatten(2).any(-1))
    if real.dim() > 3 or name in TEXT_LABELS:
        return None
    if real.dim() == 2 and roles.codebooks > 1:
        return laid_over(audio_BS, real.any(0)) if shape[0] == roles.codebooks else None
    frames_N = (real.any(-1) if real.dim() == 3 else real).reshape(-1)
    if not isinstance(mask, Tensor):
        # Of several samples, nobody can say which frames only fill up the shorter ones.
        return laid_over(audio_BS, frames_N) if shape[0] == 1 else None
    if mask.numel() != frames_N.numel():
        return None
    return laid_over(audio_BS, frames_N, mask.detach().to(audio_BS.device, non_blocking=True).reshape(-1) != 0)


def laid_over(slots_BS: Tensor, values_N: Tensor, valid_N: Tensor | None = None) -> Tensor:
    """Lay values over slots in order: the k-th slot of the batch, row by row, receives the k-th valid value; all else is false.

    Args:
        slots_BS: Where values go, bool.
        values_N: What is laid, bool.
        valid_N: Which values count, bool; all if ``None``.

    Source: ``HiggsAudioV2ForConditionalGeneration.forward``, ``expanded[audio_token_mask] = audio_labels[audio_input_ids_mask]``; here
    by counting, because a boolean index waits for the device.
    """
    count = values_N.shape[0]
    if count == 0 or slots_BS.numel() == 0:
        return torch.zeros_like(slots_BS)
    slots_N = slots_BS.reshape(-1)
    rank = slots_N.cumsum(0) - 1
    if valid_N is not None:
        # Valid values move to the front, false follows; what is not valid is written to a place past the end.
        place = torch.where(valid_N, valid_N.cumsum(0) - 1, count)
        values_N = values_N.new_zeros(count + 1).scatter_(0, place, values_N)[:count]
    return (slots_N & (rank < count) & values_N.gather(0, rank.clamp(0, count - 1))).view(slots_BS.shape)


def runs_without(audio_BS: Tensor, marked_BS: Tensor) -> Tensor:
    """Return which positions lie in a run of ``audio_BS`` (bool) that holds no position of ``marked_BS`` (bool), (B, S) bool.

    Runs are numbered by the count of their starts, and a run's mark is the largest of its positions'.
    """
    before_BS = torch.zeros_like(audio_BS)
    before_BS[:, 1:] = audio_BS[:, :-1]
    run_N = (audio_BS & ~before_BS).reshape(-1).cumsum(0)
    marks = torch.zeros(run_N.shape[0] + 1, dtype=torch.int32, device=audio_BS.device)
    marks.scatter_reduce_(0, run_N, (audio_BS & marked_BS).reshape(-1).to(torch.int32), "amax")
    return audio_BS & (marks.gather(0, run_N) == 0).view(audio_BS.shape)
