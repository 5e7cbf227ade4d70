"""Token ids as text: special tokens visible, unknown ids named by their position, long repetitions folded."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import groupby
from typing import Any, TypeVar

T = TypeVar("T")

FOLD = 8
"""A token repeated at least this often in a row is written once, with its count (audio placeholders come by the hundred)."""


class Decoder:
    """Turns ids into text with the user's tokenizer, and never fails: what the tokenizer cannot decode is named or left as ids."""

    def __init__(self, processors: Sequence[Any], say: Callable[[str], None]) -> None:
        """Decode with the first of these that is a tokenizer or a processor that holds one; ``say`` hears once if it cannot decode."""
        candidates = [found for p in processors for found in (getattr(p, "tokenizer", None), p) if hasattr(found, "decode")]
        self._tokenizer = candidates[0] if candidates else None
        self._say = say
        none = "no tokenizer: give one with attach(tokenizer=) or as the Trainer's processing_class"
        self.reason = none if self._tokenizer is None else ""

    def text(self, ids: Sequence[int]) -> str | None:
        """Return the text of ids; ``None`` if there is no tokenizer that works (``reason`` says why)."""
        return self._tried(lambda: "".join(self._parts(list(ids))))

    def plain(self, ids: Sequence[int]) -> str | None:
        """Return the text of ids without special tokens and without ids that the tokenizer does not know; ``None`` as :meth:`text`."""
        return self._tried(lambda: self._decode([token for token in ids if self._knows(token)], skip=True))

    def pieces(self, ids: Sequence[int], *, after: Sequence[int]) -> tuple[str, ...]:
        """Return the text of each id as it stands after the id before it; ``()`` if there is no tokenizer that works.

        Args:
            ids: Position by position.
            after: The ids that were there before: the one before position i is ``after[i - 1]``.
        """
        pairs = zip((None, *after), ids)
        return self._tried(lambda: tuple(self._piece(before, token) for before, token in pairs)) or ()

    def _tried(self, make: Callable[[], T]) -> T | None:
        if self._tokenizer is None:
            return None
        try:
            return make()
        except Exception as error:  # a user's tokenizer may raise anything
            self.reason = f"the tokenizer cannot decode ({type(error).__name__}: {error}); ids are shown instead"
            self._tokenizer = None
            self._say(self.reason)
            return None

    def _piece(self, before: int | None, token: int) -> str:
        """Decode one id. Alone, many tokenizers drop the space that it begins with, hence with the one before, which is taken off again."""
        if not self._knows(token):
            return f"[id {token}]"
        if before is None or not self._knows(before):
            return self._decode([token])
        first, both = self._decode([before]), self._decode([before, token])
        return both[len(first) :] if both.startswith(first) else self._decode([token])

    def _knows(self, token: int) -> bool:
        known = self._vocabulary()
        return token >= 0 and (known is None or token < known)

    def _parts(self, ids: list[int]) -> Iterator[str]:
        known = self._vocabulary()
        position = 0
        plain: list[int] = []
        for token, run in groupby(ids):
            length = len(list(run))
            inside = token >= 0 and (known is None or token < known)
            if inside and length < FOLD:
                plain += [token] * length
            else:
                yield self._decode(plain)
                plain = []
                yield self._run(token, length, position, inside, known)
            position += length
        yield self._decode(plain)

    def _run(self, token: int, length: int, position: int, inside: bool, known: int | None) -> str:
        if inside:
            return f"{self._decode([token])}(x{length})"
        places = f"position {position}" if length == 1 else f"positions {position} to {position + length - 1}"
        return f"[id {token} at {places} is outside the tokenizer's {known} tokens]"

    def _decode(self, ids: list[int], *, skip: bool = False) -> str:
        assert self._tokenizer is not None
        if not ids:
            return ""
        return str(self._tokenizer.decode(ids, skip_special_tokens=skip, clean_up_tokenization_spaces=False))

    def _vocabulary(self) -> int | None:
        try:
            return len(self._tokenizer)  # type: ignore[arg-type]  # added tokens count, which vocab_size leaves out
        except TypeError:
            size = getattr(self._tokenizer, "vocab_size", None)
            return size if isinstance(size, int) else None
