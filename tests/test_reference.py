from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from probe.records import Modality, Site
from probe.sites.facts import ModelFacts
from probe.sites.reference import AudioRoles, audio_roles, labelled_positions, labels_of_audio, laid_over, runs_without, unlabelled_runs
from waiting import NoWaiting

BOOKS = 3
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"))]


def bits(seed: int, *shape: int, share: float = 0.5) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed)) < share


def runs_of(row: list[bool]) -> Iterator[list[int]]:
    """Yield the positions of each run, found by walking along the row."""
    run: list[int] = []
    for position, here in enumerate([*row, False]):
        if here:
            run.append(position)
        elif run:
            yield run
            run = []


def expected_runs(audio: Tensor, marked: Tensor) -> Tensor:
    out = torch.zeros_like(audio)
    for b in range(audio.shape[0]):
        for run in runs_of(audio[b].tolist()):
            if not any(bool(marked[b, position]) for position in run):
                out[b, run] = True
    return out


def expected_laid(slots: Tensor, values: Tensor, valid: Tensor | None = None) -> Tensor:
    kept = [bool(value) for index, value in enumerate(values) if valid is None or bool(valid[index])]
    out, k = torch.zeros_like(slots), 0
    for b in range(slots.shape[0]):
        for s in range(slots.shape[1]):
            if slots[b, s]:
                out[b, s] = k < len(kept) and kept[k]
                k += 1
    return out


@pytest.mark.parametrize("seed", range(12))
def test_runs_without_a_mark(seed: int) -> None:
    """As walking along each row finds them: runs at both ends, single positions, marks outside audio, rows that touch in memory."""
    audio, marked = bits(seed, 5, 17, share=0.3 + 0.05 * seed), bits(seed + 100, 5, 17, share=0.25)
    audio[0, -1] = audio[1, 0] = True  # neighbours in memory, of two samples
    audio[2], audio[3] = True, False
    marked[0, -1], marked[1] = True, False
    assert torch.equal(runs_without(audio, marked), expected_runs(audio, marked))


@pytest.mark.parametrize("shape", [(0, 5), (3, 0), (1, 1)])
def test_runs_of_nothing(shape: tuple[int, int]) -> None:
    """No sample and no token have no run; a single position is one."""
    assert torch.equal(runs_without(torch.ones(shape, dtype=torch.bool), torch.zeros(shape, dtype=torch.bool)), torch.ones(shape) > 0)
    assert not runs_without(torch.zeros(shape, dtype=torch.bool), torch.ones(shape, dtype=torch.bool)).any()


@pytest.mark.parametrize("count", [0, 1, 11, 60])
@pytest.mark.parametrize("seed", range(4))
def test_values_are_laid_over_slots_in_order(seed: int, count: int) -> None:
    """Too few values leave the last slots false, too many are left over; values that are not valid are passed over."""
    slots, values, valid = bits(seed, 4, 13), bits(seed + 50, count), bits(seed + 70, count, share=0.6)
    assert torch.equal(laid_over(slots, values), expected_laid(slots, values))
    assert torch.equal(laid_over(slots, values, valid), expected_laid(slots, values, valid))


def roles(**changes: Any) -> AudioRoles:
    return AudioRoles(**{"predicts": True, "codebooks": BOOKS, **changes})


def labels_where(real: Tensor, seed: int) -> Tensor:
    """Return labels that are -100 but where ``real``."""
    return torch.where(real, torch.randint(0, 9, real.shape, generator=torch.Generator().manual_seed(seed)), -100)


@pytest.mark.parametrize("seed", range(4))
def test_labels_of_joined_frames(seed: int) -> None:
    """``label_audio_ids`` (K, N): column n belongs to the n-th audio position of the batch, also where (K, N) looks like (B, S)."""
    for samples, tokens in ((4, 13), (BOOKS, 13)):
        audio = bits(seed, samples, tokens)
        real = bits(seed + 9, BOOKS, 13 if samples == BOOKS else int(audio.sum()), share=0.2)
        found = labelled_positions(audio, {"label_audio_ids": labels_where(real, seed)}, roles())
        assert found is not None
        assert torch.equal(found, expected_laid(audio, torch.tensor([bool(column.any()) for column in real.T])))


