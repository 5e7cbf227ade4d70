"""The audit of a whole step: what it takes from the step's numbers, and everything for which a step cannot be audited."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import models
from probe.assemble.draft import Draft, RunContext
from probe.assemble.loss_audit import LOGGED, RATIO, loss_audit
from probe.assemble.text import Decoder
from probe.capture.breaker import Breaker
from probe.capture.cells import CellValues
from probe.capture.meter import Meter
from probe.capture.microbatch import MicroBatch
from probe.capture.observers.head_cells import HEAD_COLUMNS, audit_cell, head_cell
from probe.capture.observers.loss import CELL, OUTPUT_CELL
from probe.capture.observers.statistics import statistics_cell
from probe.diagnosis import Diagnosis
from probe.foreign.trainer_loss import LossSettings
from probe.measure.variants import COLUMNS
from probe.merge.packing import HostStep
from probe.publication import Publisher
from probe.records import LossAudit, Site
from probe.sections.blocks import Facts, Note
from probe.sections.loss_audit import loss_audit_blocks
from probe.sections.reasons import OUTPUT, Reasons
from probe.sites.discovery import SiteMap, discover
from probe.sites.labels import NotAligned, align
from probe.sites.reduction import Reduction, Term
from records_factory import speech_record

FACTS = discover(models.CASES["llama"].build(0), choices={}).facts
ONE = Reduction("LlamaForCausalLM", "items", (Term("lm_head", None, "text"),), label_shift=1)
TWO = replace(ONE, terms=(*ONE.terms, Term("audio_head", None, "audio")), together="text + sum of 1 codebooks")
SETTINGS = LossSettings(takes_kwargs=True, skips_first=True, logs_every_step=True)


def cell(of: Any, **columns: float) -> CellValues:
    """Return a cell's values, 0 where nothing is said."""
    return CellValues(
        {name: columns.get(name, 0.0) for name in of.counts},
        {name: columns.get(name, 0.0) for name in of.sums},
        {name: columns.get(name, float("-inf")) for name in of.maxima},
    )


def sums(names: tuple[str, ...], **columns: float) -> CellValues:
    return CellValues({}, {name: columns.get(name.replace(":", "_"), 0.0) for name in names}, {})


def cells(**changes: dict[str, float]) -> dict[str, CellValues]:
    """Return one step of one micro-batch: 40 labels of 2.5 nats, and a loss of 2.5 that was divided by 40."""
    loss = {"micro_batches": 1, "with_items": 1, "loss": 2.5, "items": 40, **changes.get("loss", {})}
    output = {"with_loss": 1, "loss": 2.5, "with_text_labels": 1, "with_labels_key": 1, "labels": 40, **changes.get("output", {})}
    scored = {"meant_labelled": 40, "meant_cross_entropy": 100, "meant_micro_cross_entropy": 2.5, "meant_rank_cross_entropy": 2.5}
    step = CellValues({"ranks": 1.0, "micro_batches": 1.0, **changes.get("step", {})}, {}, {})
    found = {"step": step, CELL.name: cell(CELL, **loss), OUTPUT_CELL.name: cell(OUTPUT_CELL, **output)}
    for site in ("lm_head", "audio_head"):
        found[statistics_cell(site)] = CellValues({"calls": 1.0, **changes.get("calls", {})}, {}, {})
        found[head_cell(site)] = sums(HEAD_COLUMNS, **{"labelled": 40, **changes.get("head", {})})
        found[audit_cell(site)] = sums(COLUMNS, **{**scored, **changes.get("audit", {})})
    return found


def audit(
    *,
    settings: LossSettings | None = SETTINGS,
    reduction: Reduction = ONE,
    reasons: dict[str, str] | None = None,
    blind: dict[str, str] | None = None,
    logged: float | None = None,
    **changes: dict[str, float],
) -> tuple[LossAudit | None, Draft]:
    """Audit a step made by hand."""
    run = RunContext(SiteMap((), {}), FACTS, (), 1, Decoder((), print), loss_settings=settings, reduction=reduction)
    draft = Draft(HostStep(cells(**changes), {}, {"loss_dtype": "float32"}, reasons or {}), run, blind=blind or {})
    return loss_audit(draft, logged=logged), draft


def why_not(**arguments: Any) -> str:
    """Return the reason for which a step was not audited."""
    found, draft = audit(**arguments)
    assert RATIO not in draft.metrics
    assert found is None or (found.expected is None and found.causes == ())
    return draft.reasons[RATIO]


