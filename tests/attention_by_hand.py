"""Attention given as it is, in blocks of any size, and the definitions of all that is said of it worked out row by row in plain Python."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from probe.measure.blocks import RowBlock
from probe.measure.quantities import QUANTITIES
from probe.measure.rows import RowChoice
from probe.sites.modality import AUDIO, PADDING, REFERENCE, TEXT

B, H, S, K = 3, 4, 12, 10


@dataclass
class Given:
    """A source of given probabilities (B, H, S, K or K + 1) and visible keys (B, S, K), in blocks of a given size."""

    p_BHSK: Tensor
    visible_BSK: Tensor
    sinks: int = 0
    steps: tuple[int, int, int] = (100, 100, 100)
    how: str = "given"
    view: None = None

    @property
    def device(self) -> torch.device:
        return self.p_BHSK.device

    @property
    def shape(self) -> tuple[int, int, int, int]:
        samples, heads, queries, columns = self.p_BHSK.shape
        return samples, heads, queries, columns - self.sinks

    def visible(self, index_BR: Tensor) -> Tensor:
        return self.visible_BSK.gather(1, index_BR[..., None].expand(-1, -1, self.shape[3]))

    def masks(self, index_BR: Tensor) -> None:
        return None

    def blocks(self, index_BR: Tensor, masks: None = None) -> Iterator[RowBlock]:
        p = self.p_BHSK.gather(2, index_BR[:, None, :, None].expand(-1, self.shape[1], -1, self.p_BHSK.shape[3]))
        starts = (range(0, size, step) for size, step in zip(p.shape[:3], self.steps))
        for start in itertools.product(*starts):
            where = tuple(slice(at, at + step) for at, step in zip(start, self.steps))
            yield RowBlock(*where, p[where].clone())


def random_modality(length: int, seed: int, samples: int = B) -> Tensor:
    return torch.randint(0, 4, (samples, length), generator=torch.Generator().manual_seed(seed)).to(torch.int8)


def random_source(seed: int, *, queries: int = S, keys: int = K, sinks: int = 0, hidden: float = 0.4) -> Given:
    """Random attention in which each row sees a random set of keys, some rows one key or none."""
    generator = torch.Generator().manual_seed(seed)
    visible = torch.rand(B, queries, keys, generator=generator) > hidden
    visible[0, 0], visible[1, 0] = False, torch.arange(keys) == 4
    p = torch.rand(B, H, queries, keys + sinks, generator=generator) ** 3
    p[..., :keys] *= visible[:, None]
    p[..., keys:] *= visible.any(-1)[:, None, :, None]
    steps = [(100, 100, 100), (1, 3, 2), (2, 1, 5), (1, 4, 1)][seed % 4]
    return Given(p / p.sum(-1, keepdim=True).clamp(min=1e-9), visible, sinks, steps)


def by_hand(source: Given, choice: RowChoice, query_BS: Tensor | None, key_BK: Tensor | None, self_attention: bool) -> dict[str, Any]:
    """The definitions, one row and one head at a time, in Python floats: quantity -> (numerators of the heads, weight)."""
    samples, heads, queries, keys = source.shape
    given, seen = source.p_BHSK.tolist(), source.visible_BSK.tolist()
    query, key = (None if codes is None else codes.tolist() for codes in (query_BS, key_BK))
    found: dict[str, Any] = {name: ([0.0] * heads, 0.0) for name in QUANTITIES}
    sampled = 0

    def add(name: str, values: list[float], weight: float) -> None:
        sums, total = found[name]
        found[name] = ([old + weight * new for old, new in zip(sums, values)], total + weight)

    for b in range(samples):
        rows = [int(row) for row in choice.index_BR[b]]
        sees = {row: [k for k in range(keys) if seen[b][row][k]] for row in rows}
        real = [k for k in range(keys) if (any(k in sees[row] for row in rows) if key is None else key[b][k] != PADDING)]
        first = min(real, default=0)
        real_keys = [k for k in range(keys) if key is None or key[b][k] != PADDING]
        real_rows = [s for s in range(queries) if query is None or query[b][s] != PADDING]
        text_rows: list[tuple[int, float]] = []
        for row, weight in zip(rows, choice.weight_BR[b].tolist()):
            code = None if query is None else query[b][row]
            if weight == 0 or not sees[row] or code == PADDING:
                continue
            sampled += 1
            p_HK = [given[b][h][row] for h in range(heads)]
            entropies = [-sum(p * math.log(p) for p in p_K if p > 0) for p_K in p_HK]
            add("entropy_nats", entropies, weight)
            outcomes = len(sees[row]) + source.sinks
            if outcomes >= 2:
                add("entropy", [value / math.log(outcomes) for value in entropies], weight)
            add("effective_keys", [1 / sum(p * p for p in p_K) for p_K in p_HK], weight)
            add("top", [max(p_K[:keys]) for p_K in p_HK], weight)
            if source.sinks:
                add("sink", [p_K[keys] for p_K in p_HK], weight)
            if self_attention:
                away = [abs(k - (row + keys - queries)) for k in range(keys)]
                near = [k for k in range(keys) if away[k] <= 4]
                add("distance", [sum(p_K[k] * away[k] for k in range(keys)) for p_K in p_HK], weight)
            else:
                own = (real_rows.index(row) + 0.5) / len(real_rows)
                near = [k for n, k in enumerate(real_keys) if abs((n + 0.5) / len(real_keys) - own) <= 0.1 + 1e-6]
            add("band", [sum(p_K[k] for k in near) for p_K in p_HK], weight)
            add("first_token", [p_K[first] for p_K in p_HK], weight)
            if key is None:
                continue
            add("padding", [sum(p_K[k] for k in range(keys) if key[b][k] == PADDING) for p_K in p_HK], weight)
            of = {TEXT: "text", AUDIO: "audio", REFERENCE: "audio"}.get(-1 if code is None else code)
            for to, codes in (("text", (TEXT,)), ("audio", (AUDIO, REFERENCE)), ("reference", (REFERENCE,))):
                if of is None or not any(key[b][k] in codes for k in sees[row]) or (code == REFERENCE and to == "reference"):
                    continue
                add(f"{of}_to_{to}", [sum(p_K[k] for k in range(keys) if key[b][k] in codes) for p_K in p_HK], weight)
                if (of, to) == ("text", "audio"):
                    text_rows.append((row, weight))
        walk(given[b], None if key is None else key[b], text_rows, sees, add)
    return {"sampled": sampled, **found}


def walk(p_HSK: list[Any], key: list[int] | None, text_rows: list[tuple[int, float]], sees: dict[int, list[int]], add: Any) -> None:
    """Kendall's tau and coverage of one sample, by their definitions."""
    if key is None or not text_rows:
        return
    total = sum(weight for _, weight in text_rows)
    audio = [k for k, code in enumerate(key) if code >= AUDIO]
    taus, covered = [], []
    for p_SK in p_HSK:
        centres = {}
        for row, _ in text_rows:
            mass = sum(p_SK[row][k] for k in audio)
            centres[row] = sum(k * p_SK[row][k] for k in audio) / mass if mass else None
        agree, pairs = 0, 0
        for (i, _), (j, _) in itertools.combinations(text_rows, 2):
            pairs += 1
            if centres[i] is not None and centres[j] is not None and abs(centres[i] - centres[j]) >= 1e-3:
                agree += 1 if (i < j) == (centres[i] < centres[j]) else -1
        taus.append(agree / max(pairs, 1))
        mean = [sum(weight * p_SK[row][k] for row, weight in text_rows) for k in audio]
        shares = [value / sum(mean) for value in mean if value > 0]
        visible = {k for row, _ in text_rows for k in sees[row]} & set(audio)
        covered.append(math.exp(-sum(p * math.log(p) for p in shares)) / len(visible))
    if len(text_rows) > 1:
        add("monotonicity", taus, total)
    add("coverage", covered, total)