@pytest.mark.parametrize("seed", range(4))
def test_labels_of_frames_with_a_mask(seed: int) -> None:
    """``audio_labels`` (B, F, K) with ``audio_input_ids_mask``: real frames in order, also where F is the number of tokens."""
    for frames in (7, 13):
        audio, valid = bits(seed, 4, 13), bits(seed + 5, 4, frames, share=0.7)
        real = bits(seed + 9, 4, frames, BOOKS, share=0.15)
        given = {"audio_labels": labels_where(real, seed), "audio_input_ids_mask": valid}
        found = labelled_positions(audio, given, roles())
        assert found is not None
        frame_labels = torch.tensor([bool(frame.any()) for frame in real.flatten(0, 1)])
        assert torch.equal(found, expected_laid(audio, frame_labels, valid.flatten()))
        assert labelled_positions(audio, {**given, "audio_input_ids_mask": valid[:, :3]}, roles()) is None


def test_labels_over_the_tokens() -> None:
    """(B, S, K) and (B, S) labels lie where they are; those of positions that are no audio do not count."""
    audio, real = bits(1, 4, 13), bits(2, 4, 13, BOOKS, share=0.2)
    found = labelled_positions(audio, {"audio_labels": labels_where(real, 3)}, roles())
    assert found is not None
    assert torch.equal(found, audio & real.any(-1))
    single = labelled_positions(audio, {"audio_labels": labels_where(real[..., 0], 3)}, roles(codebooks=1))
    assert single is not None
    assert torch.equal(single, audio & real[..., 0])


def test_labels_of_one_codebook_and_of_columns() -> None:
    """(B, F) labels of a single codebook are joined; (K, N) is taken for columns under any name where K is the number of codebooks."""
    audio, real, valid = bits(1, 4, 13), bits(2, 4, 6), bits(4, 4, 6, share=0.8)
    given = {"audio_labels": labels_where(real, 3), "audio_input_ids_mask": valid}
    joined = labelled_positions(audio, given, roles(codebooks=1))
    assert joined is not None
    assert torch.equal(joined, expected_laid(audio, real.flatten(), valid.flatten()))
    columns = bits(5, BOOKS, 9, share=0.2)
    found = labelled_positions(audio, {"audio_labels": labels_where(columns, 3)}, roles())
    assert found is not None
    assert torch.equal(found, expected_laid(audio, columns.any(0)))


def test_frames_without_a_mask() -> None:
    """Of one sample, frames are in order; of several, what fills up the shorter ones is not known, and nothing is claimed."""
    audio, real = bits(1, 1, 13), bits(2, 1, 6, BOOKS)
    found = labelled_positions(audio, {"audio_labels": labels_where(real, 3)}, roles())
    assert found is not None
    assert torch.equal(found, expected_laid(audio, real.any(-1).flatten()))
    several = {"audio_labels": labels_where(bits(2, 4, 6, BOOKS), 3)}
    assert labelled_positions(bits(1, 4, 13), several, roles()) is None


def test_labels_that_tell_nothing() -> None:
    """No labels, labels of no shape that fits, floating ones: not known, rather than no label anywhere."""
    audio = bits(1, 4, 13)
    for given in (
        {},
        {"labels": labels_where(audio, 1)},
        {"audio_labels": torch.zeros(4, 13)},
        {"audio_labels": torch.zeros(4, dtype=torch.int64)},
        {"audio_labels": labels_where(bits(1, BOOKS + 1, 7), 2)},
        {"audio_labels": labels_where(bits(1, 4, 7, BOOKS, 2), 2)},
        {"label_audio_ids": labels_where(bits(1, BOOKS + 2, 7), 2)},
        {"label_audio_ids": labels_where(bits(1, BOOKS, 4, 2), 2)},
    ):
        assert labelled_positions(audio, given, roles()) is None
        assert unlabelled_runs(audio, given, roles()) is None
    assert labelled_positions(audio[:1], {"audio_labels": labels_where(bits(1, 1, 7, BOOKS, 2), 2)}, roles()) is None
    assert labels_of_audio({"audio_labels": torch.zeros(4, dtype=torch.int64)}, roles()) is None
    spoken = roles(labels=("audio_labels", "labels"))
    assert labelled_positions(audio, {"labels": labels_where(bits(1, BOOKS, 7), 1)}, spoken) is None
    assert labels_of_audio({"labels": labels_where(audio, 1)}, spoken) is not None


