"""The part of the verification that says whether the audio is used: the verdict, what each change of the audio did, by group, the cost."""

from __future__ import annotations

from collections.abc import Sequence

from probe.counterfactual.groups import GroupRow, by_group
from probe.records import Counterfactual, Effect, Intervention, Modality, StepRecord, Verdict
from probe.sections.blocks import Block, Column, Fact, Facts, Table, Tone
from probe.sections.numbers import MISSING, counted, fixed, number, share
from probe.sections.reasons import Reasons

EFFECTIVENESS = "Reference Audio Conditioning Effectiveness"
CONSISTENCY = "Voice Cloning Consistency"
ADAPTATION = "Cross-Lingual Adaptation"
TABLE = "What became of the predictions when the audio was changed"
GROUPS = "Cross-lingual adaptation: the same by group"

_KEY = "counterfactual"
_CHANGES: dict[Intervention, str] = {"swap": "another sample's", "silence": "silence", "reverse": "reversed in time"}
_MOST_GROUPS = 12


def conditioning_blocks(record: StepRecord, reasons: Reasons) -> tuple[Block, ...]:
    """Return the three answers, and for a step with counterfactual passes its tables and what the passes took."""
    passes = record.counterfactual
    groups = _groups(record)
    facts = [_effectiveness(record, reasons), _consistency(record, reasons), _adaptation(record, groups, reasons)]
    if passes is None:
        return (Facts(tuple(facts)),)
    facts += [_undone(what, reasons) for what in _CHANGES if not _of(passes, what) and reasons.known(f"{_KEY}/{what}")]
    tables = (_effects(passes, reasons),) if passes.effects else ()
    by_groups = (_by_group(groups),) if len(groups) > 1 else ()
    return (Facts((*facts, _cost(passes, reasons))), *tables, *by_groups)


def _effectiveness(record: StepRecord, reasons: Reasons) -> Fact:
    verdict = record.verdict
    if verdict is None:
        return reasons.fact(EFFECTIVENESS, None, "verdict", _KEY, "probe/reference/delta_loss_swap")
    over = f"{verdict.modality} tokens, {counted(verdict.passes, 'pass')}" if verdict.passes else f"{verdict.modality} tokens"
    return Fact(EFFECTIVENESS, f"{verdict.use} ({over}): {verdict.because}", _tone(verdict))


def _tone(verdict: Verdict) -> Tone:
    """Critical where a model that speaks does not clone; a model that writes may have been asked nothing that only the audio tells."""
    if verdict.use == "ignored":
        return "critical" if verdict.modality == "audio" else "warning"
    return {"used": "plain", "weak": "warning", "leaked": "critical"}[verdict.use]  # type: ignore[return-value]


def _consistency(record: StepRecord, reasons: Reasons) -> Fact:
    """Return the share of samples better off with their own audio: pooled as the verdict is, else of this step."""
    verdict, effect = record.verdict, _main(record.counterfactual)
    pooled = None if verdict is None else verdict.evidence.get("win_rate")
    if verdict is not None and pooled is not None:
        over = f"{verdict.modality} tokens, {counted(verdict.passes, 'pass')}"
        return Fact(CONSISTENCY, f"{share(pooled)} of samples are predicted better with their own audio than with another's ({over})")
    words = None
    if effect is not None and effect.win_rate is not None:
        whose = f"of {counted(effect.samples, 'sample')}"
        words = f"{share(effect.win_rate)} {whose} predicted better with their own audio than with another's ({effect.modality} tokens)"
    return reasons.fact(CONSISTENCY, words, "probe/reference/win_rate", f"{_KEY}/swap", _KEY)


def _adaptation(record: StepRecord, groups: Sequence[GroupRow], reasons: Reasons) -> Fact:
    """Return how far apart the groups are in what another's audio costs; with one group, its name."""
    named = [row for row in groups if row.delta_loss_swap is not None]
    if len(named) > 1:
        ordered = sorted(named, key=lambda row: row.delta_loss_swap or 0.0)
        least, most = ordered[0], ordered[-1]
        words = (
            f"another's audio costs from {_signed(least.delta_loss_swap)} ({least.group}) to {_signed(most.delta_loss_swap)} nats a token"
        )
        return Fact(ADAPTATION, f"{words} ({most.group}), {counted(len(named), 'group')}")
    if len(groups) == 1:
        return Fact(ADAPTATION, f"not measured: all samples of this step are of the group {groups[0].group!r}", "missing")
    if record.counterfactual is not None and not groups and not reasons.known(f"{_KEY}/groups"):
        why = "no sample carries a group (a language token, or the column that Settings.group_by names)"
        return Fact(ADAPTATION, f"not measured: {why}", "missing")
    return reasons.fact(ADAPTATION, None, f"{_KEY}/groups", f"{_KEY}/swap", _KEY)


