"""Labels against ids: each number against a plain loop over random ragged batches."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from probe.measure.label_checks import COLUMNS, Beside, check_labels, common_prefix

pytestmark = pytest.mark.pure  # of torch and probe alone: the same with every transformers

PAD, PLACEHOLDERS, VOCABULARY = 0, (7, 9), 14


def batch(seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return random ids, mask and labels (B, S), of few different ids so that everything occurs."""
    generator = torch.Generator().manual_seed(seed)
    shape = (int(torch.randint(1, 5, (1,), generator=generator)), int(torch.randint(1, 20, (1,), generator=generator)))
    ids = torch.randint(0, 16, shape, generator=generator)
    mask = (torch.rand(shape, generator=generator) < 0.8).long()
    labels = torch.randint(-1, 16, shape, generator=generator)
    labels = torch.where(torch.rand(shape, generator=generator) < 0.5, ids, labels)
    return ids, mask, labels.masked_fill(torch.rand(shape, generator=generator) < 0.3, -100)


def by_hand(ids: Tensor, mask: Tensor, labels: Tensor) -> dict[str, int]:
    found = dict.fromkeys(COLUMNS, 0)
    for row_ids, row_mask, row in zip(ids.tolist(), mask.tolist(), labels.tolist(), strict=True):
        for i, label in enumerate(row):
            if label == -100:
                continue
            found["labelled"] += 1
            found["compared"] += 1
            found["on_padding"] += row_mask[i] == 0
            found["padding_runs"] += i > 0 and label == PAD and row[i - 1] == PAD
            found["on_placeholders"] += row_ids[i] in PLACEHOLDERS
            found["outside_vocabulary"] += not 0 <= label < VOCABULARY
            found["same"] += row_ids[i] == label
            found["next"] += i + 1 < len(row) and row_ids[i + 1] == label
            found["previous"] += i > 0 and row_ids[i - 1] == label
    return found


def test_every_count_equals_a_plain_loop() -> None:
    """All nine counts equal those of a loop in Python, over fifty random batches in which each of them occurs."""
    total = dict.fromkeys(COLUMNS, 0)
    for seed in range(50):
        ids, mask, labels = batch(seed)
        beside = Beside(ids, mask, PLACEHOLDERS, PAD, VOCABULARY)
        found = dict(zip(COLUMNS, check_labels(labels, beside).tolist(), strict=True))
        assert found == by_hand(ids, mask, labels)
        total = {name: total[name] + int(found[name]) for name in COLUMNS}
    assert all(total.values()), total


def test_what_is_not_known_counts_nothing() -> None:
    """Without ids, mask, padding and vocabulary only the labelled positions are counted."""
    _, _, labels = batch(3)
    found = dict(zip(COLUMNS, check_labels(labels, Beside()).tolist(), strict=True))
    assert {name for name, value in found.items() if value} == {"labelled"}


def prefix_by_hand(labels: Tensor) -> int:
    rows = []
    for row in labels.tolist():
        first = next((i for i, label in enumerate(row) if label != -100), None)
        if first is not None:
            rows.append(row[first:] + [-100] * first)
    if len(rows) < 2 or all(row == rows[0] for row in rows):
        return -1
    length = 0
    while length < len(rows[0]) and rows[0][length] != -100 and all(row[length] == rows[0][length] for row in rows):
        length += 1
    return length


def test_common_prefix_equals_a_plain_loop() -> None:
    """The prefix equals that of a loop, over batches whose rows begin alike at different places, are empty, or all equal."""
    seen = set()
    for seed in range(300):
        generator = torch.Generator().manual_seed(seed)

        def number(low: int, high: int, generator: torch.Generator = generator) -> int:
            return int(torch.randint(low, high, (1,), generator=generator))

        width, shared = 12, number(0, 5)
        labels = torch.full((number(1, 5), width), -100)
        opening = torch.randint(0, 3, (shared,), generator=generator)
        for row in labels:
            start, tail = number(0, 4), number(0, 4)
            text = torch.cat([opening, torch.randint(0, 2, (tail,), generator=generator)])
            if number(0, 5):
                row[start : start + len(text)] = text
            if not number(0, 4):
                row[number(0, width)] = -100
        expected = prefix_by_hand(labels)
        assert int(common_prefix(labels)) == expected
        seen.add(expected)
    assert {-1, 0, 1, 2, 3, 4} <= seen


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ([[1, 2, -100, 5], [1, 2, -100, 6]], 2),  # ends at the first gap
        ([[-100, -100, 1], [1, 1, 2]], 1),  # a row that begins late is short
        ([[-100, 1, 2], [-100, -100, -100], [1, 3, -100]], 1),  # a row without labels does not count
    ],
)
def test_where_a_prefix_ends(rows: list[list[int]], expected: int) -> None:
    """A prefix ends at the first gap and at the end of the shortest row; rows without labels do not count."""
    assert int(common_prefix(torch.tensor(rows))) == expected == prefix_by_hand(torch.tensor(rows))


@pytest.mark.parametrize("shape", [(1, 5), (2, 0), (0, 3)])
def test_too_little_has_no_prefix(shape: tuple[int, int]) -> None:
    """One row, rows without positions, and no row at all say nothing."""
    assert int(common_prefix(torch.ones(shape, dtype=torch.long))) == -1
