"""Faults of heads, attention and branches: dead codebooks, forced tokens, attention that looks nowhere or where it must not."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.faults.areas.setup import HIGGS, LLAMA, ORIGINAL, QWEN, WHISPER
from benchmarks.faults.fault import Kind, kind
from benchmarks.faults.training import Fields, Training, of, returning, taking

BOOK = 1  # the codebook that is broken


def _audio_head(training: Training) -> str:
    return next(name for name in training.case.heads if "audio" in name.rpartition(".")[2])


def codebook_rows_zeroed(training: Training) -> None:
    """The rows of one codebook in the audio head are 0 and get no gradient: that codebook is guessed."""

    def zero(model: nn.Module) -> None:
        weight = of(model, _audio_head(training)).weight
        size = model.config.codebook_size if training.case.name == HIGGS else model.config.audio_codebook_size + 2
        rows = slice(BOOK * size, (BOOK + 1) * size)
        keep = torch.ones_like(weight)
        keep[rows] = 0
        with torch.no_grad():
            weight[rows] = 0
        weight.register_hook(lambda gradient: gradient * keep)

    training.models.append(zero)
    training.steps = 40


def head_forces_one_token(training: Training) -> None:
    """A bias of 50 for one token was left in the LM head (a logits bias meant for generation)."""

    def force(model: nn.Module) -> None:
        head = of(model, training.case.heads[0])
        bias = torch.zeros(head.out_features)
        bias[101] = 50.0
        head.bias = nn.Parameter(bias, requires_grad=False)

    training.models.append(force)
    training.steps = 40


def _decoder_layers(training: Training) -> tuple[str, ...]:
    return next(layers for kind_, layers in training.case.attention.items() if kind_ in ("joint", "decoder"))


def temperature_far_too_low(training: Training) -> None:
    """The scores of one layer are 100,000 times too large: every query looks at one key."""

    def sharpen(model: nn.Module) -> None:
        with torch.no_grad():
            for parameter in of(model, f"{_decoder_layers(training)[-1]}.q_proj").parameters():
                parameter.mul_(1e5)

    training.models.append(sharpen)


def queries_zero(training: Training) -> None:
    """The query projection of one layer gives 0: every key has the same weight."""
    layer = _decoder_layers(training)[-1]
    training.models.append(lambda model: returning(of(model, f"{layer}.q_proj"), lambda out: out * 0.0))


def encoder_queries_zero(training: Training) -> None:
    """The query projection of one encoder layer gives 0."""
    layer = training.case.attention["encoder"][-1]
    training.models.append(lambda model: returning(of(model, f"{layer}.q_proj"), lambda out: out * 0.0))


def only_first_token_visible(training: Training) -> None:
    """A mask of 30 off every score but that of the first key, from a prefix mask with its sides exchanged."""
    layer = _decoder_layers(training)[-1]

    def change(kwargs: dict[str, Any]) -> dict[str, Any]:
        size = kwargs["hidden_states"].shape[1]
        causal = torch.full((size, size), float("-inf")).triu(1)
        causal[:, 1:] -= 30.0
        return {**kwargs, "attention_mask": causal[None, None].expand(len(kwargs["hidden_states"]), 1, -1, -1)}

    training.models.append(lambda model: taking(of(model, layer), change))


def padding_visible(training: Training) -> None:
    """Rows are padded on the left, and the wrapper does not hand the mask on: tokens attend to padding."""
    training.batches.append(_pad_left)
    training.models.append(_drops_mask)


def _pad_left(fields: Fields) -> Fields:
    """Move the padding of every row to its left."""
    moved = dict(fields)
    lengths = fields["attention_mask"].sum(1).tolist()
    for name in ("input_ids", "attention_mask", "labels"):
        width = fields[name].shape[1]
        moved[name] = torch.stack([torch.roll(row, width - length) for row, length in zip(fields[name], lengths, strict=True)])
    return moved


def _drops_mask(model: nn.Module) -> None:
    inner: Any = of(model, "model")
    taking(inner, lambda kwargs: {**kwargs, "attention_mask": torch.ones_like(kwargs["attention_mask"])})


def audio_branch_zeroed(training: Training) -> None:
    """The audio feed-forwards were left out when the checkpoint was converted: they give 0 and are frozen."""

    def zero(model: nn.Module) -> None:
        for layer in training.case.dual_layers:
            branch = of(model, f"{layer}.audio_mlp")
            with torch.no_grad():
                branch.down_proj.weight.zero_()
            branch.requires_grad_(False)

    training.models.append(zero)


def audio_routed_to_text_branch(training: Training) -> None:
    """The routing mask is empty: audio positions go through the text branch, and the audio branch gets none."""
    name = "audio_token_mask" if training.case.name == HIGGS else "audio_out_mask"

    def change(kwargs: dict[str, Any]) -> dict[str, Any]:
        mask: Tensor = kwargs[name]
        return {**kwargs, name: torch.zeros_like(mask)}

    def route(model: nn.Module) -> None:
        for layer in training.case.dual_layers:
            taking(of(model, layer), change)

    training.models.append(route)


KINDS: tuple[Kind, ...] = (
    kind("heads", "codebook-dead", codebook_rows_zeroed, HIGGS, ORIGINAL),
    kind("heads", "prediction-collapsed", head_forces_one_token, LLAMA, QWEN, also=["gradient-exploding", "reference-ignored"]),
    kind(
        "attention",
        "attention-collapsed",
        temperature_far_too_low,
        LLAMA,
        QWEN,
        also=["attention-on-first-token", "gradient-exploding", "activation-exploding"],
    ),
    kind("attention", "attention-uniform", queries_zero, LLAMA, QWEN, HIGGS, also=["part-without-gradient"]),
    kind("attention", "attention-uniform", encoder_queries_zero, WHISPER, also=["part-without-gradient"]),
    kind("attention", "attention-on-first-token", only_first_token_visible, LLAMA, also=["attention-collapsed"]),
    kind("attention", "attention-on-padding", padding_visible, LLAMA, QWEN),
    kind("attention", "branch-dead", audio_branch_zeroed, HIGGS, ORIGINAL, also=["activation-vanishing", "part-without-gradient"]),
    kind("attention", "branch-dead", audio_routed_to_text_branch, HIGGS, ORIGINAL, also=["part-without-gradient"]),
)
