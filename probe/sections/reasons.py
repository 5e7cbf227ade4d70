"""Which section shows which reason of ``StepRecord.not_measured``: one table from the key's prefix, so that none is lost."""

from __future__ import annotations

from collections.abc import Iterable

from probe.records import StepRecord
from probe.sections.blocks import Block, Fact, Facts

INPUT = "Input"
OUTPUT = "Output"
ATTENTION = "Shared attention"
VERIFICATION = "Zero-shot verification"

# A prefix counts when the key ends with it or goes on with one of "/", ":", ".", "[". What fits none is shown in VERIFICATION.
PREFIXES: dict[str, str] = {
    "inputs": INPUT,
    "input": INPUT,
    "probe/input": INPUT,
    "heads": OUTPUT,
    "head": OUTPUT,
    "lm_head": OUTPUT,
    "labels": OUTPUT,
    "text": OUTPUT,
    "audio": OUTPUT,
    "probe/text": OUTPUT,
    "probe/audio": OUTPUT,
    "probe/loss": OUTPUT,
    "probe/loss_audit": OUTPUT,
    "attention": ATTENTION,
    "probe/attention": ATTENTION,
    "branches": ATTENTION,
    "feed_forward": ATTENTION,
    "probe/feed_forward": ATTENTION,
    "audio_encoder": VERIFICATION,
    "projector": VERIFICATION,
    "conditioning": VERIFICATION,
    "statistics": VERIFICATION,
    "parts": VERIFICATION,
    "grad": VERIFICATION,
    "optimisation": VERIFICATION,
    "probe/audio_encoder": VERIFICATION,
    "probe/projector": VERIFICATION,
    "probe/grad": VERIFICATION,
    "probe/learning_rate": VERIFICATION,
}
_UNKNOWN = "the record gives no reason"


def section_of(key: str) -> str:
    """Return the title of the section that shows the reason under ``key``."""
    return next((title for prefix, title in PREFIXES.items() if _begins(key, prefix)), VERIFICATION)


def _begins(key: str, prefix: str) -> bool:
    return key.startswith(prefix) and (len(key) == len(prefix) or key[len(prefix)] in "/:.[")


class Reasons:
    """The reasons that one section still has to show, while it is put together."""

    def __init__(self, record: StepRecord, title: str) -> None:
        self._reasons = record.not_measured
        self._title = title
        self._shown: set[str] = set()

    def fact(self, label: str, value: str | None, *keys: str) -> Fact:
        """Return the value, or "not measured" with the reason under the first of ``keys`` that has one."""
        return Fact(label, value) if value is not None else Fact(label, self.missing(*keys), "missing")

    def missing(self, *keys: str) -> str:
        """Return "not measured: <reason>", and count that reason as shown.

        A key finds its own reason, else those below it: "attention" finds "attention:model.layers.0.self_attn".
        """
        for key in keys:
            found = [key] if key in self._reasons else [name for name in self._reasons if _begins(name, key)]
            if found:
                reason = self._reasons[found[0]]
                self._shown.update(name for name in found if self._reasons[name] == reason)
                # Metrics that lack for the same reason say nothing new; a site would.
                self._shown.update(name for name in self._reasons if name.startswith("probe/") and self._reasons[name] == reason)
                return f"not measured: {reason}"
        return f"not measured: {_UNKNOWN}"

    def known(self, *keys: str) -> bool:
        """Whether the record has a reason under one of ``keys``."""
        return any(_begins(name, key) for key in keys for name in self._reasons)

    def rest(self) -> tuple[Block, ...]:
        """Return what this section has to show and has not yet, equal reasons together."""
        by_reason: dict[str, list[str]] = {}
        for key, reason in self._reasons.items():
            if key not in self._shown and section_of(key) == self._title:
                by_reason.setdefault(reason, []).append(key)
        rows = tuple(Fact(_names(keys), f"not measured: {reason}", "missing") for reason, keys in by_reason.items())
        return (Facts(rows, "Also missing"),) if rows else ()


def _names(keys: Iterable[str]) -> str:
    first, *others = keys
    return f"{first} and {len(others)} more" if others else first
