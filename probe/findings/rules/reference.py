"""Rules about the audio that a model is conditioned on: is it used, and is it the answer itself."""

from __future__ import annotations

from probe.findings.rule import History, Rule, Symptom
from probe.findings.rules.model_kind import is_encoder_decoder, predicts_audio
from probe.findings.rules.streaks import newest
from probe.records import Effect, Severity, StepRecord

HALF = 0.5
"""Share of the training after which a model that does not listen will hardly begin to."""

PASSES = 3
"""Counterfactual passes that must agree that the audio changes nothing at all: as many as a verdict takes."""

EXACTLY = 1e-9
"""Nats that are nothing but the rounding of sums in float64."""

MATCHES, COMPARED, COMPARED_RECORDS = 0.9, 4, 4
"""Share of references that are their own target, samples that it takes to say so, and records over which they are pooled."""


def reference_ignored(history: History) -> list[Symptom] | None:
    """Judge the verdict over the counterfactual passes."""
    verdict = history.last.verdict
    if verdict is None:
        return _says_nothing(history)
    if verdict.use not in ("weak", "ignored"):
        return []
    severity: Severity = _how_lost(history) if verdict.use == "ignored" else "info"
    evidence = {**verdict.evidence, "passes": float(verdict.passes)}
    return [Symptom(f"verdict {verdict.use}: {verdict.because}", evidence=evidence, severity=severity)]


def reference_is_target(history: History) -> list[Symptom] | None:
    """Judge whether reference codes are the target's own, and the verdict."""
    verdict, compared = history.last.verdict, newest(history, 1, _compared)
    if verdict is None and compared is None:
        return None
    if verdict is not None and verdict.use == "leaked":
        return [Symptom(f"verdict leaked: {verdict.because}", evidence=dict(verdict.evidence))]
    counts = [count for record in history.records if (count := _compared(record)) is not None][-COMPARED_RECORDS:]
    matches, samples = sum(match for match, _ in counts), sum(count for _, count in counts)
    if samples < COMPARED or matches / samples < MATCHES:
        return []
    message = (
        f"the reference's codes are those of the target in {matches:,} of {samples:,} samples (bound: {MATCHES:.0%} of at least {COMPARED})"
    )
    return [Symptom(message, evidence={"reference_matches": float(matches), "reference_compared": float(samples), "bound": MATCHES})]


def _says_nothing(history: History) -> list[Symptom] | None:
    """Return a symptom if the audio cannot be changed by exchanging and reversing it; ``None`` if the newest passes do not tell."""
    passes = _passes(history)
    if len(passes) < PASSES or any(not _unchanged(record) for record in passes):
        return None
    message = f"in {PASSES} passes in a row the audio of all samples was one and the same, and the same backwards: it says nothing"
    return [Symptom(message, evidence={"passes": float(PASSES)}, severity=_worst(history))]


def _unchanged(record: StepRecord) -> bool:
    """Say whether exchanging and reversing reached no sample of a step in which every row has audio."""
    one, checks = record.counterfactual, record.checks
    if one is None or checks is None or checks.rows < 2:
        return False
    owned = max(checks.reference_compared or 0, checks.audio.clips if checks.audio is not None else 0)
    reached = {name: [effect.samples for effect in one.effects if effect.intervention == name] for name in ("swap", "reverse")}
    return owned >= checks.rows and all(samples and not any(samples) for samples in reached.values())


def _passes(history: History) -> tuple[StepRecord, ...]:
    return tuple(record for record in history.records if record.counterfactual is not None)[-PASSES:]


def _worst(history: History) -> Severity:
    return "critical" if is_encoder_decoder(history) or predicts_audio(history) else "warning"


def _how_lost(history: History) -> Severity:
    """Return how bad it is that the audio is ignored: at once if it cannot reach the predictions at all, else by how late it is."""
    worst = _worst(history)
    planned = None if history.setup is None else history.setup.max_steps
    late = planned is not None and history.last.step >= HALF * planned
    return worst if late or _changes_nothing(history) else "warning"


def _changes_nothing(history: History) -> bool:
    """Say whether the newest passes gave the same losses to the last bit, whatever was done to the audio."""
    passes = [record.counterfactual for record in _passes(history)]
    effects = [effect for one in passes if one is not None for effect in one.effects if effect.delta_loss is not None]
    return len(passes) == PASSES and bool(effects) and all(_nothing(effect) for effect in effects)


def _nothing(effect: Effect) -> bool:
    return abs(effect.delta_loss or 0.0) <= EXACTLY and abs(effect.divergence or 0.0) <= EXACTLY


def _compared(record: StepRecord) -> tuple[int, int] | None:
    """Return matching and compared samples of a step in which some were compared."""
    checks = record.checks
    if checks is None or not checks.reference_compared:
        return None
    return checks.reference_matches or 0, checks.reference_compared


RULES = (
    Rule(
        code="reference-ignored",
        severity="critical",
        meaning="The predictions are as good with another sample's audio, and with silence, as with the sample's own: the model does "
        "not use what it is given. A voice cloner of this kind speaks with one voice, a recogniser writes what is likely and not what "
        "was said.",
        advice="Check first that the audio belongs to its text: play one sample of the collator. Then the way of the audio: "
        "encoder-not-called, encoder-collapsed, projector-dead, audio-tokens-mismatch, and the gradient of the projector. If all is "
        "well, the task can be solved without the audio: use references of many speakers, longer ones, and mask less of the target.",
        threshold="The verdict is `ignored` (its own page says when; not before a model has had time to learn to listen); `weak` is "
        "worth knowing only. Critical at once where three passes give the same losses to the last bit: then no way leads from the "
        "audio to the predictions. So too where three passes can change nothing by exchanging the audio of all rows, and by reversing "
        "it: then it is the same in all of them. Else a warning up to half of the planned training, critical after. Never worse than a "
        "warning for models that have a text prompt to go by and predict only text.",
        check=reference_ignored,
    ),
    Rule(
        code="reference-is-target",
        severity="critical",
        meaning="The reference that the model is given is the very audio that it is to predict. It learns to copy, not to clone: with "
        "a real reference it will repeat that, or babble.",
        advice="Choose the reference among the *other* recordings of the same speaker in the dataset (ref_audio != target_audio), and "
        "check that the collator does not put the target's codes into both fields.",
        threshold="At least 99 % of the codes agree in at least 90 % of at least 4 samples, over the newest 4 sampled steps that could "
        "be compared: codes of two recordings, even of the same words, differ in most frames. Or the verdict is `leaked`.",
        check=reference_is_target,
    ),
)
