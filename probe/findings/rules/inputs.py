"""Rules about the rows of a batch: ids that nothing knows, batches that repeat themselves, rows that are there twice."""

from __future__ import annotations

from probe.findings.rule import History, Rule, Symptom
from probe.findings.rules.streaks import newest
from probe.records import Severity, StepRecord

REPEATS = 3
"""Records in a row with the same batch. Two may be the same by chance where an epoch is only a few batches long."""

DUPLICATED_SHARE = 0.25
"""Share of rows that are copies: from a quarter on, a sample weighs noticeably more than the others."""


def ids_out_of_range(history: History) -> list[Symptom] | None:
    """Judge ids against the rows of the embedding, of the head and of the tokenizer; the worst is told, the others are in the evidence."""
    outside, unknown, labels = _outside_vocabulary(history.last), _outside_tokenizer(history.last), _labels_outside(history)
    if outside is None and unknown is None and labels is None:
        return None
    found: list[tuple[Severity, str]] = []
    if outside:
        rows = _rows(history)
        if _all_negative(history.last):
            found.append(("warning", f"{outside:,} ids of input_ids are below 0: no row of the embedding is theirs"))
        else:
            found.append(("critical", f"{outside:,} ids of input_ids are below 0 or not below the {rows} of the input embedding"))
    if labels:
        found.append(("critical", f"{labels:,} labels are not below the {_rows(history)} of the input embedding"))
    if unknown:
        found.append(
            ("warning", f"{unknown:,} ids of input_ids belong to no token of the tokenizer, though the embedding has rows for them")
        )
    if not found:
        return []
    numbers = {"ids_outside_vocabulary": outside, "ids_outside_tokenizer": unknown, "labels_outside_vocabulary": labels}
    evidence = {name: float(number) for name, number in numbers.items() if number is not None}
    worst: Severity = "critical" if any(severity == "critical" for severity, _ in found) else "warning"
    return [Symptom("; ".join(message for _, message in found), evidence=evidence, severity=worst)]


def same_batch_repeated(history: History) -> list[Symptom] | None:
    """Judge the fingerprints of the newest records."""
    prints = newest(history, REPEATS, lambda record: None if record.checks is None else record.checks.fingerprint)
    if prints is None:
        return None
    if not prints or len(set(prints)) > 1:
        return []
    steps = ", ".join(str(record.step) for record in history.newest(REPEATS))
    message = f"the first micro-batch was the same, value for value, in {REPEATS} sampled steps in a row ({steps})"
    return [Symptom(message, evidence={"records": float(REPEATS)})]


def rows_duplicated(history: History) -> list[Symptom] | None:
    """Judge the share of copied rows over the two newest records."""
    counts = newest(history, 2, _copies)
    if counts is None:
        return None
    if not counts or any(not rows or copies / rows < DUPLICATED_SHARE for copies, rows in counts):
        return []
    copies, rows = counts[-1]
    message = (
        f"{copies:,} of {rows:,} rows equal another row of their micro-batch in every input (bound: {DUPLICATED_SHARE:.0%}, twice in a row)"
    )
    return [Symptom(message, evidence={"duplicated_rows": float(copies), "rows": float(rows), "bound": DUPLICATED_SHARE})]


def _copies(record: StepRecord) -> tuple[int, int] | None:
    """Return copied rows, and rows. Rows whose audio is constant are alike because of that, and none of them counts as a copy."""
    checks = record.checks
    if checks is None:
        return None
    return (0 if checks.audio is not None and checks.audio.constant else checks.duplicated_rows), checks.rows


def _outside_vocabulary(record: StepRecord) -> int | None:
    return None if record.inputs is None else record.inputs.ids_outside_vocabulary


def _outside_tokenizer(record: StepRecord) -> int | None:
    return None if record.checks is None else record.checks.ids_outside_tokenizer


def _labels_outside(history: History) -> int | None:
    """Return how many labels have no row; ``None`` where that is unknown, or where a head has more rows than the embedding."""
    record, setup = history.last, history.setup
    if record.checks is None or record.checks.labels is None:
        return None
    rows = [head.shape[-1] for head in record.heads if head.modality == "text" and head.shape]
    if setup is not None and setup.vocabulary is not None and any(count > setup.vocabulary for count in rows):
        return None
    return record.checks.labels.outside_vocabulary


def _all_negative(record: StepRecord) -> bool:
    """Say whether an id below 0 was seen and none that is too large: such ids are marks that a model replaces before it embeds them."""
    ids = next((tensor for tensor in record.inputs.tensors if tensor.name == "input_ids"), None) if record.inputs is not None else None
    head = next((head for head in record.heads if head.modality == "text" and head.shape), None)
    if ids is None or head is None or ids.minimum is None or ids.maximum is None:
        return False
    return ids.minimum < 0 and ids.maximum < head.shape[-1]


def _rows(history: History) -> str:
    known = history.setup is not None and history.setup.vocabulary is not None
    return f"{history.setup.vocabulary:,} rows" if known and history.setup is not None else "rows"


RULES = (
    Rule(
        code="ids-out-of-range",
        severity="critical",
        meaning="Token ids or labels have no row in the input embedding, or no token in the tokenizer. On a GPU such an id stops "
        "training with a device-side assert, or reads another row; where a model clamps it, a wrong token is learnt.",
        advice="Compare len(tokenizer) with model.get_input_embeddings().num_embeddings, load the tokenizer that was saved with the "
        "model, and after tokenizer.add_tokens(...) call model.resize_token_embeddings(len(tokenizer)). Of labels, look at what the "
        "collator pads them with: it must be -100.",
        threshold="None may be outside: an id is a row number. It is a warning where the embedding has the row and only the tokenizer "
        "lacks the token, and where all such ids are below 0 (marks that some models replace before they embed). Labels are not judged "
        "where the head has more rows than the input embedding.",
        check=ids_out_of_range,
    ),
    Rule(
        code="same-batch-repeated",
        severity="info",
        meaning="The model sees the same batch again and again. That is right when a model is to overfit one batch as a test, and "
        "wrong otherwise: it learns that batch by heart.",
        advice="If it is not meant: look at the dataset's __getitem__ (does it use its index?), at the sampler, and at a streaming "
        "dataset that starts anew in each worker.",
        threshold="The same fingerprint of the first micro-batch in 3 sampled steps in a row. Shuffled batches of more than one sample "
        "do not come back like that unless the whole data is one batch.",
        check=same_batch_repeated,
    ),
    Rule(
        code="rows-duplicated",
        severity="warning",
        meaning="Many rows of a batch are copies of each other in every input: the batch is smaller than it looks, and the copied "
        "samples weigh more than the others.",
        advice="Look for a dataset that was joined with itself, a sampler with replacement, and augmentation that is meant to make "
        "copies differ and does not (a random generator that every worker seeds alike).",
        threshold="At least a quarter of the rows are copies, in 2 sampled steps in a row. In a shuffled data set without copies there "
        "are none at all; a few come with real data. Steps with a clip of one value everywhere count none: rows may be alike because "
        "of it.",
        check=rows_duplicated,
    ),
)
