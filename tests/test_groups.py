"""Samples pooled by group over records, and the languages that tokens name."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from probe.counterfactual.groups import GroupRow, by_group, language_tokens
from probe.records import Counterfactual, SampleEffect
from records_factory import text_record

pytestmark = pytest.mark.pure  # of torch and probe alone: the same with every transformers


def record(*samples: SampleEffect) -> Any:
    return text_record(counterfactual=Counterfactual(("input_features",), samples=samples))


def test_samples_are_pooled_over_records() -> None:
    """Losses and differences are means over tokens, the win rate is over samples, a tie counts half."""
    rows = by_group(
        [
            record(
                SampleEffect(0, "text", "en", 10, 1.0, swap=2.0, silence=3.0),
                SampleEffect(1, "text", "de", 5, 2.0, swap=1.0, silence=2.5, reverse=2.0),
            ),
            text_record(),
            record(SampleEffect(0, "text", "en", 30, 2.0, swap=2.0)),
        ]
    )
    assert [row.group for row in rows] == ["de", "en"]
    assert rows[0] == GroupRow("de", "text", 1, 5, 2.0, -1.0, 0.5, 0.0, 0.0)
    assert rows[1] == GroupRow("en", "text", 2, 40, 1.75, 0.25, 2.0, None, 0.75)


def test_modalities_are_apart() -> None:
    """Text and audio of the same samples are two rows."""
    rows = by_group([record(SampleEffect(0, "text", "", 1, 1.0, swap=2.0), SampleEffect(0, "audio", "", 2, 3.0, swap=3.5))])
    assert [(row.modality, row.delta_loss_swap, row.win_rate) for row in rows] == [("audio", 0.5, 1.0), ("text", 1.0, 1.0)]


def test_what_no_sample_has_is_none() -> None:
    """Without a pass there is no row; without an intervention there is no number."""
    assert by_group([text_record()]) == ()
    row = by_group([record(SampleEffect(0, "text", "en", 4, 1.5, reverse=1.0))])[0]
    assert (row.delta_loss_swap, row.delta_loss_silence, row.win_rate, row.delta_loss_reverse) == (None, None, None, -0.5)


class Tokenizer:
    def __init__(self, **added: int) -> None:
        self.added = {f"<|{name}|>": number for name, number in added.items()}

    def get_added_vocab(self) -> dict[str, int]:
        return self.added


def test_languages_come_from_the_generation_config() -> None:
    """Whisper's own table is taken where there is one."""
    model = SimpleNamespace(generation_config=SimpleNamespace(lang_to_id={"<|en|>": 50259, "<|haw|>": 50352}))
    assert language_tokens(model, [Tokenizer(de=7)]) == {50259: "en", 50352: "haw"}


def test_languages_come_from_the_tokenizer_else() -> None:
    """Added tokens of two or three letters, of the first tokenizer, also inside a processor; what is longer names no language."""
    processor = SimpleNamespace(tokenizer=Tokenizer(de=7, yue=8, transcribe=9, EN=10))
    assert language_tokens(object(), [None, object(), processor, Tokenizer(fr=1)]) == {7: "de", 8: "yue"}
    assert language_tokens(object(), [None]) == {}
