"""Rules about which parts of the model a gradient reaches."""

from __future__ import annotations

from probe.findings.rule import History, Rule, Symptom
from probe.findings.rules.streaks import newest
from probe.records import Part, Severity, StepRecord

SOME_LOSS = 1e-4
"""Nats a token from which on a cross-entropy has a gradient in every dtype: p of the label is then at most 0.9999."""

ABSENT, ZERO = 2, 3
"""Records in a row without any gradient (the graph does not lead there), and with one that is exactly 0 (a gate that begins at 0 opens)."""

FLICKERING = 8
"""Records in a row that it takes for single layers where not always the same ones lack a gradient, as with experts that are chosen."""

_CRITICAL = ("audio_encoder", "projector", "lm_head", "text_branch", "audio_branch")
_ON_AUDIO = ("audio_encoder", "projector", "audio_branch")


def backward_never_ran(history: History) -> list[Symptom] | None:
    """Judge whether any tensor that trains has a gradient. Without a Trainer nobody knows whether a loop has cleared them already."""
    record = history.last
    training = _training(record)
    with_trainer = record.loss_audit is not None or (record.optimisation is not None and record.optimisation.loss is not None)
    if training is None or not with_trainer:
        return None
    if any(part.without_gradient != part.tensors for part in training):
        return []
    if any(row.calls for row in record.activation_gradients):
        return None  # a backward ran: gradients are used up as they come (DeepSpeed, optimizers that step inside the backward)
    tensors = sum(part.tensors for part in training)
    return [Symptom(f"none of the {tensors:,} tensors that train has a gradient after training_step", evidence={"tensors": float(tensors)})]


def loss_not_connected(history: History) -> list[Symptom] | None:
    """Judge whether all gradients are exactly 0 although a head is far from right."""
    training = _training(history.last)
    norms = [part.gradient_norm for part in training or () if part.without_gradient != part.tensors]
    losses = [head.accuracy.loss for head in history.last.heads if head.accuracy is not None and head.accuracy.loss is not None]
    if not norms or any(norm is None for norm in norms) or not losses:
        return None
    if any(norms) or max(losses) < SOME_LOSS:
        return []
    message = f"the gradient of every parameter is exactly 0, and a head's cross-entropy is {max(losses):.4g} nats (bound: {SOME_LOSS:g})"
    return [Symptom(message, evidence={"loss": max(losses), "bound": SOME_LOSS})]


def part_without_gradient(history: History) -> list[Symptom] | None:
    """Judge each part that trains, and the layers, against the others."""
    training = _training(history.last)
    if training is None or not any(_reached(part) for part in training):
        return None
    found = [symptom for part in training if (symptom := _cut_off(history, part)) is not None]
    return found or _layers(history)


def _training(record: StepRecord) -> list[Part] | None:
    """Return the parts that train; ``None`` if the gradients of one of them could not be read."""
    training = [part for part in record.parts if part.tensors]
    return None if not training or any(part.without_gradient is None for part in training) else training


def _reached(part: Part) -> bool:
    return part.without_gradient != part.tensors and part.gradient_norm != 0


def _state(record: StepRecord, name: str) -> str | None:
    """Return "absent", "zero" or "there" for one part; ``None`` where it is not judged."""
    training = _training(record)
    part = next((part for part in training or () if part.name == name), None)
    if part is None or not any(_reached(other) for other in training or ()) or (name in _ON_AUDIO and _without_audio(record)):
        return None
    return "absent" if part.without_gradient == part.tensors else "zero" if part.gradient_norm == 0 else "there"


def _without_audio(record: StepRecord) -> bool:
    """Tell whether the step's batches brought no audio to the decoder: then nothing of it can have a gradient."""
    conditioning, audio = record.conditioning, None if record.checks is None else record.checks.audio
    if conditioning is not None and conditioning.encoder and not conditioning.encoder_calls:
        return not any(row.audio_tokens for row in record.branches)
    if audio is not None and audio.placeholders == 0 and audio.frames is not None:
        return True
    return bool(record.branches) and not any(row.audio_tokens for row in record.branches)