def test_a_step_that_agrees() -> None:
    """Ratio, reduction and log of a step that is right."""
    found, draft = audit(logged=2.5)
    assert found == LossAudit(2.5, 2.5, 1.0, 2.5, "token mean over 40 labels")
    assert draft.metrics == {RATIO: 1.0, LOGGED: 1.0}


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({"settings": None}, "no training_step returned a loss in this step"),
        ({"loss": {"micro_batches": 0}, "reasons": {"probe/loss": "training_step returned no tensor"}}, "training_step returned no tensor"),
        ({"blind": {"heads": "switched off after an error"}}, "switched off after an error"),
        (
            {"reduction": Reduction("X", reason="how X puts 2 heads together is not known")},
            "not audited: how X puts 2 heads together is not known",
        ),
        (
            {"settings": replace(SETTINGS, split_by="nn.DataParallel")},
            "not audited: nn.DataParallel splits one batch, and only a part of it is observed",
        ),
        (
            {"settings": replace(SETTINGS, ranks=2, averages_tokens=True)},
            "not audited: the loss is divided by the labels of all ranks, and this record is of one",
        ),
        (
            {"step": {"micro_batches": 2.0}},
            "not audited: 2 forwards in 1 calls of training_step; how their losses make one is not known",
        ),
        ({"output": {"with_text_labels": 0}}, "not audited: no labels among the inputs"),
        (
            {"reasons": {"head:lm_head": "labels of shape (2, 3) does not lie over"}},
            "not audited: labels of shape (2, 3) does not lie over",
        ),
        (
            {"loss": {"unscored": 1}},
            "not audited: on 1 other ranks the predictions could not be laid over their labels",
        ),
        (
            {"head": {"labelled": 0}, "calls": {"calls": 0.0}},
            "not audited: lm_head was not called in any training forward of this step",
        ),
        (
            {"settings": replace(SETTINGS, smoothing=0.1, smoother_takes_items=True), "audit": {"meant_uniform": float("nan")}},
            "not audited: the mean over the vocabulary, which label smoothing needs, is not known of every label",
        ),
    ],
)
def test_why_a_step_is_not_audited(arguments: dict[str, Any], reason: str) -> None:
    """Each obstacle is the reason under the ratio's name; no expected loss and no cause is made up."""
    assert why_not(**arguments) == reason


def test_ranks_that_divide_by_their_own_labels_are_audited_alone() -> None:
    """A record of one rank is enough where each rank divides by its own labels."""
    found, _ = audit(settings=replace(SETTINGS, ranks=2))
    assert found is not None
    assert found.ratio == 1.0


def test_labels_that_only_some_micro_batches_have() -> None:
    """A modality without labels in some micro-batches is no gap, in the words in which the labels' own reason says it."""
    site, model_inputs = Site("audio_head", "lm_head", "", modality="audio", codebooks=2), MicroBatch(0, {}, {}, {})
    absent = align(torch.zeros(1, 2, 6), site=site, facts=FACTS, micro=model_inputs)
    assert isinstance(absent, NotAligned)
    both = {"with_text_labels": 1.0, "with_audio_labels": 1.0}
    found, _ = audit(reduction=TWO, output=both, reasons={"head:audio_head": absent.reason})
    assert found is not None
    assert found.expected == 5.0
    text = align(torch.zeros(1, 2, 6), site=Site("lm_head", "lm_head", "", modality="text"), facts=FACTS, micro=model_inputs)
    assert isinstance(text, NotAligned)
    assert audit(reasons={"head:lm_head": text.reason})[1].metrics[RATIO] == 1.0


def test_a_modality_without_labels_is_not_in_the_loss() -> None:
    """A batch without audio labels has the text's loss only, and that is expected."""
    found, _ = audit(reduction=TWO)
    assert found is not None
    assert (found.expected, found.reduction) == (2.5, "token mean over 40 labels")


def test_only_a_share_was_returned() -> None:
    """Where a version returns a share, what was backpropagated is the whole; where labels were counted, what was returned."""
    old = replace(SETTINGS, backward_share=4.0, version="4.46.3")
    found, _ = audit(settings=old, loss={"with_items": 0})
    assert found is not None
    assert found.backpropagated == 10.0
    found, _ = audit(settings=old)
    assert found is not None
    assert found.backpropagated == 2.5
    found, _ = audit(settings=replace(SETTINGS, accelerate_divides=2))
    assert found is not None
    assert found.backpropagated == 1.25


def test_the_mean_over_ranks() -> None:
    """Sums of two ranks are halved."""
    found, _ = audit(
        settings=replace(SETTINGS, ranks=2, averages_tokens=True),
        step={"ranks": 2.0, "micro_batches": 2.0},
        loss={"micro_batches": 2, "with_items": 2, "loss": 5.0, "items": 80},
    )
    assert found is not None
    assert (found.backpropagated, found.ratio) == (2.5, 1.0)


def test_an_auxiliary_loss_counts_unless_something_else_takes_the_loss() -> None:
    """The declared auxiliary loss is part of the model's own loss, and of no other."""
    weighed = replace(ONE, auxiliary=0.5)
    aux = {"with_auxiliary": 1.0, "auxiliary": 0.2}
    found, _ = audit(reduction=weighed, output=aux)
    assert found is not None
    assert found.expected == pytest.approx(2.6)
    for other in (replace(SETTINGS, loss_function="mine"), replace(SETTINGS, smoothing=0.1, smoother_takes_items=True)):
        found, _ = audit(reduction=weighed, output=aux, settings=other, audit={"meant_uniform": 100})
        assert found is not None
        assert found.expected == pytest.approx(2.5)


