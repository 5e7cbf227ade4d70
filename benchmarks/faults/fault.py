"""What a fault is: a few lines that break a healthy training, with the finding expected, written down before any rule was."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from benchmarks.faults.training import Training


@dataclass(frozen=True)
class Kind:
    """A fault of several models.

    Attributes:
        name: In words joined by hyphens; the split is by this name, so that the same fault of two models lies in one part.
        area: Of the findings.
        models: The cases that it is put into.
        expected: The finding that names it.
        also: Findings that are right, too: what follows from the fault, or another name for it.
        inject: Changes a healthy training. Its docstring says what goes wrong.
    """

    name: str
    area: str
    models: tuple[str, ...]
    expected: str
    inject: Callable[[Training], None]
    also: frozenset[str] = frozenset()

    @property
    def note(self) -> str:
        """What goes wrong, in one line."""
        return (self.inject.__doc__ or "").strip().split("\n")[0]


@dataclass(frozen=True)
class Fault:
    """One fault of one model."""

    kind: Kind
    model: str

    @property
    def name(self) -> str:
        """Return ``model/kind``."""
        return f"{self.model}/{self.kind.name}"


def each(kinds: Iterable[Kind]) -> Iterator[Fault]:
    """Yield every kind in every model that it is put into."""
    for kind in kinds:
        for model in kind.models:
            yield Fault(kind, model)


def kind(area: str, expected: str, inject: Callable[[Training], None], *models: str, also: Iterable[str] = (), name: str = "") -> Kind:
    """Return a kind that is called like its function unless named otherwise."""
    return Kind(name or inject.__name__.replace("_", "-"), area, models, expected, inject, frozenset(also))
