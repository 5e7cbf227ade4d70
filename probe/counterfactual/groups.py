"""Groups of samples: which language a token names, and one table of effects by group, pooled over records (cross-lingual adaptation)."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from probe.records import Modality, SampleEffect, StepRecord

_LANGUAGE = re.compile(r"<\|([a-z]{2,3})\|>")


@dataclass(frozen=True, slots=True)
class GroupRow:
    """The samples of one group and modality over several records.

    ``loss`` and the ``delta_loss_…`` are nats per labelled token, over all tokens of the samples that have the number; ``win_rate`` is
    the share of the samples with a swap whose own loss is lower (a tie counts half). ``None``: no sample has it.
    """

    group: str
    modality: Modality
    samples: int
    tokens: int
    loss: float | None = None
    delta_loss_swap: float | None = None
    delta_loss_silence: float | None = None
    delta_loss_reverse: float | None = None
    win_rate: float | None = None


def by_group(records: Iterable[StepRecord]) -> tuple[GroupRow, ...]:
    """Pool this rank's samples of all counterfactual passes in ``records`` by modality and group, groups in order of their name.

    Samples without a group are the group ""; a table with no other row says nothing about groups.
    """
    pools: dict[tuple[Modality, str], list[SampleEffect]] = {}
    for record in records:
        for sample in record.counterfactual.samples if record.counterfactual is not None else ():
            pools.setdefault((sample.modality, sample.group), []).append(sample)
    return tuple(_row(group, modality, pool) for (modality, group), pool in sorted(pools.items()))


def language_tokens(model: Any, processors: Sequence[Any]) -> Mapping[int, str]:
    """Return the language that each language token names ("en"), by id; empty if the model has none.

    From the generation config's ``lang_to_id``, as multilingual Whisper models have it, else from the tokens of the form ``<|xx|>``, of
    two or three letters, among those that were added to the first tokenizer.
    """
    named = getattr(getattr(model, "generation_config", None), "lang_to_id", None)
    found: dict[str, Any] = dict(named) if isinstance(named, Mapping) else {}
    added = (getattr(getattr(processor, "tokenizer", processor), "get_added_vocab", None) for processor in processors)
    first = next((vocabulary for vocabulary in added if callable(vocabulary)), None) if not found else None
    found = {token: number for token, number in first().items() if _LANGUAGE.fullmatch(token)} if first is not None else found
    return {number: token.strip("<|>") for token, number in found.items() if isinstance(number, int)}


def _row(group: str, modality: Modality, pool: Sequence[SampleEffect]) -> GroupRow:
    deltas = [delta for delta in _deltas(pool, "swap") if delta is not None]
    wins = sum(1.0 if delta > 0 else 0.5 if delta == 0 else 0.0 for delta in deltas)
    return GroupRow(
        group=group,
        modality=modality,
        samples=len(pool),
        tokens=sum(sample.tokens for sample in pool),
        loss=_mean(pool, [sample.loss for sample in pool]),
        delta_loss_swap=_mean(pool, _deltas(pool, "swap")),
        delta_loss_silence=_mean(pool, _deltas(pool, "silence")),
        delta_loss_reverse=_mean(pool, _deltas(pool, "reverse")),
        win_rate=wins / len(deltas) if deltas else None,
    )


def _deltas(pool: Sequence[SampleEffect], what: str) -> list[float | None]:
    changed: list[float | None] = [getattr(sample, what) for sample in pool]
    return [None if value is None or sample.loss is None else value - sample.loss for sample, value in zip(pool, changed, strict=True)]


def _mean(pool: Sequence[SampleEffect], values: Sequence[float | None]) -> float | None:
    """Return the mean of the values there are, each weighted with its sample's tokens."""
    weighed = [(value, sample.tokens) for sample, value in zip(pool, values, strict=True) if value is not None]
    tokens = sum(weight for _, weight in weighed)
    return sum(value * weight for value, weight in weighed) / tokens if tokens else None
