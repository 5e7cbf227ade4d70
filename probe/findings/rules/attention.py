"""Rules about what layers attend to (one key, all alike, the first, padding), and about feed-forward branches that do nothing."""

from __future__ import annotations

from collections.abc import Callable
from statistics import median

from probe.findings.rule import History, Rule, Symptom
from probe.findings.rules.streaks import newest, newest_rows
from probe.records import Attention, SiteStatistics, StepRecord

RECORDS = 3

KEYS = 8
"""Keys that a layer must have before its distribution says anything."""

COLLAPSED = 0.01
"""Relative entropy of a head that looks at one key: 0.999 on one of 100 keys gives 0.003, 0.99 gives 0.02."""

UNIFORM = 1e-6
"""How near the relative entropy must be to 1. Scores of a standard deviation s lower it by about s²/2 ÷ ln K; weights freshly initialised
at 0.02 give s = 0.01 in a layer 32 wide, so 1e-5 and more. Rounding leaves 1e-7."""

FIRST = 0.98
"""Mass on the first key."""

SINKS = 0.5
"""Median mass on the first key in the other layers from which on it is the attention sink of language models, which most layers share."""

PADDING = 0.01
"""Mass on padding: a masked key has exactly 0, a hundredth is no rounding."""


_COLLAPSED_WORDS = f"every head looks at a single key: relative entropy at most {{:.4f}} (bound: {COLLAPSED}), {RECORDS} times in a row"
_FIRST_WORDS = f"every head puts at least {{:.1%}} of its attention on the first key (bound: {FIRST:.0%}), {RECORDS} times in a row"


def attention_collapsed(history: History) -> list[Symptom] | None:
    """Judge layers in which every head looks at a single key, other than the first."""

    def collapsed(layer: Attention) -> float | None:
        entropies = _heads(layer, "entropy")
        stuck = _all(_heads(layer, "first_token"), lambda mass: mass > FIRST)  # told by its own rule
        return max(entropies) if _all(entropies, lambda entropy: entropy < COLLAPSED) and not stuck else None

    found = _lasting(history, "entropy", collapsed)
    return None if found is None else [_at(layer, _COLLAPSED_WORDS.format(value), entropy=value, bound=COLLAPSED) for layer, value in found]


def attention_uniform(history: History) -> list[Symptom] | None:
    """Judge layers in which every head looks at all keys alike, unless all layers of that kind do."""

    def uniform(layer: Attention) -> float | None:
        entropies = _heads(layer, "entropy")
        return min(entropies) if _all(entropies, lambda entropy: 1 - entropy < UNIFORM) else None

    found = _lasting(history, "entropy", uniform)
    if found is None:
        return None
    layers = [
        layer for record in history.records[-RECORDS:] for layer in record.attention if layer.keys >= KEYS and _heads(layer, "entropy")
    ]
    varied = {layer.kind for layer in layers if uniform(layer) is None}  # in any of the records: layerdrop leaves out some layers of each
    words = f"every head looks at all keys alike: 1 - relative entropy below {UNIFORM:g}, {RECORDS} times in a row"
    return [_at(layer, words, entropy=value, bound=1 - UNIFORM) for layer, value in found if layer.kind in varied]


def attention_on_first_token(history: History) -> list[Symptom] | None:
    """Judge layers in which every head looks at nothing but the first key."""

    def stuck(layer: Attention) -> float | None:
        masses = _heads(layer, "first_token")
        return min(masses) if _all(masses, lambda mass: mass > FIRST) else None

    found = _lasting(history, "first_token", stuck)
    if found is None:
        return None
    return [
        _at(layer, _FIRST_WORDS.format(value), first_token=value, bound=FIRST)
        for layer, value in found
        if not _is_usual_sink(history.last, layer)
    ]