def test_compute_loss_func_replaces_the_smoother() -> None:
    """With compute_loss_func the Trainer does not smooth, whatever the factor, and the function is given the number of labels."""
    mine = replace(SETTINGS, loss_function="mine", smoothing=0.1)
    found, _ = audit(
        settings=mine, reduction=replace(ONE, by="micro-batch"), audit={"meant_uniform": 400, "meant_micro_cross_entropy": 9.0}
    )
    assert found is not None
    assert found.expected == 2.5


def test_nan_is_no_number_of_the_record() -> None:
    """A NaN loss stands in no number; the log that hides it, or is NaN itself, is told apart."""
    hides = replace(SETTINGS, hides_nonfinite=True)
    nan = {"loss": float("nan"), "nonfinite": 1.0, "first_nonfinite": -0.0}
    found, draft = audit(settings=hides, loss=nan, logged=2.4)
    assert found is not None
    assert (found.backpropagated, found.ratio, found.expected) == (None, None, 2.5)
    assert "hides it: the log says 2.4" in found.causes[0]
    assert draft.reasons[RATIO] == "the loss is not a finite number: nan"
    assert draft.metrics == {}
    found, _ = audit(settings=replace(SETTINGS, hides_nonfinite=False), loss=nan, logged=float("nan"))
    assert found is not None
    assert found.logged is None
    assert "hides" not in found.causes[0]


@pytest.mark.parametrize(
    ("found", "tones", "words"),
    [
        (LossAudit(9.204, 4.602, 2.0, None, "mean of 2 micro-batch means", causes=("it is summed",)), ["critical"] * 2, "ratio 2.000"),
        (
            LossAudit(4.602, 4.602, 1.0, 4.602, "mean over 9 labels"),
            ["plain"],
            "expected 4.602 (mean over 9 labels), logged 4.602: ratio 1.000",
        ),
        (LossAudit(4.6, 4.6, 1.0, None, "mean over 9 labels", causes=("padding",)), ["warning"] * 2, "ratio 1.000"),
        (LossAudit(4.61, 4.6, 1.0022, None, "mean over 9 labels", 0.02), ["plain"], "expected 4.6 ± 0.02"),
        (LossAudit(None, 4.6, None, None, "mean over 9 labels", causes=("NaN",)), ["critical"] * 2, "backpropagated NaN or Inf"),
    ],
)
def test_what_the_section_shows(found: LossAudit, tones: list[str], words: str) -> None:
    """One line with the numbers, one a cause, in a tone that says how bad it is."""
    record = replace(speech_record(), loss_audit=found, not_measured={})
    notes = [block for block in loss_audit_blocks(record, Reasons(record, OUTPUT)) if isinstance(block, Note)]
    assert [note.tone for note in notes] == tones
    assert words in notes[0].text
    assert [note.text for note in notes[1:]] == [f"Loss audit: {cause}" for cause in found.causes]


def test_the_section_of_a_step_that_was_not_audited() -> None:
    """The reason stands there; once only, where it is that of the loss itself; nothing where the record knows of no audit."""
    record = replace(speech_record(), loss_audit=LossAudit(2.5), not_measured={RATIO: "not audited: why"})
    (facts,) = loss_audit_blocks(record, Reasons(record, OUTPUT))
    assert isinstance(facts, Facts)
    assert facts.rows[0].value == "not measured: not audited: why"
    loop = replace(record, loss_audit=None, not_measured={RATIO: "a loop", "probe/loss": "a loop"})
    assert loss_audit_blocks(loop, Reasons(loop, OUTPUT)) == ()
    other = replace(loop, not_measured={RATIO: "a loop"})
    assert len(loss_audit_blocks(other, Reasons(other, OUTPUT))) == 1
    silent = replace(loop, not_measured={})
    assert loss_audit_blocks(silent, Reasons(silent, OUTPUT)) == ()


def test_all_masked_shows_its_cause() -> None:
    """A step without a label has no expected loss, and its cause is shown beside the reason."""
    record = replace(
        speech_record(), loss_audit=LossAudit(causes=("every label",)), not_measured={RATIO: "every label of this step is -100"}
    )
    facts, note = loss_audit_blocks(record, Reasons(record, OUTPUT))
    assert isinstance(facts, Facts)
    assert isinstance(note, Note)
    assert (note.tone, note.text) == ("critical", "Loss audit: every label")


@pytest.mark.parametrize(("logged", "told"), [((3, 2.5), 2.5), ((4, 2.5), None), (None, None)])
def test_only_the_log_of_the_same_step_counts(logged: tuple[int, float] | None, told: float | None) -> None:
    """A record that waited is not held against the log of a later step."""
    given: list[float | None] = []

    def record(measured: Any, *, logged: float | None) -> Any:
        given.append(logged)
        return replace(speech_record(), step=measured.step)

    observation = SimpleNamespace(breaker=Breaker(print), record=record, meter=Meter())
    publisher = Publisher(
        observation,
        diagnosis=Diagnosis(observation.breaker),
        folder=None,
        terminal=None,
        sections=lambda step: (),
        keep=lambda made, seen: None,
    )
    publisher.expect(SimpleNamespace(step=3, forwards=1, kept={}, transfer=SimpleNamespace(wait=lambda: None)))
    publisher.publish(logged=logged)
    assert given == [told]
