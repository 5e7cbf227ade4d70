"""Rules about labels: which positions are learnt, and what each position is asked to predict."""

from __future__ import annotations

from probe.findings.rule import History, Rule, Symptom
from probe.findings.rules.model_kind import is_encoder_decoder, predicts_audio
from probe.findings.rules.streaks import newest
from probe.records import LabelChecks, StepRecord

PADDING_RUN_SHARE = 0.01
"""Share of labels that repeat the padding id: a text may do that now and then, padding does it in every row."""

COMMON_PREFIX = 4
"""Labelled tokens that open every row alike, where nothing is masked but padding: more than begin-of-text and a role's header."""

LONG_COMMON_PREFIX = 16
"""The same where something is masked: answers may share a template, but hardly one of this length."""

COMPARED = 16
"""Label positions that it takes to tell a relation from chance."""

MOST, HALF = 0.9, 0.5
"""A relation holds for more than nine tenths of the labels, and the meant one for less than half: repeated tokens fulfil both."""


def labels_all_masked(history: History) -> list[Symptom] | None:
    """Judge whether any position of the last step has a label."""
    record = history.last
    if record.checks is None or record.checks.labels is None:
        return None
    scored = sum(head.accuracy.labelled for head in record.heads if head.accuracy is not None)
    if record.checks.labels.labelled or record.checks.audio_labels or scored:
        return []
    message = "every label of this step is -100: there is nothing to learn from, and a mean over no label is NaN"
    return [Symptom(message, evidence={"labelled": 0.0})]


def padding_in_loss(history: History) -> list[Symptom] | None:
    """Judge labels at padding positions, runs of the padding id among the labels, and what the loss audit says."""
    labels, checks = _labels(history.last), history.last.checks
    if labels is None and history.last.loss_audit is None:
        return None
    if labels is not None and checks is not None and labels.labelled:
        if labels.on_padding is not None and labels.on_padding > checks.rows:
            bound = f"bound: {checks.rows:,}, one a row"
            message = f"{labels.on_padding:,} of {labels.labelled:,} labels lie where attention_mask is 0 ({bound})"
            return [Symptom(message, evidence={"on_padding": float(labels.on_padding), "rows": float(checks.rows)})]
        runs = (labels.padding_runs or 0) / labels.labelled
        if runs > PADDING_RUN_SHARE:
            message = f"{runs:.1%} of the labels repeat the padding id right after a padding id (bound: {PADDING_RUN_SHARE:.0%})"
            evidence = {"padding_runs": float(labels.padding_runs or 0), "labelled": float(labels.labelled), "bound": PADDING_RUN_SHARE}
            return [Symptom(message, evidence=evidence)]
    by_mask = labels is not None and labels.on_padding is not None
    if "padding" in _audit_kinds(history.last) and not by_mask:
        return [Symptom(_cause(history.last, "padding"))]
    return []


def prompt_not_masked(history: History) -> list[Symptom] | None:
    """Judge labels at audio placeholders, and what all rows have in common at the begin of what they learn."""
    labels = _labels(history.last)
    if labels is None or (labels.on_placeholders is None and labels.common_prefix is None):
        return None
    if labels.on_placeholders and not predicts_audio(history):
        message = f"{labels.on_placeholders:,} of {labels.labelled:,} labels ask for the audio placeholder itself (there should be none)"
        return [Symptom(message, evidence={"on_placeholders": float(labels.on_placeholders), "labelled": float(labels.labelled)})]
    if is_encoder_decoder(history):
        return []  # its decoder's prompt (language, task) is short and usually learnt
    prefixes = newest(history, 2, _common_prefix)
    if not prefixes:
        return []
    bound = COMMON_PREFIX if _only_padding_is_masked(history.last) else LONG_COMMON_PREFIX
    if min(prefixes) < bound:
        return []
    learnt = "nothing but padding is masked, and all rows" if bound == COMMON_PREFIX else "all rows"
    message = f"{learnt} begin to learn with the same {prefixes[-1]} tokens (bound: {bound}, twice in a row), as a prompt does"
    return [Symptom(message, evidence={"common_prefix": float(prefixes[-1]), "bound": float(bound)})]


def labels_shifted(history: History) -> list[Symptom] | None:
    """Judge which id each label equals, held against how the model's class shifts, and what the loss audit finds."""
    labels, meant = _labels(history.last), _meant(history)
    audited = history.last.loss_audit is not None and history.last.loss_audit.ratio is not None
    by_audit = newest(history, 2, lambda record: "shift" in _audit_kinds(record) if record.loss_audit is not None else None)
    slip = _slip(labels, meant) if labels is not None and meant else ""
    if not slip:
        if by_audit and all(by_audit):
            return [Symptom(_cause(history.last, "shift"))]
        unknown = (labels is None or not meant or labels.compared < COMPARED) and by_audit is None
        return None if unknown else []
    if "shift" in _audit_kinds(history.last):
        return []  # the loss shifts otherwise than the class means it, and so do the labels: together they may be right
    assert labels is not None
    share = getattr(labels, slip) / labels.compared
    where = {"same": "the id of their own position", "next": "the id one position later", "previous": "the id one position earlier"}
    right = {"same": "their own position's, because the model shifts them itself", "next": "the next decoder input"}
    message = f"{share:.0%} of {labels.compared:,} labels equal {where[slip]} (bound: {MOST:.0%}); meant is {right[meant]}"
    evidence = {kind: getattr(labels, kind) / labels.compared for kind in ("same", "next", "previous")}
    evidence["compared"] = float(labels.compared)
    return [Symptom(message, evidence=evidence, severity="critical" if audited else "warning")]