def attention_on_padding(history: History) -> list[Symptom] | None:
    """Judge the mass on padding in decoders. Encoders are not judged: Whisper's hears the silence that pads a clip, by design."""

    def masses(record: StepRecord) -> list[Attention]:
        return [layer for layer in record.attention if layer.kind in ("decoder", "joint") and layer.padding is not None]

    if not masses(history.last):
        return None
    found = []
    for site, rows in newest_rows(history, 2, masses).items():
        padding = [row.padding or 0.0 for row in rows]
        if padding and min(padding) > PADDING:
            message = f"{padding[-1]:.1%} of the attention lies on padding (bound: {PADDING:.0%}, twice in a row)"
            found.append(Symptom(message, site, {"padding": padding[-1], "bound": PADDING}))
    return found


def branch_dead(history: History) -> list[Symptom] | None:
    """Judge feed-forward branches: what comes out, what gradient they get, whether audio takes the audio branch."""
    if not history.last.branches:
        return None
    found = _silent_branches(history)
    found += [symptom for name in ("text_branch", "audio_branch") if (symptom := _untrained_branch(history, name)) is not None]
    passed = newest(history, 2, lambda record: _audio_tokens(record) if record.checks and record.checks.audio_labels else None)
    if passed and not any(passed):
        message = "the step has audio labels, and no token takes the audio branch of any layer (twice in a row)"
        found.append(Symptom(message, "audio_branch", {"audio_tokens": 0.0}))
    return found


def _at(layer: Attention, message: str, **evidence: float) -> Symptom:
    return Symptom(message, layer.site, {**evidence, "heads": float(layer.heads)})


def _lasting(history: History, what: str, judge: Callable[[Attention], float | None]) -> list[tuple[Attention, float]] | None:
    """Return the layers, and their last value, that ``judge`` finds wanting in the newest 3 records; ``None`` if none has the number."""

    def measured(record: StepRecord) -> list[Attention]:
        return [layer for layer in record.attention if layer.keys >= KEYS and _heads(layer, what)]

    if not measured(history.last):
        return None
    found = []
    for rows in newest_rows(history, RECORDS, measured).values():
        values = [judge(row) for row in rows]
        if values and values[-1] is not None and all(value is not None for value in values):
            found.append((rows[-1], values[-1]))
    return found


def _heads(layer: Attention, what: str) -> tuple[float, ...]:
    """Return a value of each head of this rank; of the whole layer where heads are not told apart; nothing if not measured."""
    each = () if layer.per_head is None else getattr(layer.per_head, what)
    mean = getattr(layer, what)
    return tuple(each) or (() if mean is None else (mean,))


def _all(values: tuple[float, ...], holds: Callable[[float], bool]) -> bool:
    return bool(values) and all(holds(value) for value in values)


def _is_usual_sink(record: StepRecord, layer: Attention) -> bool:
    """Say whether a decoder's layer does only what most of its neighbours do, too, if less so."""
    if layer.kind not in ("decoder", "joint"):
        return False
    others = [
        row.first_token for row in record.attention if row.kind == layer.kind and row.site != layer.site and row.first_token is not None
    ]
    return bool(others) and median(others) >= SINKS and min(others) <= FIRST


def _silent_branches(history: History) -> list[Symptom]:
    """Return a symptom for each branch that receives tokens and gives nothing but 0, although its weights are being updated."""

    def updated(record: StepRecord) -> list[SiteStatistics]:
        rates = record.optimisation.learning_rates if record.optimisation is not None else ()
        rows = record.statistics if not rates or max(rates) > 0 else ()
        return [row for row in rows if row.role == "feed_forward" and row.elements and row.rms is not None]

    message = f"its output is 0 everywhere in {RECORDS} sampled steps in a row, although it receives tokens"
    return [
        Symptom(message, site, {"rms": 0.0, "elements": float(rows[-1].elements)})
        for site, rows in newest_rows(history, RECORDS, updated).items()
        if rows and not any(row.rms for row in rows)
    ]


