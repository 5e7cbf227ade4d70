"""Ids as text: special tokens visible, unknown ids named by position, and no tokenizer can make it fail."""

from __future__ import annotations

from typing import Any

import pytest

from models import CASES
from probe.assemble.text import Decoder

TOKENIZER = CASES["llama"].tokenizer()


def ids_of(text: str) -> list[int]:
    return TOKENIZER(text, add_special_tokens=False)["input_ids"]


def test_special_tokens_are_visible() -> None:
    """Nothing is skipped and spaces are not tidied."""
    assert Decoder([TOKENIZER], print).text(ids_of("<s>hello , you</s>")) == "<s>hello , you</s>"


def test_an_id_outside_the_vocabulary_is_named_by_its_position() -> None:
    """Text before and after an unknown id is still decoded; the id and where it stands are told."""
    size = len(TOKENIZER)
    ids = [*ids_of("ab"), size + 5, *ids_of("cd"), -1, -1]
    text = Decoder([TOKENIZER], print).text(ids)
    assert text == (
        f"ab[id {size + 5} at position 2 is outside the tokenizer's {size} tokens]cd"
        f"[id -1 at positions 5 to 6 is outside the tokenizer's {size} tokens]"
    )


def test_long_repetitions_are_folded() -> None:
    """A placeholder that comes by the hundred is written once, with its count; short runs stay."""
    ids = ids_of("<s>") * 300 + ids_of("aaa")
    assert Decoder([TOKENIZER], print).text(ids) == "<s>(x300)aaa"


def test_a_processor_is_opened_and_what_cannot_decode_is_passed_over() -> None:
    """The first of the candidates that holds or is a tokenizer decodes; feature extractors do not."""

    class Processor:
        tokenizer = TOKENIZER

    assert Decoder([None, object(), Processor()], print).text(ids_of("ab")) == "ab"


def test_without_a_tokenizer_there_is_a_reason() -> None:
    """No text, and the reason says how to get it."""
    decoder = Decoder([None], print)
    assert decoder.text([1]) is None
    assert "attach(tokenizer=)" in decoder.reason


@pytest.mark.parametrize("error", [IndexError, OverflowError, NotImplementedError])
def test_a_tokenizer_that_fails_is_said_once_and_ids_are_shown_instead(error: type[Exception]) -> None:
    """Whatever a user's tokenizer raises ends here: one line, then no text any more."""

    class Broken:
        vocab_size = 10

        def decode(self, ids: Any, **kwargs: Any) -> str:
            raise error("no")

    said: list[str] = []
    decoder = Decoder([Broken()], said.append)
    assert decoder.text([1]) is None
    assert decoder.text([2]) is None
    assert len(said) == 1
    assert f"cannot decode ({error.__name__}: no); ids are shown instead" in said[0]
    assert decoder.reason == said[0]


def test_plain_text_is_without_special_tokens() -> None:
    """Special tokens, and ids that the tokenizer does not know, are left out."""
    ids = [*ids_of("<s>hello you"), len(TOKENIZER) + 3, -1, *ids_of("</s>")]
    assert Decoder([TOKENIZER], print).plain(ids) == "hello you"
    assert Decoder([None], print).plain(ids) is None


def test_pieces_join_to_the_text() -> None:
    """Each id's text stands as in its context: joined they are the text, where the tokenizer drops spaces at a beginning, too."""
    ids = ids_of("<s>a fox runs</s>")
    assert "".join(Decoder([TOKENIZER], print).pieces(ids, after=ids)) == "<s>a fox runs</s>"

    class Dropping:
        """Decodes as SentencePiece tokenizers do: the space before the first word is dropped."""

        words = ("▁the", "▁fox", "es", "▁run")

        def __len__(self) -> int:
            return len(self.words)

        def decode(self, ids: Any, **kwargs: Any) -> str:
            return "".join(self.words[token] for token in ids).replace("▁", " ").removeprefix(" ")

    decoder = Decoder([Dropping()], print)
    assert decoder.pieces([0, 1, 2, 3], after=[0, 1, 2, 3]) == ("the", " fox", "es", " run")
    assert decoder.pieces([0, 3, 3, 9], after=[0, 1, 2, 3]) == ("the", " run", " run", "[id 9]")
    assert decoder.pieces([1, 3], after=[7, 1]) == ("fox", "run")
    assert Decoder([None], print).pieces([1], after=[1]) == ()


def test_pieces_of_half_characters() -> None:
    """A token that is half a character is shown by itself, not taken from the middle of its neighbour."""

    class Bytes:
        def __len__(self) -> int:
            return 256

        def decode(self, ids: Any, **kwargs: Any) -> str:
            return bytes(ids).decode(errors="replace")

    assert Decoder([Bytes()], print).pieces(list("é".encode()), after=list("é".encode())) == ("\ufffd", "\ufffd")
