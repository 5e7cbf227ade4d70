"""What a tokenizer says of its ids: how many there are, and which tokens were added to those that it was loaded with."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers.utils.hub import cached_file

_FILES = ("tokenizer_config.json", "tokenizer.json")


@dataclass(frozen=True, slots=True)
class TokenizerFacts:
    """What is known of a tokenizer.

    Attributes:
        size: Highest id, plus 1.
        added: Ids, in order, of tokens beyond the base vocabulary that the tokenizer was not loaded with; ``None`` where that is not known.
    """

    size: int
    added: tuple[int, ...] | None = None


def read_tokenizer(processors: Iterable[Any]) -> TokenizerFacts | None:
    """Read the first tokenizer among these (or inside a processor among them); ``None`` without one.

    Released tokenizers keep their own special tokens beyond the base vocabulary, too (Whisper's languages and timestamps, Llama's
    reserved tokens), and nothing in memory tells these from tokens that a script adds. What tells is what the tokenizer was loaded
    from: transformers 5 keeps it, for 4.x its files are read again, from its folder or from the cache, never from the network. Of a
    tokenizer that was made in memory, special tokens belong to how it was made, and the others were added.
    """
    for processor in processors:
        tokenizer = getattr(processor, "tokenizer", processor)
        ids = _vocabulary(tokenizer)
        if ids:
            return TokenizerFacts(max(ids.values()) + 1, _added(tokenizer))
    return None


def _vocabulary(tokenizer: Any) -> Mapping[str, int]:
    get = getattr(tokenizer, "get_vocab", None)
    try:
        found = get() if callable(get) else {}
    except Exception:  # code of any tokenizer; the base class of transformers raises NotImplementedError
        return {}
    return found if isinstance(found, Mapping) else {}


def _added(tokenizer: Any) -> tuple[int, ...] | None:
    beyond, base = getattr(tokenizer, "added_tokens_decoder", None), getattr(tokenizer, "vocab_size", None)
    if not isinstance(beyond, Mapping) or not isinstance(base, int):
        return None
    known = _loaded_with(tokenizer)
    if known is None and getattr(tokenizer, "name_or_path", None):
        return None
    if known is None:
        known = {_content(token) for token in beyond.values() if getattr(token, "special", True)}
    return tuple(sorted(number for number, token in beyond.items() if number >= base and _content(token) not in known))


def _loaded_with(tokenizer: Any) -> set[str] | None:
    """Return the added tokens that a tokenizer came with; ``None`` if it does not come from files that can be read."""
    kept = getattr(tokenizer, "init_kwargs", {}).get("added_tokens_decoder")
    if isinstance(kept, Mapping) and kept:
        return {_content(token) for token in kept.values()}
    origin = getattr(tokenizer, "name_or_path", "")
    for name in _FILES if isinstance(origin, str) and origin else ():
        found = _read(origin, name)
        listed: Any = found.get("added_tokens_decoder", found.get("added_tokens"))
        if isinstance(listed, (Mapping, list)):
            return {_content(token) for token in (listed.values() if isinstance(listed, Mapping) else listed)}
    return None


def _read(origin: str, name: str) -> Mapping[str, Any]:
    try:
        path = Path(origin, name)
        if not path.is_file():
            path = Path(str(cached_file(origin, name, local_files_only=True)))
        found = json.loads(path.read_text(encoding="utf-8"))
    except Exception:  # whatever is wrong with a cache or a file: then it is not known what the tokenizer was loaded with
        return {}
    return found if isinstance(found, Mapping) else {}


def _content(token: Any) -> str:
    return str(token.get("content", "")) if isinstance(token, Mapping) else str(token)


def runs_of(ids: Sequence[int]) -> list[tuple[int, int]]:
    """Return ids, in order, as ranges from the first to the one past the last."""
    runs: list[tuple[int, int]] = []
    for number in ids:
        if runs and runs[-1][1] == number:
            runs[-1] = (runs[-1][0], number + 1)
        else:
            runs.append((number, number + 1))
    return runs