def test_one_labelled_frame_makes_a_target() -> None:
    """Several references a sample, reference after target, samples with different counts, and one without any audio."""
    a, t = True, False
    audio = torch.tensor([[a, a, t, a, a, a, t, a], [t, a, a, t, a, t, t, t], [t] * 8])
    # Frames in order: reference 2, target 3, reference 1 | reference 2, target 1.
    columns = torch.tensor([0, 0, 0, 0, 1, 0, 0, 0, 1]).bool()
    labels = torch.full((BOOKS, 9), -100)
    labels[1, columns] = 4
    found = unlabelled_runs(audio, {"label_audio_ids": labels}, roles())
    assert found is not None
    assert found.tolist() == [[a, a, t, t, t, t, t, a], [t, a, a, t, t, t, t, t], [t] * 8]


def test_nothing_was_given_to_be_heard() -> None:
    """Zero-size labels and batches without audio are reference nowhere, and all audio is reference where all labels are -100."""
    audio = bits(3, 4, 13)
    empty = {"label_audio_ids": torch.zeros(BOOKS, 0, dtype=torch.int64)}
    none = unlabelled_runs(torch.zeros_like(audio), empty, roles())
    assert none is not None
    assert not none.any()
    frames = {"audio_labels": torch.zeros(4, 0, BOOKS, dtype=torch.int64), "audio_input_ids_mask": torch.zeros(4, 0, dtype=torch.bool)}
    assert torch.equal(unlabelled_runs(audio, frames, roles()), audio)  # type: ignore[arg-type]
    ignored = {"label_audio_ids": torch.full((BOOKS, int(audio.sum())), -100)}
    assert torch.equal(unlabelled_runs(audio, ignored, roles()), audio)  # type: ignore[arg-type]


@pytest.mark.parametrize("device", DEVICES)
def test_nothing_waits_for_the_device(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """No operator synchronises, with deterministic algorithms either, and the results are those of the CPU."""
    audio, real, valid = bits(1, 4, 40), bits(2, 4, 11, BOOKS, share=0.1), bits(3, 4, 11, share=0.8)
    frames = {"audio_labels": labels_where(real, 3), "audio_input_ids_mask": valid}
    columns = {"label_audio_ids": labels_where(bits(4, BOOKS, int(audio.sum()), share=0.03), 5)}
    expected = [unlabelled_runs(audio, given, roles()) for given in (frames, columns)]
    moved, on_device = audio.to(device), [{name: value.to(device) for name, value in given.items()} for given in (frames, columns)]
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    for deterministic in (False, True):
        torch.use_deterministic_algorithms(deterministic)
        if device == "cuda":
            torch.cuda.set_sync_debug_mode("error")
        try:
            with NoWaiting() as watch:
                found = [unlabelled_runs(moved, given, roles()) for given in on_device]
        finally:
            torch.use_deterministic_algorithms(False)
            if device == "cuda":
                torch.cuda.set_sync_debug_mode("default")
        assert watch.operators > 10
        for one, other in zip(found, expected, strict=True):
            assert one is not None
            assert other is not None
            assert torch.equal(one.cpu(), other)


def facts(*tokens: tuple[str, int], codebooks: int = 0) -> ModelFacts:
    return ModelFacts("Any", "any", False, 32, codebooks, tokens, tuple(token for _, token in tokens), 1)


def head(modality: Modality) -> Site:
    return Site(f"{modality}_head", "lm_head", "test", modality=modality)


def test_roles_of_models() -> None:
    """A model predicts audio if it has codebooks, an audio head or a token for it; only a purely audio model's ``labels`` are audio's."""
    listener = audio_roles(facts(("audio_token_id", 7)), [head("text")])
    assert not listener.predicts
    speaker = audio_roles(facts(("audio_token_id", 7), codebooks=4), [head("text"), head("audio")])
    assert speaker.predicts
    assert speaker.codebooks == 4
    assert "labels" not in speaker.labels
    assert not speaker.given
    only_audio = audio_roles(facts(("audio_token_id", 7)), [head("audio")])
    assert only_audio.predicts
    assert "labels" in only_audio.labels
    both = audio_roles(facts(("audio_in_token_idx", 3), ("audio_out_token_idx", 4)), [head("text")])
    assert both.predicts
    assert both.given == {3}
    assert both.codebooks == 1
    assert audio_roles(facts(("audio_prompt_token_id", 5), ("audio_latent_token_id", 6)), []).given == {5}
