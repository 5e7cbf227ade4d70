"""Reference against target: samples are compared and matched as a plain loop over their segments does it."""

from __future__ import annotations

import random

import pytest
import torch

from probe.measure.code_agreement import CodeFrames, reference_agreement

pytestmark = pytest.mark.pure  # of torch and probe alone: the same with every transformers

BOOKS = 3
Segment = tuple[list[list[int]], bool]  # frames of BOOKS codes, and whether they are learnt


def frames_of(samples: list[list[Segment]], *, fill: int = 0) -> CodeFrames:
    """Lay the segments of all samples side by side, with ``fill`` frames that are none behind each sample."""
    codes, segments, owners, labelled, valid, number = [], [], [], [], [], 0
    for sample, parts in enumerate(samples):
        for frames, learnt in parts:
            for index, frame in enumerate(frames):
                codes.append(frame)
                segments.append(number)
                owners.append(sample)
                labelled.append(learnt and index > 0)  # the first frame of a target often has no label
                valid.append(True)
            number += bool(frames)
        for _ in range(fill):
            codes.append([99] * BOOKS)
            segments.append(0)
            owners.append(sample)
            labelled.append(True)
            valid.append(False)
    return CodeFrames(
        torch.tensor(codes, dtype=torch.long).view(-1, BOOKS),
        torch.tensor(segments, dtype=torch.long),
        torch.tensor(owners, dtype=torch.long),
        torch.tensor(labelled, dtype=torch.bool),
        torch.tensor(valid, dtype=torch.bool),
        len(samples),
    )


def by_hand(samples: list[list[Segment]]) -> list[float]:
    compared = matches = 0
    for parts in samples:
        references = [frames for frames, learnt in parts if frames and not (learnt and len(frames) > 1)]
        targets = [frames for frames, learnt in parts if learnt and len(frames) > 1]
        if len(references) != 1 or len(targets) != 1:
            continue
        pairs = list(zip(references[0], targets[0]))
        if len(pairs) <= BOOKS:
            continue
        compared += 1
        equal = sum(a == b for one, other in pairs for a, b in zip(one, other))
        matches += equal >= 0.99 * BOOKS * len(pairs)
    return [float(compared), float(matches)]


def clip(rng: random.Random, frames: int) -> list[list[int]]:
    return [[rng.randrange(8) for _ in range(BOOKS)] for _ in range(frames)]


def test_counts_equal_a_plain_loop() -> None:
    """Over random batches with none, one or two references, copies, crops and near copies both counts equal those of a loop."""
    totals = [0.0, 0.0]
    for seed in range(200):
        rng = random.Random(seed)
        samples: list[list[Segment]] = []
        for _ in range(rng.randrange(1, 5)):
            target = clip(rng, rng.randrange(0, 60))
            reference = rng.choice([target[:], target[: len(target) // 2], clip(rng, rng.randrange(0, 60))])
            if reference and rng.random() < 0.3:
                reference[rng.randrange(len(reference))] = [8] * BOOKS
            parts = [(reference, False), (target, True)]
            parts = rng.choice([parts, parts, parts[::-1], [*parts, (clip(rng, 4), False)], parts[1:]])
            samples.append(parts)
        expected = by_hand(samples)
        assert reference_agreement(frames_of(samples, fill=rng.randrange(3))).tolist() == expected
        totals = [total + number for total, number in zip(totals, expected)]
    assert totals[0] > totals[1] > 20


def test_99_percent_is_enough_and_less_is_not() -> None:
    """Of 100 frames of 3 codes, 3 other codes are still a match, 4 are not."""
    target = clip(random.Random(1), 100)
    for wrong, matches in ((3, 1.0), (4, 0.0)):
        reference = [frame[:] for frame in target]
        for index in range(wrong):
            reference[index][0] += 1
        assert reference_agreement(frames_of([[(reference, False), (target, True)]])).tolist() == [1.0, matches]


def test_no_frames() -> None:
    """An empty batch has nothing to compare."""
    assert reference_agreement(frames_of([])).tolist() == [0.0, 0.0]
