"""Faults of ids, rows and labels: what a dataset or a collator gets wrong."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils.data import SequentialSampler

from benchmarks.faults.areas.setup import HIGGS, LLAMA, ORIGINAL, QWEN, VOXTRAL, WHISPER
from benchmarks.faults.fault import Kind, kind
from benchmarks.faults.training import Fields, Training
from models.tokens import encode


def ids_of_another_tokenizer(training: Training) -> None:
    """Some ids come from a larger tokenizer: the embedding has rows for them, the tokenizer has no tokens."""
    beyond = len(training.case.tokenizer()) + 8

    def foreign(sample: Fields, index: int) -> Fields:
        ids = list(sample["input_ids"])
        ids[-3], ids[-2] = beyond, beyond + index % 4
        return {**sample, "input_ids": ids}

    training.rows.append(foreign)


class InOrder:
    """A Trainer that does not shuffle."""

    def _get_train_sampler(self, *args: Any, **kwargs: Any) -> Any:
        """Return the samples in order."""
        return SequentialSampler(self.train_dataset)


def one_batch_again_and_again(training: Training) -> None:
    """The dataset holds one batch."""
    training.mixins.append(InOrder)
    training.samples = training.arguments.get("per_device_train_batch_size", 4)


def dataset_ignores_its_index(training: Training) -> None:
    """``__getitem__`` returns its first sample whatever the index: all rows of all batches are the same."""
    first: list[Fields] = []

    def same(sample: Fields, index: int) -> Fields:
        first.append(sample)
        return first[0]

    training.rows.append(same)


def every_row_twice(training: Training) -> None:
    """The collator repeats every sample, as preference training does."""
    collate = training.case.collate
    training.collate = lambda samples: collate([sample for sample in samples for _ in (0, 1)])


def all_labels_masked(training: Training) -> None:
    """The search for the answer's beginning fails, and the whole row is masked."""
    name = training.labels
    training.batches.append(lambda fields: {**fields, name: torch.full_like(fields[name], -100)})


def padding_learnt(training: Training) -> None:
    """The labels are padded with the padding token instead of -100."""
    pad = training.case.tokenizer().pad_token_id

    def keep(fields: Fields) -> Fields:
        labels = fields["labels"].clone()
        mask = fields.get("attention_mask")
        if mask is None:  # Whisper's batch has no mask
            labels[labels == -100] = pad
        else:
            labels[mask == 0] = pad
        return {**fields, "labels": labels}

    training.batches.append(keep)


def prompt_learnt(training: Training) -> None:
    """``labels = input_ids`` with only the padding masked: the placeholders of the audio are in the loss."""

    def keep(fields: Fields) -> Fields:
        return {**fields, "labels": fields["input_ids"].masked_fill(fields["attention_mask"] == 0, -100)}

    training.batches.append(keep)


def instruction_learnt(training: Training) -> None:
    """The same instruction stands before every sample, and its labels are not masked."""
    instruction = encode(training.case.tokenizer(), "Answer in one word, please. ")

    def instructed(sample: Fields, index: int) -> Fields:
        return {
            **sample,
            "input_ids": [*instruction, *sample["input_ids"]],
            "labels": [*instruction, *sample["input_ids"]],
        }

    training.rows.append(instructed)


def _moved(training: Training, by: int) -> None:
    name = training.labels

    def move(fields: Fields) -> Fields:
        labels = torch.roll(fields[name], by, dims=1)
        labels[:, -1 if by < 0 else 0] = -100
        labels = labels.masked_fill(fields["attention_mask"] == 0, -100)
        return {**fields, name: labels}

    training.batches.append(move)


def labels_shifted_by_collator(training: Training) -> None:
    """The collator shifts the labels, and the model shifts them again: it learns the token after the next."""
    _moved(training, -1)


def labels_shifted_the_wrong_way(training: Training) -> None:
    """The collator shifts the labels to the right, so that the model's own shift cancels it: it learns to copy."""
    _moved(training, 1)


def decoder_sees_the_answer(training: Training) -> None:
    """``decoder_input_ids`` are the labels, not the labels shifted to the right: each token is to be predicted from itself."""
    pad = training.case.tokenizer().pad_token_id

    def shown(fields: Fields) -> Fields:
        return {**fields, "decoder_input_ids": fields["labels"].masked_fill(fields["labels"] == -100, pad)}

    training.batches.append(shown)


_NONFINITE = ("gradient-not-finite", "loss-not-finite", "activation-not-finite", "loss-off")

KINDS: tuple[Kind, ...] = (
    kind("labels", "ids-out-of-range", ids_of_another_tokenizer, LLAMA, QWEN),
    kind("labels", "same-batch-repeated", one_batch_again_and_again, LLAMA, WHISPER, also=["rows-duplicated"]),
    kind("labels", "rows-duplicated", dataset_ignores_its_index, LLAMA, WHISPER, VOXTRAL, also=["same-batch-repeated"]),
    kind("labels", "rows-duplicated", every_row_twice, QWEN, LLAMA),
    kind(
        "labels",
        "labels-all-masked",
        all_labels_masked,
        LLAMA,
        QWEN,
        WHISPER,
        also=["loss-not-connected", "backward-never-ran", "part-without-gradient", *_NONFINITE],
    ),
    kind("labels", "padding-in-loss", padding_learnt, LLAMA, WHISPER, also=["loss-off"]),
    kind("labels", "prompt-not-masked", prompt_learnt, QWEN, VOXTRAL),
    kind("labels", "prompt-not-masked", instruction_learnt, LLAMA),
    kind("labels", "labels-shifted", labels_shifted_by_collator, LLAMA, QWEN, HIGGS, also=["loss-off"]),
    kind("labels", "labels-shifted", labels_shifted_the_wrong_way, VOXTRAL, LLAMA, ORIGINAL, also=["loss-off", "reference-ignored"]),
    kind("labels", "labels-shifted", decoder_sees_the_answer, WHISPER, also=["loss-off", "reference-ignored"]),
)
