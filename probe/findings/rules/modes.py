"""Rules about modules that are in the wrong mode: dropout, eval mode while training, adapters that change nothing."""

from __future__ import annotations

from probe.findings.rule import History, Rule, Symptom
from probe.records import Modes, Part, StepRecord

UPDATES = 2
"""Updates after which an adapter's output weight is no longer 0: the first one makes it something else; one may have been skipped."""

_SHOWN = 8


def dropout_off(history: History) -> list[Symptom] | None:
    """Judge whether any dropout layer is active where there are some, or where the config asks for some."""
    modes, setup = history.last.modes, history.setup
    if modes is None:
        return None
    if modes.dropout_modules and not modes.dropout_active:
        return [Symptom(f"none of {modes.dropout_modules} dropout layers is in training mode", evidence=_dropout(modes))]
    if not modes.dropout_modules and setup is not None and setup.dropout:
        message = f"the config asks for dropout {setup.dropout:g}, and no module has a probability above 0"
        return [Symptom(message, evidence={**_dropout(modes), "dropout": setup.dropout})]
    return []


def dropout_in_evaluation(history: History) -> list[Symptom] | None:
    """Judge the last evaluation that was seen."""
    modes = history.last.modes
    if modes is None or modes.dropout_in_evaluation is None:
        return None
    if not modes.dropout_in_evaluation:
        return []
    message = f"{modes.dropout_in_evaluation} dropout layers were in training mode during the last evaluation (there should be none)"
    return [Symptom(message, evidence={"dropout_in_evaluation": float(modes.dropout_in_evaluation)})]


def module_in_eval_mode(history: History) -> list[Symptom] | None:
    """Judge modules with parameters that train: one symptom each, of the first ones."""
    modes = history.last.modes
    if modes is None:
        return None
    more = len(modes.in_eval_mode) - _SHOWN
    others = f" (and {more} more modules)" if more > 0 else ""
    return [
        Symptom(f"{name or 'the whole model'} has parameters that train, and is in eval mode in training forwards{others}", name)
        for name in modes.in_eval_mode[:_SHOWN]
    ]


def adapters_without_effect(history: History) -> list[Symptom] | None:
    """Judge adapters that train, or should because nothing else does: all switched off, without a gradient, or with weights that stay 0."""
    modes, part = history.last.modes, _adapters(history.last)
    if modes is None or part is None:
        return None
    if not modes.adapters or not (part.tensors or _nothing_trains(history.last)):
        return []
    evidence = {"adapters": float(modes.adapters)}
    if modes.adapters_disabled == modes.adapters:
        return [Symptom(f"all {modes.adapters} adapters are switched off", evidence=evidence)]
    if part.tensors and part.without_gradient == part.tensors and _others_learn(history.last):
        return [Symptom(f"none of the {part.tensors} tensors of the adapters received a gradient", evidence=evidence)]
    updates = sum(_updated(record) for record in history.records[:-1])
    if modes.adapters_zero == modes.adapters and updates >= UPDATES:
        message = f"the output weights of all {modes.adapters} adapters are 0 after {updates} observed updates (bound: {UPDATES})"
        return [Symptom(message, evidence={**evidence, "updates": float(updates)})]
    return []


def _dropout(modes: Modes) -> dict[str, float]:
    return {"dropout_modules": float(modes.dropout_modules), "dropout_active": float(modes.dropout_active)}


def _adapters(record: StepRecord) -> Part | None:
    return next((part for part in record.parts if part.name == "adapters"), None)


def _nothing_trains(record: StepRecord) -> bool:
    """Tell whether no parameter trains at all: PEFT freezes the adapters that it switches off."""
    return not any(part.tensors for part in record.parts)


def _others_learn(record: StepRecord) -> bool:
    """Tell whether gradients could be read: without any at all it is another finding, or nobody knows (a loop that clears them)."""
    trained = [part for part in record.parts if part.name != "adapters" and part.tensors]
    return record.optimisation is not None and (
        record.optimisation.loss is not None or any(part.without_gradient != part.tensors for part in trained)
    )


def _updated(record: StepRecord) -> bool:
    """Tell whether a step's update was made, with a learning rate above 0 and a gradient that nobody had to skip."""
    rates = () if record.optimisation is None else record.optimisation.learning_rates
    part = _adapters(record)
    return any(rate > 0 for rate in rates) and part is not None and not part.nonfinite


RULES: tuple[Rule, ...] = (
    Rule(
        code="dropout-off",
        severity="info",
        meaning="The model has dropout, or its config asks for it, and none of it is active while it trains.",
        advice="If that is not on purpose: call model.train() in an overridden training_step, and set probabilities in the config before "
        "the model is built.",
        threshold="No dropout layer with a probability above 0 is in training mode, or there is none although the config names one.",
        check=dropout_off,
    ),
    Rule(
        code="dropout-in-evaluation",
        severity="warning",
        meaning="Evaluation runs with dropout: its loss and its metrics are too bad, and differ from one evaluation to the next.",
        advice="Call model.eval() in an overridden prediction_step or evaluation loop, and look for callbacks that call model.train().",
        threshold="Any dropout layer with a probability above 0 in training mode when a batch of an evaluation has been run.",
        check=dropout_in_evaluation,
    ),
    Rule(
        code="module-in-eval-mode",
        severity="warning",
        meaning="A module whose parameters train is in eval mode: its dropout is off, and statistics of batch norms do not follow.",
        advice="Call model.train() before the forward, and look for an overridden train() method; if the module is to stay as it is, "
        "freeze its parameters (requires_grad_(False)).",
        threshold="The outermost modules in eval mode inside a training forward that have a parameter which requires a gradient.",
        check=module_in_eval_mode,
    ),
    Rule(
        code="adapters-without-effect",
        severity="critical",
        meaning="The adapters (LoRA and the like) are to train, and change nothing: what is saved in the end is the base model.",
        advice="Call model.enable_adapter_layers() and model.set_adapter(name); give the optimizer the adapters' parameters; with "
        "checkpointing call model.enable_input_require_grads().",
        threshold="All adapters are switched off; or none of their tensors has a gradient; or all their output weights (lora_B) "
        "are exactly "
        "0 after 2 observed updates with a learning rate above 0: the first update of an optimizer makes them something else.",
        check=adapters_without_effect,
    ),
)
