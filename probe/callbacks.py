"""The four callbacks: each shows one section of the published record, at its own cadence, and computes nothing.

Given to a Trainer without any ``attach``, the first of them attaches by itself when training begins.
"""

from __future__ import annotations

from typing import Any

from transformers.trainer_callback import TrainerControl, TrainerState
from transformers.training_args import TrainingArguments

from probe.errors import ProbeTypeError, ProbeValueError
from probe.records import StepRecord
from probe.sections import attention, inputs, outputs, verification
from probe.sections.blocks import Section
from probe.trainer.record_callback import RecordCallback
from probe.trainer.wiring import ensure_observed


class _Logger(RecordCallback):
    def __init__(self, *, tokenizer: Any, log_every_n_steps: int) -> None:
        if isinstance(log_every_n_steps, bool) or not isinstance(log_every_n_steps, int):
            given = type(log_every_n_steps).__name__
            raise ProbeTypeError(f"log_every_n_steps={log_every_n_steps!r}: expected a whole number, got {given}")
        if log_every_n_steps < 1:
            raise ProbeValueError(f"log_every_n_steps={log_every_n_steps}: expected a whole number of at least 1")
        self.tokenizer = tokenizer
        self.log_every_n_steps = log_every_n_steps

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """See to it that this training is observed."""
        ensure_observed(self)


class InputLoggerCallback(_Logger):
    """Shows what went into the model: every input by name, decoded text, audio segments, padding and masked labels."""

    def __init__(self, tokenizer: Any = None, log_every_n_steps: int = 100) -> None:
        """Show the inputs of the first step and of every ``log_every_n_steps``-th.

        Args:
            tokenizer: Decodes token ids; without one the Trainer's processing class does, if it can.
            log_every_n_steps: The cadence, at least 1.
        """
        super().__init__(tokenizer=tokenizer, log_every_n_steps=log_every_n_steps)

    def section(self, record: StepRecord) -> Section:
        """Return the input section."""
        return inputs.section(record)


class OutputLoggerCallback(_Logger):
    """Shows what came out: loss, every head's logits, accuracy and cross-entropy, predicted against target text."""

    def __init__(self, tokenizer: Any = None, log_every_n_steps: int = 100) -> None:
        """Show the outputs of the first step and of every ``log_every_n_steps``-th.

        Args:
            tokenizer: Decodes token ids; without one the Trainer's processing class does, if it can.
            log_every_n_steps: The cadence, at least 1.
        """
        super().__init__(tokenizer=tokenizer, log_every_n_steps=log_every_n_steps)

    def section(self, record: StepRecord) -> Section:
        """Return the output section."""
        return outputs.section(record)


class SharedAttentionLoggerCallback(_Logger):
    """Shows what attention looked at, layer by layer, and which feed-forward branch received which tokens."""

    def __init__(self, log_every_n_steps: int = 100) -> None:
        """Show the attention of the first step and of every ``log_every_n_steps``-th.

        Args:
            log_every_n_steps: The cadence, at least 1.
        """
        super().__init__(tokenizer=None, log_every_n_steps=log_every_n_steps)

    def section(self, record: StepRecord) -> Section:
        """Return the attention section."""
        return attention.section(record)


class ZeroShotVerificationLoggerCallback(_Logger):
    """Shows whether the model is conditioned on audio: the encoder as measured, audio codes, chat structure, gradients, learning rate."""

    def __init__(self, log_every_n_steps: int = 100) -> None:
        """Show the verification of the first step and of every ``log_every_n_steps``-th.

        Args:
            log_every_n_steps: The cadence, at least 1.
        """
        super().__init__(tokenizer=None, log_every_n_steps=log_every_n_steps)

    def section(self, record: StepRecord) -> Section:
        """Return the verification section."""
        return verification.section(record)
