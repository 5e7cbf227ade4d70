"""Samples of a record: which are left out, what they hold, and why there is no word error rate."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from models import CASES
from probe.assemble import samples
from probe.assemble.draft import Draft
from probe.assemble.text import Decoder
from probe.records import Head, Site

TOKENIZER = CASES["llama"].tokenizer()
TEXT = Site("lm_head", "lm_head", "", modality="text")


def ids(text: str) -> list[int]:
    return TOKENIZER(text, add_special_tokens=False)["input_ids"]


def draft(rows: list[tuple[str, str]], *tokenizers: Any, reasons: dict[str, str] | None = None) -> Draft:
    """A step whose samples were predicted and labelled with these texts; shorter ones end in -100."""
    width = max(len(ids(target)) for _, target in rows) + 2
    predicted, target = (np.full((len(rows), width), fill, dtype=np.float64) for fill in (5, -100))
    for row, pair in enumerate(rows):
        for array, text in zip((predicted, target), pair, strict=True):
            array[row, : len(ids(text))] = ids(text)
    host = SimpleNamespace(local={"predicted:lm_head": predicted, "target:lm_head": target}, cells={}, facts={}, reasons={})
    made = Draft(host, SimpleNamespace(decoder=Decoder(list(tokenizers), print)))  # type: ignore[arg-type]
    made.reasons.update(reasons or {})
    return made


def test_samples() -> None:
    """A sample without a label is left out, and the others keep their numbers; each has its ids, texts and word errors."""
    made = draft([("a fix runs</s>", "a fox runs</s>"), ("", ""), ("you", "you")], TOKENIZER)
    first, last = samples.samples(made, TEXT)
    assert (first.index, last.index) == (0, 2)
    assert first.target == tuple(ids("a fox runs</s>"))
    assert (first.target_text, first.predicted_text) == ("a fox runs</s>", "a fix runs</s>")
    assert first.word_error_rate == pytest.approx(1 / 3)
    assert "".join(last.predicted_pieces) == "you"
    head = Head("lm_head", "text", 1, shown=(first, last))
    samples.word_errors(made, [head], "nothing")
    assert made.metrics[samples.WORDS] == pytest.approx(1 / 6)


def test_pieces_are_of_few_tokens_of_few_samples() -> None:
    """Text token by token is kept of the first 64 tokens of four samples; the rest has its whole text."""
    found = samples.samples(draft([("ab" * 50, "xy" * 50)] * 6, TOKENIZER), TEXT)
    assert [len(sample.target_pieces) for sample in found] == [64, 64, 64, 64, 0, 0]
    assert all(sample.target_text == "xy" * 50 for sample in found)


@pytest.mark.parametrize(
    ("tokenizers", "rows", "reasons", "why"),
    [
        ((), [("a", "b")], {}, "no tokenizer"),
        ((TOKENIZER,), [("a", "  ")], {}, "no shown sample has a word"),
        ((TOKENIZER,), [("", "")], {}, "not labelled"),
        ((TOKENIZER,), [("", "")], {"inputs/text": "left out by keep_text=False"}, "left out by keep_text=False"),
    ],
)
def test_why_there_is_no_rate(tokenizers: tuple[Any, ...], rows: list[tuple[str, str]], reasons: dict[str, str], why: str) -> None:
    """Each way to have no rate has its own reason."""
    made = draft(rows, *tokenizers, reasons=reasons)
    head = Head("lm_head", "text", 1, shown=samples.samples(made, TEXT))
    samples.word_errors(made, [head], "not labelled")
    assert samples.WORDS not in made.metrics
    assert why in made.reasons[samples.WORDS]


def test_a_head_that_was_evaluated_has_no_rate() -> None:
    """Of a head that the model did without the reason is what its numbers rest on."""
    made = draft([("", "")], TOKENIZER)
    samples.word_errors(made, [Head("lm_head", "text", 0, evaluated="256 sampled of 900")], "not labelled")
    assert made.reasons[samples.WORDS] == "256 sampled of 900"
