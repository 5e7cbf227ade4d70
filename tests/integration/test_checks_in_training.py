"""The checks of every model's training: nothing odd in a healthy one, each number as plain Python counts it, each slip found."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import models
from models.case import Case
from models.running import VARIANTS
from probe.records import AudioChecks, BatchChecks, LabelChecks, StepRecord
from watching import observed_run

CASES = [pytest.param(case, id=case.name) for case in models.available_cases()]
SEED = 8
Batch = dict[str, Any]
Spoil = Callable[[Batch], None]


def train(case: Case, *, spoil: Spoil | None = None, steps: int = 2, **arguments: Any) -> tuple[list[BatchChecks], list[Batch]]:
    """Train under observation with batches of three samples, each changed by ``spoil``; return the checks and the batches."""
    batches: list[Batch] = []

    def collate(samples: Sequence[Any]) -> Any:
        batch = case.collate(samples)
        if spoil is not None:
            spoil(batch if isinstance(batch, dict) else vars(batch))
        batches.append({name: batch[name].clone() for name in batch.keys()})  # noqa: SIM118  (no mapping)
        return batch

    arguments = {"samples": 12, "per_device_train_batch_size": 3, "seed": SEED, "max_steps": steps, **arguments}
    _, records = observed_run(replace(case, collate=collate), options={"tokenizer": case.tokenizer()}, **arguments)
    return [checks_of(record) for record in records], batches[: steps * arguments.get("gradient_accumulation_steps", 1)]


def checks_of(record: StepRecord) -> BatchChecks:
    assert record.checks is not None, record.not_measured
    return record.checks


def labels_of(checks: BatchChecks) -> LabelChecks:
    assert checks.labels is not None
    return checks.labels


def audio_of(checks: BatchChecks) -> AudioChecks:
    assert checks.audio is not None
    return checks.audio


def text_labels(batch: Batch) -> Tensor:
    return batch.get("labels", batch.get("label_ids"))


@pytest.mark.parametrize("ways", [("plain",), ("checkpointing", "bf16")], ids="-".join)
@pytest.mark.parametrize("case", CASES)
def test_nothing_odd_in_healthy_training(case: Case, ways: tuple[str, ...]) -> None:
    """However a healthy model is trained, every count of something odd is 0 and labels relate to ids as the model means it."""
    found, _ = train(case, **{name: value for way in ways if way not in case.unsupported for name, value in VARIANTS[way].items()})
    assert len({checks.fingerprint for checks in found}) == len(found)
    for checks in found:
        labels = labels_of(checks)
        assert (checks.duplicated_rows, checks.ids_outside_tokenizer, checks.added_ids) == (0, 0, 0)
        odd = (labels.on_padding, labels.padding_runs, labels.on_placeholders, labels.outside_vocabulary)
        assert not any(odd)
        assert labels.labelled > 0
        assert labels.same == labels.compared == (0 if case.name == "whisper" else labels.labelled)
        assert max(labels.next, labels.previous) < 0.3 * max(labels.compared, 1)
        assert labels.common_prefix in ((3, 4) if case.name == "whisper" else (None, 0, 1, 2))
        assert not checks.reference_matches
        assert (checks.audio is not None) == (case.encoder is not None)
        if checks.audio is not None:
            audio = checks.audio
            assert (audio.kind, audio.mel_bins) == ("log-mel", 16)
            assert (audio.nonfinite, audio.constant, audio.silent, audio.off_scale, audio.band_limited, audio.duplicated) == (0,) * 6
            assert audio.placeholders is None or audio.frames is None or audio.placeholders <= audio.frames
            assert audio.valid_frames in (None, audio.placeholders)


@pytest.mark.parametrize("case", CASES)
def test_numbers_of_a_step_are_those_of_its_batches(case: Case) -> None:
    """Rows, labels, clips, extremes, audio labels, compared references and placeholders equal those that loops over the batches count."""
    found, batches = train(case, gradient_accumulation_steps=2)
    for step, checks in enumerate(found):
        mine = batches[2 * step : 2 * step + 2]
        assert checks.rows == 6
        labels = labels_of(checks)
        assert labels.labelled == sum(int((text_labels(batch) != -100).sum()) for batch in mine)
        count_audio(checks, mine, case)
        count_codes(checks, mine)


def count_audio(checks: BatchChecks, batches: list[Batch], case: Case) -> None:
    features = [batch[name] for batch in batches for name in ("input_features", "audio_features") if name in batch]
    if not features:
        assert checks.audio is None
        return
    audio = audio_of(checks)
    assert audio.clips == sum(len(clips) for clips in features)
    assert audio.maximum == max(float(clips.max()) for clips in features if len(clips))
    assert audio.minimum == min(float(clips.min()) for clips in features if len(clips))
    if case.name == "whisper":
        assert (audio.placeholders, audio.frames) == (None, None)
        return
    token = case.tokenizer().convert_tokens_to_ids(case.audio_token)
    assert audio.placeholders == sum(int((batch["input_ids"] == token).sum()) for batch in batches)
    assert audio.frames == audio.clips * {"voxtral": 12}.get(case.name, 25)
    if audio.valid_frames is not None:
        assert audio.valid_frames == audio.placeholders


def count_codes(checks: BatchChecks, batches: list[Batch]) -> None:
    if "label_audio_ids" in batches[0]:
        assert checks.audio_labels == sum(int((batch["label_audio_ids"] != -100).sum()) for batch in batches)
        samples = sum(int((batch["input_ids"] == 260).any(1).sum()) for batch in batches)
        assert 0 < (checks.reference_compared or 0) <= samples
    elif "audio_labels" in batches[0]:
        assert checks.audio_labels == sum(int((batch["audio_labels"] != -100).sum()) for batch in batches)
        assert (checks.reference_compared, checks.reference_matches) == (6, 0)
    else:
        assert (checks.audio_labels, checks.reference_compared) == (None, None)


def test_one_batch_again_and_again() -> None:
    """A data set of one batch has one fingerprint, however its rows are shuffled; with another row it has another."""
    case = models.CASES["whisper"]
    assert len({checks.fingerprint for checks in train(case, samples=3, steps=4)[0]}) == 1
    assert len({checks.fingerprint for checks in train(case, samples=4)[0]}) == 2


def repeat_rows(batch: Batch) -> None:
    for name, value in batch.items():
        batch[name] = value.clone()
        batch[name][2] = value[0]


def masked_placeholders(batch: Batch) -> None:
    batch["labels"] = torch.where(batch["attention_mask"] != 0, batch["input_ids"], -100)


def padding_kept(batch: Batch) -> None:
    batch["labels"] = batch["input_ids"].clone()


def shifted(batch: Batch) -> None:
    batch["labels"] = torch.cat([batch["labels"][:, 1:], torch.full_like(batch["labels"][:, :1], -100)], 1)


def far_ids(batch: Batch) -> None:
    batch["input_ids"][0, 0] = 287


def test_rows_that_were_duplicated() -> None:
    """A collator that repeats rows is found in each micro-batch, with its clips."""
    for checks in train(models.CASES["whisper"], spoil=repeat_rows)[0]:
        assert (checks.duplicated_rows, audio_of(checks).duplicated) == (2, 2)


@pytest.mark.parametrize("name", ["llama", "voxtral"])
def test_labels_that_were_made_wrongly(name: str) -> None:
    """Padding kept in the labels, labels shifted by the collator, prompts and placeholders kept, ids beyond the tokenizer: all are seen."""
    case = models.CASES[name]
    if not case.available():
        pytest.skip(f"this transformers has no {case.needs}")
    (checks, _), batches = train(case, spoil=padding_kept)
    padded = int((batches[0]["attention_mask"] == 0).sum())
    assert labels_of(checks).on_padding == padded > 0
    if name == "llama":
        assert labels_of(checks).padding_runs == padded - int((batches[0]["attention_mask"] == 0).any(1).sum())
    labels = labels_of(train(case, spoil=shifted)[0][0])
    assert labels.next > 0.9 * labels.compared > 5 * labels.same
    checks = train(case, spoil=masked_placeholders)[0][0]
    assert (labels_of(checks).common_prefix or 0) >= (1 if name == "llama" else 15)
    assert labels_of(checks).on_placeholders == (None if name == "llama" else audio_of(checks).placeholders)
    assert train(case, spoil=far_ids)[0][0].ids_outside_tokenizer == 1


def change_clip(change: Callable[[Tensor], Tensor]) -> Spoil:
    def spoil(batch: Batch) -> None:
        batch["input_features"] = torch.stack([change(clip) for clip in batch["input_features"]])

    return spoil


@pytest.mark.parametrize(
    ("change", "column"),
    [
        (lambda clip: clip.index_fill(0, torch.tensor([3]), math.nan), "nonfinite"),
        (lambda clip: torch.full_like(clip, 0.3), "constant"),
        (lambda clip: -1.3 + 0.05 * torch.sin(clip), "silent"),
        (lambda clip: clip + 2.26, "off_scale"),
        (lambda clip: (clip - clip.mean()) / clip.std(), "off_scale"),
        (lambda clip: torch.cat([clip[:-2], clip.min() + 0 * clip[-2:]]), "band_limited"),
    ],
    ids=["nan", "constant", "silent", "integers", "normalised", "upsampled"],
)
def test_clips_that_are_broken(change: Callable[[Tensor], Tensor], column: str) -> None:
    """Each way to break all clips is counted in its column, three a step, and in no other."""
    if column == "nonfinite":
        assert_only(train_nan(change), column)
        return
    for checks in train(models.CASES["whisper"], spoil=change_clip(change))[0]:
        assert_only(checks, column)


def train_nan(change: Callable[[Tensor], Tensor]) -> BatchChecks:
    """One step: with NaN features the loss is NaN, and so is everything after it."""
    return train(models.CASES["whisper"], spoil=change_clip(change), steps=1)[0][0]


def assert_only(checks: BatchChecks, column: str) -> None:
    audio = audio_of(checks)
    counts = {name: getattr(audio, name) for name in ("nonfinite", "constant", "silent", "off_scale", "band_limited")}
    assert counts == {**dict.fromkeys(counts, 0), column: 3}


def test_the_target_given_as_reference() -> None:
    """In both layouts of codes, a collator that gives the target's codes as the reference's is found in every sample it did so."""
    for name in ("higgs_audio_v2", "original"):
        case = models.CASES[name]
        if not case.available():
            continue
        seen = [same_codes(case, seed) for seed in range(SEED, SEED + 2)]
        assert all(checks.reference_matches == checks.reference_compared for checks in seen)
        assert sum(checks.reference_compared or 0 for checks in seen) >= 4


def same_codes(case: Case, seed: int) -> BatchChecks:
    """Train on samples whose reference is as long as the target, and has its codes."""
    made = case.dataset

    def sample(given: dict[str, Any]) -> dict[str, Any]:
        if case.name == "original":
            return given if given["codes_out"] is None else {**given, "codes_in": given["codes_out"][0].clone()}
        return repeated_target(given, case)

    checks, _ = train(replace(case, dataset=lambda count, made_by: [sample(given) for given in made(count, made_by)]), steps=1, seed=seed)
    return checks[0]


def repeated_target(given: dict[str, Any], case: Case) -> dict[str, Any]:
    """Put the target's run of tokens and its codes in the reference's place."""
    ids, labels = list(given["input_ids"]), list(given["labels"])
    begin, end = (case.tokenizer().convert_tokens_to_ids(token) for token in ("<|audio_out_bos|>", "<|audio_eos|>"))
    starts, ends = ([i for i, token in enumerate(ids) if token == wanted] for wanted in (begin, end))
    run = ids[starts[1] : ends[1] + 1]
    frames = len(run) - 2
    return {
        "input_ids": ids[: starts[0]] + run + ids[ends[0] + 1 :],
        "labels": labels[: starts[0]] + [-100] * len(run) + labels[ends[0] + 1 :],
        "audio_input_ids": torch.cat([given["audio_input_ids"][-frames:]] * 2),
        "audio_labels": torch.cat([torch.full_like(given["audio_labels"][-frames:], -100), given["audio_labels"][-frames:]]),
    }