def _undone(what: Intervention, reasons: Reasons) -> Fact:
    return Fact(f"  with {_CHANGES[what]}", reasons.missing(f"{_KEY}/{what}"), "missing")


def _cost(passes: Counterfactual, reasons: Reasons) -> Fact:
    took = None if passes.cost_ms is None else f"{number(passes.cost_ms)} ms on this rank"
    changed = f"; changed: {', '.join(passes.inputs)}" if passes.inputs else ""
    return reasons.fact("Cost of the passes", None if took is None else took + changed, "probe/reference/cost_ms", _KEY)


def _of(passes: Counterfactual, what: Intervention) -> list[Effect]:
    return [effect for effect in passes.effects if effect.intervention == what]


def _main(passes: Counterfactual | None) -> Effect | None:
    """Return the effect of another's audio on the audio tokens if there are any, else on the text."""
    swaps: dict[Modality, Effect] = {} if passes is None else {effect.modality: effect for effect in _of(passes, "swap") if effect.tokens}
    return swaps.get("audio", swaps.get("text"))


def _effects(passes: Counterfactual, reasons: Reasons) -> Table:
    columns = (
        Column("audio"),
        Column("tokens"),
        Column("samples", True),
        Column("labelled", True),
        Column("extra loss", True),
        Column("better with own", True),
        Column("KL", True),
    )
    rows = tuple(
        (
            _CHANGES[effect.intervention],
            effect.modality,
            f"{effect.samples:,}",
            f"{effect.tokens:,}",
            _with_error(effect),
            share(effect.win_rate),
            fixed(effect.divergence, 4),
        )
        for effect in passes.effects
    )
    as_it_is = {effect.modality: effect.loss for effect in passes.effects if effect.loss is not None}
    plain = ", ".join(f"{modality} {fixed(loss)}" for modality, loss in as_it_is.items())
    caption = "the last micro-batch again in eval mode; nats a labelled token, ± standard error over samples"
    shares = [effect for effect in passes.effects if effect.tokens and effect.win_rate is None]
    footer = "; ".join(dict.fromkeys(f"better with own: {reasons.missing(_win_key(e), f'{_KEY}/{e.modality}/samples')}" for e in shares))
    return Table(TABLE, columns, rows, f"{caption}; as it is: {plain}" if plain else caption, footer)


def _win_key(effect: Effect) -> str:
    return f"probe/reference/{effect.modality}/win_rate"


def _with_error(effect: Effect) -> str:
    if effect.delta_loss is None:
        return MISSING
    return _signed(effect.delta_loss) + ("" if effect.delta_loss_error is None else f" ± {fixed(effect.delta_loss_error)}")


def _signed(value: float | None) -> str:
    return MISSING if value is None else f"{value:+.3f}"


def _groups(record: StepRecord) -> list[GroupRow]:
    """Return the rows of this step's samples by group, of audio tokens if any sample has them, else of text; without the nameless."""
    rows = [row for row in by_group([record]) if row.group]
    spoken = [row for row in rows if row.modality == "audio"]
    return spoken or rows


def _by_group(groups: Sequence[GroupRow]) -> Table:
    columns = (
        Column("group"),
        Column("samples", True),
        Column("loss", True),
        Column("another's", True),
        Column("silence", True),
        Column("reversed", True),
        Column("better with own", True),
    )
    rows = tuple(
        (
            row.group,
            f"{row.samples:,}",
            fixed(row.loss),
            _signed(row.delta_loss_swap),
            _signed(row.delta_loss_silence),
            _signed(row.delta_loss_reverse),
            share(row.win_rate),
        )
        for row in groups[:_MOST_GROUPS]
    )
    left = len(groups) - len(rows)
    footer = f"and {counted(left, 'group')} more in the record" if left else ""
    caption = f"{groups[0].modality} tokens, samples of this rank; loss as it is and what each change adds, nats a labelled token"
    return Table(GROUPS, columns, rows, caption, footer)