def _untrained_branch(history: History, name: str) -> Symptom | None:
    """Return a symptom if a branch that should train and receives tokens gets no gradient, and other parts do."""

    def untrained(record: StepRecord) -> bool | None:
        part = next((part for part in record.parts if part.name == name), None)
        tokens = _audio_tokens(record) if name == "audio_branch" else sum(row.text_tokens for row in record.branches)
        if part is None or not part.trainable_share or part.without_gradient is None or not tokens:
            return None
        others = any(other.gradient_norm for other in record.parts if other.name != name)
        return others and (part.gradient_norm == 0 or (part.tensors > 0 and part.without_gradient == part.tensors))

    seen = newest(history, RECORDS, untrained)
    if not seen or not all(seen):
        return None
    return Symptom(f"no gradient reaches it in {RECORDS} sampled steps in a row, although it receives tokens", name, {"gradient_norm": 0.0})


def _audio_tokens(record: StepRecord) -> int:
    return sum(row.audio_tokens for row in record.branches)


RULES = (
    Rule(
        code="attention-collapsed",
        severity="warning",
        meaning="Every head of a layer puts all its attention on one key. Softmax is saturated there: hardly any gradient passes, and "
        "the heads cannot find back.",
        advice="Look at the layer's q and k: weights that have grown, a scale that is applied twice, a learning rate that is too high, "
        "a lost layer norm. Lower the learning rate or clip gradients, and load the layer again.",
        threshold="Relative entropy below 0.01 in every head, with at least 8 keys, in 3 sampled steps in a row: 0.995 of the mass on "
        "one of 100 keys. Layers that look at the first key only are told by attention-on-first-token.",
        check=attention_collapsed,
    ),
    Rule(
        code="attention-uniform",
        severity="warning",
        meaning="Every head of a layer looks at all keys alike, to the last digit: the layer averages, and has not learnt where to "
        "look. Its queries or keys are all alike, or 0.",
        advice="Look at the weights of q_proj and k_proj of this layer for zeros (were they loaded?), and at its input norm.",
        threshold="1 - relative entropy below 1e-6 in every head, with at least 8 keys, in 3 sampled steps in a row. Random weights of "
        "0.02 give 1e-5 and more. Not where all layers of that kind are so: then their input is constant, which has findings of its "
        "own.",
        check=attention_uniform,
    ),
    Rule(
        code="attention-on-first-token",
        severity="warning",
        meaning="Every head of a layer looks at nothing but the first key: the layer passes on nothing of the rest. Some mass there is "
        "normal (the attention sink of language models); all of it, in every head, is not.",
        advice="If the layer was not so in the pretrained model, look at the mask and the positions it gets, and at the learning rate.",
        threshold="More than 0.98 of the mass in every head, with at least 8 keys, in 3 sampled steps in a row. In decoders only if "
        "the other layers do not have the usual sink (their median is below 0.5), or if all layers are so.",
        check=attention_on_first_token,
    ),
    Rule(
        code="attention-on-padding",
        severity="warning",
        meaning="Tokens look at padding: the mask does not reach the layer, or is the wrong way round. What a sample gives depends on "
        "how much it was padded.",
        advice="Give attention_mask (1: token, 0: padding) to the model, and look whether a wrapper drops or inverts it. With left "
        "padding give position_ids, too, or let the model make them.",
        threshold="More than 0.01 of the mass of a decoder's layer in 2 sampled steps in a row: a masked key has exactly 0. Encoders "
        "are not judged (Whisper's hears the silence that fills a clip up to 30 s, by design).",
        check=attention_on_padding,
    ),
    Rule(
        code="branch-dead",
        severity="warning",
        meaning="One of a layer's two feed-forward branches (text, audio) does nothing: it gives 0, it gets no gradient, or no audio "
        "takes it.",
        advice="Look at the weights of the named branch for zeros, at requires_grad, and at the mask that sends tokens to branches "
        "(audio_out_mask, the audio token ids of the config).",
        threshold="Over 3 sampled steps in a row: an output of exactly 0 although the learning rate is above 0 (a branch that starts "
        "at 0 on purpose grows with its first update), or no gradient although other parts get one. Over 2: audio labels, and no token "
        "in any audio branch.",
        check=branch_dead,
    ),
)