def _cut_off(history: History, part: Part) -> Symptom | None:
    if part.name == "adapters":
        return None  # they have a finding of their own
    states = newest(history, ABSENT, lambda record: _state(record, part.name))
    if states and set(states) == {"absent"}:
        what = f"none of its {part.tensors} tensors that train has a gradient, in {ABSENT} sampled steps in a row"
    else:
        states = newest(history, ZERO, lambda record: _state(record, part.name))
        if not states or "there" in states:
            return None
        what = f"its gradient is exactly 0, in {ZERO} sampled steps in a row"
    severity: Severity = "critical" if part.name in _CRITICAL else "warning"
    evidence = {"tensors": float(part.tensors), "without_gradient": float(part.without_gradient or 0)}
    return Symptom(f"{part.name}: {what}, and other parts have one", part.name, evidence, severity)


def _cut_layers(record: StepRecord) -> frozenset[str] | None:
    """Return the layers that ran and have no gradient; ``None`` if there are none to judge, or the audio side had nothing to do."""
    layers = [row for row in record.layers if row.tensors]
    if not layers or any(row.without_gradient is None for row in layers) or _without_audio(record):
        return None
    return frozenset(row.name for row in layers if row.without_gradient == row.tensors and _ran(record, row.name))


def _ran(record: StepRecord, layer: str) -> bool:
    """Tell whether a layer was run, as far as its sites tell: layerdrop leaves layers out."""
    calls = [row.calls for row in record.statistics if row.site == layer or row.site.startswith(f"{layer}.")]
    return any(calls) or not calls


def _layers(history: History) -> list[Symptom]:
    """Return one symptom for all layers that are cut off: always the same ones, or for long where they change."""
    known = [cut for record in history.records if (cut := _cut_layers(record)) is not None]
    names = {part.name for part in history.last.parts}
    if _cut_layers(history.last) is None or len(known) < ZERO:
        return []
    flickers = len(set(known)) > 1
    if flickers and len(known) < FLICKERING:
        return []
    newest_ones = known[-FLICKERING:]
    always = frozenset.intersection(*newest_ones) - names
    within = [row for row in history.last.layers if row.name in always]
    if not within:
        return []
    found = f"{len(within)} layers have no gradient in {len(newest_ones)} sampled steps in a row"
    message = f"{found}, and others have one; the first is {within[0].name}"
    return [Symptom(message, within[0].name, {"layers": float(len(within))}, "warning")]


RULES: tuple[Rule, ...] = (
    Rule(
        code="backward-never-ran",
        severity="critical",
        meaning="No parameter has a gradient when the optimizer is about to step: nothing is learned, whatever the log says.",
        advice="Let training_step call self.accelerator.backward(loss), with a loss that was computed with gradients on and not detached.",
        threshold="Every tensor that trains lacks a gradient after training_step, and no gradient was seen at any observed output.",
        check=backward_never_ran,
    ),
    Rule(
        code="loss-not-connected",
        severity="critical",
        meaning="The backward ran, and every gradient is exactly 0: the loss that was backpropagated does not depend on the model.",
        advice="Look at what compute_loss returns: a weight of 0, a loss of other tensors than this model's outputs, a clamp.",
        threshold="The gradient norm of every part is exactly 0 while a head's cross-entropy is above 0.0001 nats a token: there the "
        "gradient of a cross-entropy is far above the smallest number of any dtype.",
        check=loss_not_connected,
    ),
    Rule(
        code="part-without-gradient",
        severity="warning",
        meaning="A part of the model is to train, and no gradient reaches it while one reaches others: it stays as it is. Critical for "
        "encoder, projector, heads and branches.",
        advice="Look for .detach(), torch.no_grad() or .item() between this part and the loss; with reentrant checkpointing call "
        "model.enable_input_require_grads(). If the part is not to train, freeze it.",
        threshold="No tensor of the part has a gradient in 2 sampled steps in a row, or it is exactly 0 in 3 (gates that begin at 0 open "
        "after one update); steps without audio do not count for what serves audio. Layers that were run: always the same ones in 3, "
        "or in 8 in a row where they change.",
        check=part_without_gradient,
    ),
)