def _slip(labels: LabelChecks, meant: str) -> str:
    """Return which wrong relation the labels stand in to the ids: "same", "next" or "previous"; "" if none."""
    if labels.compared < COMPARED or getattr(labels, meant) / labels.compared >= HALF:
        return ""
    wrong = [kind for kind in ("same", "next", "previous") if kind != meant]
    return next((kind for kind in wrong if getattr(labels, kind) / labels.compared > MOST), "")


def _meant(history: History) -> str:
    """Return the relation of labels to ids that the model's class means, "" where that is not known or there is none to check."""
    how = next((head.alignment for head in history.last.heads if head.modality == "text" and head.alignment), "")
    if how.startswith("already shifted"):
        return ""
    if is_encoder_decoder(history):
        return "next"
    return "" if "not shifted" in how else "same"


def _only_padding_is_masked(record: StepRecord) -> bool:
    """Say whether no more labels are masked than positions are padding; False where either is not known."""
    inputs = record.inputs
    if inputs is None or inputs.labels_masked_share is None:
        return False
    return inputs.labels_masked_share <= (inputs.padding_share or 0.0) + 1e-9


def _labels(record: StepRecord) -> LabelChecks | None:
    return None if record.checks is None else record.checks.labels


def _common_prefix(record: StepRecord) -> int | None:
    labels = _labels(record)
    return None if labels is None else labels.common_prefix


def _audit_kinds(record: StepRecord) -> tuple[str, ...]:
    return () if record.loss_audit is None else record.loss_audit.kinds


def _cause(record: StepRecord, kind: str) -> str:
    """Return what the loss audit says of a kind of cause that it found."""
    audit = record.loss_audit
    assert audit is not None
    return next((cause for cause, its in zip(audit.causes, audit.kinds) if its == kind), f"the loss audit found: {kind}")


RULES = (
    Rule(
        code="labels-all-masked",
        severity="critical",
        meaning="No position of the step has a label. The cross-entropy of nothing is NaN or 0: the step teaches nothing, and a NaN "
        "spoils the weights.",
        advice="Print one batch of the collator: labels must hold ids other than -100. Usual causes are a response template that is "
        "not found in the tokenised text, a prompt that fills max_length so that the answer is cut off, and masking by pad_token_id "
        "where it is the end-of-text token.",
        threshold="None: not a single text or audio label in all micro-batches of a step.",
        check=labels_all_masked,
    ),
    Rule(
        code="padding-in-loss",
        severity="warning",
        meaning="The model is trained to predict padding. The loss looks better than it is, because padding is easy, and the weight of "
        "the real tokens depends on how long the longest row of a batch is.",
        advice="Mask it in the collator: labels[attention_mask == 0] = -100 (labels.masked_fill(mask.ne(1), -100) for padded Whisper "
        "labels). Comparing with pad_token_id alone would also mask the end of the text where both are the same token.",
        threshold="More labels lie where the attention mask is 0 than there are rows: one a row may be the end of the text, where it "
        "shares its id with the padding. Without a mask: more than 1 % of the labels repeat the padding id right after a padding id (a "
        "real text may do that once in a while), or the loss audit finds padding in the loss.",
        check=padding_in_loss,
    ),
    Rule(
        code="prompt-not-masked",
        severity="warning",
        meaning="The prompt is learnt along with the answer: instructions, the audio placeholders. They are the same in every sample, "
        "so the loss falls without the model getting better at answering.",
        advice="Set labels[:, :prompt_length] = -100 in the collator, or let the trainer do it (TRL: completion_only_loss or "
        "assistant_only_loss). If the whole sequence is meant to be learnt, ignore this.",
        threshold="No label may ask for an audio placeholder (models that write audio are not judged by that). Or, in 2 sampled steps "
        "in a row, all rows open with the same labelled tokens: 4 where nothing but padding is masked (more than a begin-of-text token "
        "and a role's header), 16 where something is (answers may share a template).",
        check=prompt_not_masked,
    ),
    Rule(
        code="labels-shifted",
        severity="critical",
        meaning="Labels are shifted once too often or not at all: a position is trained to predict the token that it reads, or one "
        "that is two ahead. The loss falls, and generated text is nonsense.",
        advice="For a decoder-only model of transformers give labels = input_ids.clone() with the prompt masked; the model shifts them "
        "itself. For an encoder-decoder give labels alone and let the model make decoder_input_ids, or set decoder_input_ids = "
        "shift_tokens_right(labels).",
        threshold="More than 90 % of at least 16 labels equal the id of another position than the one meant, and less than 50 % the "
        "meant one (repeated tokens equal both, so both shares are looked at). Or the loss audit finds in 2 sampled steps in a row "
        "that the loss is that of labels shifted otherwise. A warning where no loss audit confirms how the model shifts.",
        check=labels_shifted,
    ),
)
