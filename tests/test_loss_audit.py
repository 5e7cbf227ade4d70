"""The loss audit on numbers made by hand: what is expected, when it agrees, and every cause when it does not."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, get_args

import pytest

from probe.assemble.loss_audit import in_words
from probe.assemble.loss_causes import explain as causes_of
from probe.assemble.loss_figures import Figures, Kind
from probe.assemble.loss_terms import Expectation, TermSums
from probe.foreign.trainer_loss import LossSettings
from probe.measure.variants import COLUMNS, VARIANTS
from probe.sites.reduction import Reduction

# Two micro-batches of one rank: 10 labels of 4.0 nats and 30 of 2.0; their mean over tokens is 2.5, the mean of means 3.0.
COUNTS, LOSSES = (10.0, 30.0), (4.0, 2.0)
SLIPS = {"meant": 1.0, "shift_less": 0.91, "shift_more": 1.37, "padding_out": 0.83}
UNIFORM = 1.6  # times the cross-entropy


def columns(counts: tuple[float, ...] = COUNTS, losses: tuple[float, ...] = LOSSES, **labelled: float) -> dict[str, float]:
    """Return the audit's columns of one rank; ``labelled`` is the number of labels of a variant, else that of the meant one."""
    found = dict.fromkeys(COLUMNS, 0.0)
    for variant in VARIANTS:
        total = sum(counts)
        share = labelled.get(variant, total) / total if total else 0.0
        for what, factor in (("cross_entropy", SLIPS[variant]), ("uniform", SLIPS[variant] * UNIFORM)):
            each = [factor * loss for loss in losses]
            summed = share * sum(n * x for n, x in zip(counts, each))
            found[f"{variant}:{what}"] = summed
            found[f"{variant}:micro_{what}"] = sum(x for n, x in zip(counts, each) if n)
            found[f"{variant}:rank_{what}"] = summed / (share * total) if share * total else 0.0
        found[f"{variant}:labelled"] = share * total
    return found


def expectation(**changes: Any) -> Expectation:
    given: dict[str, Any] = {"terms": (TermSums(1.0, columns(), 40.0),), "by": "items", "micro_batches": 2, "items": 40.0, **changes}
    return Expectation(**given)


MICRO = expectation(by="micro-batch", items=None)
SETTINGS = LossSettings(accumulation=2, takes_kwargs=True, skips_first=True, hides_nonfinite=True, version="5.23.0")
CAUSAL = Reduction("LlamaForCausalLM", "items", label_shift=1)
WHISPER = Reduction("WhisperForConditionalGeneration", "micro-batch", label_shift=0)


def figures(loss: float | None, expected: Expectation | None = None, **changes: Any) -> Figures:
    given: dict[str, Any] = {"settings": SETTINGS, "reduction": CAUSAL, **changes}
    return Figures(loss, expected or expectation(), **given)


def explain(of: Figures) -> tuple[str, ...]:
    return tuple(cause.sentence for cause in causes_of(of))


def kinds(of: Figures) -> list[Kind]:
    return [cause.kind for cause in causes_of(of)]


def only(found: tuple[str, ...]) -> str:
    (cause,) = found
    return cause


def test_token_mean_and_mean_of_means() -> None:
    """Items: every label weighs the same; micro-batch: every micro-batch does. Both without smoothing and with."""
    assert expectation().value() == pytest.approx(2.5)
    assert MICRO.value() == pytest.approx(3.0)
    assert expectation(smoothing=0.1).value() == pytest.approx(0.9 * 2.5 + 0.1 * 2.5 * UNIFORM)
    assert replace(MICRO, smoothing=0.1).value() == pytest.approx(0.9 * 3.0 + 0.1 * 3.0 * UNIFORM)


def test_infinite_uniform_counts_only_when_smoothing() -> None:
    """A suppressed token makes the mean over the vocabulary infinite; without smoothing that is of no consequence."""
    sums = {**columns(), "meant:uniform": float("inf")}
    assert expectation(terms=(TermSums(1.0, sums, 40.0),)).value() == pytest.approx(2.5)


def test_ranks_with_and_without_averaging() -> None:
    """Averaged over devices all labels are one mean; else each rank takes its own and the ranks are averaged."""
    one, two = columns((10.0,), (4.0,)), columns((30.0,), (2.0,))
    both = {name: one[name] + two[name] for name in one}
    terms = (TermSums(1.0, both, 40.0),)
    assert expectation(terms=terms, ranks=2, averaged=True).value() == pytest.approx(2.5)
    assert expectation(terms=terms, ranks=2, averaged=False).value() == pytest.approx(3.0)


def test_first_labels_that_an_old_version_counts() -> None:
    """Where a version counts the first label of each row by rule, the expected loss is divided by that number, too."""
    old = expectation(terms=(TermSums(1.0, columns(), 44.0),), items=44.0)
    assert old.value() == pytest.approx(2.5 * 40 / 44)
    assert explain(figures(2.5 * 40 / 44, old)) == ()
    said = in_words(figures(2.0, old, settings=replace(SETTINGS, version="4.57.6")))
    assert said == "sum over 40 labels ÷ 44, as transformers 4.57.6 counts the first label of each row, too"


def test_weights_and_auxiliary() -> None:
    """Codebooks enter with their weight, and a declared auxiliary loss is added."""
    terms = (TermSums(1.0, columns(), 40.0), TermSums(0.5, columns(), 40.0))
    assert expectation(terms=terms, auxiliary=0.3).value() == pytest.approx(1.5 * 2.5 + 0.3)
    assert replace(MICRO, terms=terms, auxiliary=0.3).value() == pytest.approx(1.5 * 3.0 + 0.3)


def test_nothing_to_divide_by() -> None:
    """Without a label there is no expected loss."""
    empty = TermSums(1.0, columns((0.0, 0.0)), 0.0)
    assert expectation(terms=(empty,)).value() is None
    assert replace(MICRO, terms=(empty,)).value() is None
    assert expectation(items=0.0).value(divisor="given") is None


@pytest.mark.parametrize("loss", [2.5, 2.5 * 1.0009, 2.5 * 0.9991])
def test_agreement_has_no_cause(loss: float) -> None:
    """Within one in a thousand nothing is said."""
    assert explain(figures(loss)) == ()


def test_beyond_agreement_something_is_said() -> None:
    """Further off, there always is a cause, even without an explanation."""
    assert only(explain(figures(2.5 * 1.0013))) == "something adds 0.00325 to the cross-entropy"
    assert only(explain(figures(2.0))) == "something takes 0.5 from the cross-entropy"


def test_rounding_of_half_precision() -> None:
    """A loss in bfloat16 has three digits: it may be off by 2^-7 of itself, one in float16 by no more than others."""
    assert explain(figures(2.5 * 1.007, dtype="bfloat16")) == ()
    assert explain(figures(2.5 * 1.01, dtype="bfloat16")) != ()
    assert explain(figures(2.5 * 1.007, dtype="float16")) != ()


def test_sampled_rows_agree_within_three_standard_errors() -> None:
    """Where only some rows were evaluated, three standard errors are agreement, and four are not."""
    sampled = expectation(terms=(TermSums(1.0, columns(), 40.0, variance=16.0),))
    assert sampled.standard_error() == pytest.approx(4.0 / 40)
    assert explain(figures(2.5 + 0.29, sampled)) == ()
    assert explain(figures(2.5 + 0.41, sampled)) != ()


def test_whisper_with_accumulation() -> None:
    """A model that ignores num_items_in_batch although its forward takes kwargs: the sum of the micro-batches' means."""
    cause = only(explain(figures(6.0, replace(MICRO, items=40.0), reduction=WHISPER)))
    assert "the losses of the 2 accumulated micro-batches are added up and not divided by 2" in cause
    assert "WhisperForConditionalGeneration.forward takes **kwargs, but the model does not use it" in cause


@pytest.mark.parametrize(
    ("changes", "expected", "why"),
    [
        ({"backward_share": 2.0, "version": "4.46.3"}, MICRO, "transformers 4.46.3 divides only what it logs"),
        ({"scaled": True}, MICRO, "Trainer.loss_is_scaled_for_ga is True"),
        ({"loss_function": "my_loss"}, MICRO, "the Trainer leaves that to compute_loss_func=my_loss"),
        ({"smoothing": 0.1}, replace(MICRO, items=40.0, smoothing=0.1), "which its label smoothing does not use"),
    ],
)
def test_why_accumulation_is_not_divided(changes: dict[str, Any], expected: Expectation, why: str) -> None:
    """Each way in which the division is left out is named."""
    value = expected.value()
    assert value is not None
    cause = explain(figures(2 * value, expected, settings=replace(SETTINGS, smoother_shifts=True, **changes)))[0]
    assert "not divided by 2" in cause
    assert why in cause


def test_what_the_log_says_is_only_a_share() -> None:
    """4.46 logs a k-th of what it backpropagated, and that is said."""
    old = replace(SETTINGS, backward_share=2.0, version="4.46.3")
    causes = explain(figures(6.0, MICRO, settings=old, logged=3.0))
    assert causes[1] == "the log does not show it: it says 3"


def test_divided_once_too_often() -> None:
    """Divided by the labels and by the accumulation: foretold by loss_is_scaled_for_ga, or found."""
    told = only(explain(figures(1.25, settings=replace(SETTINGS, scaled=False))))
    assert "Trainer.loss_is_scaled_for_ga is False" in told
    assert only(explain(figures(1.25))) == "the loss is divided by the 2 micro-batches of the step once too often"


def test_items_that_never_arrive() -> None:
    """A wrapper that drops num_items_in_batch: each micro-batch takes its own mean, and nobody divides by the accumulation."""
    causes = explain(figures(6.0))
    assert causes == (
        "num_items_in_batch (40) does not reach the loss: each micro-batch takes the mean over its own labels",
        "the loss is summed over the 2 micro-batches of the step and divided by nothing",
    )


def test_ranks_once_too_often() -> None:
    """average_tokens_across_devices multiplies by the ranks a loss that was not divided by all their labels."""
    two = replace(SETTINGS, ranks=2, averages_tokens=True, accumulation=1)
    expected = replace(MICRO, items=40.0, ranks=2, averaged=True)
    assert "multiplied by the 2 ranks (average_tokens_across_devices)" in only(
        explain(figures(6.0, expected, settings=two, reduction=WHISPER))
    )
    assert "multiplied by the number of ranks, 2" in only(
        explain(figures(5.0, settings=replace(SETTINGS, ranks=2), expected=expectation(micro_batches=1)))
    )


def test_accumulation_and_ranks_together() -> None:
    """Both factors at once are told apart."""
    two = replace(SETTINGS, ranks=2, averages_tokens=True)
    expected = replace(MICRO, items=40.0, ranks=2, micro_batches=4, averaged=True)
    value = expected.value()
    assert value is not None
    cause = only(explain(figures(4 * value, expected, settings=two, reduction=WHISPER)))
    assert "2 accumulated micro-batches" in cause
    assert "2 ranks" in cause


def test_items_of_the_wrong_labels() -> None:
    """GPT-2 in 5.23: the first label of each row is counted, and the loss is not over it."""
    wrong = expectation(items=44.0)
    cause = only(explain(figures(2.5 * 40 / 44, wrong, settings=replace(SETTINGS, skips_first=False))))
    assert (
        cause == "num_items_in_batch is 44, and the loss is over 40 labels (it counts the first label of each row, which nothing predicts)"
    )


def test_codebooks_divided_by_the_labels_of_the_text() -> None:
    """HiggsAudioV2 in 5.23: one number divides the text and every codebook."""
    terms = (TermSums(1.0, columns(), 40.0), TermSums(1.0, columns((20.0, 60.0)), 80.0))
    wrong = expectation(terms=terms)
    together = replace(CAUSAL, together="text + sum of 1 codebooks")
    assert wrong.value() == pytest.approx(5.0)
    cause = only(explain(figures(2.5 + 5.0, wrong, reduction=together)))
    assert cause.startswith("num_items_in_batch is 40, and the loss is over 40 … 80 labels")


@pytest.mark.parametrize(
    ("variant", "words"),
    [("shift_less", "one position less"), ("shift_more", "one position more"), ("padding_out", "left out of the loss")],
)
@pytest.mark.parametrize("expected", [expectation(), MICRO], ids=["items", "micro-batch"])
def test_labels_laid_otherwise(variant: str, words: str, expected: Expectation) -> None:
    """A loss over labels that are shifted too little, too much, or without padding is recognised under either reduction."""
    value = expected.value()
    assert value is not None
    assert words in only(
        explain(figures(value * SLIPS[variant], expected, settings=replace(SETTINGS, takes_kwargs=expected.by == "items")))
    )


def test_the_smoother_that_does_not_shift() -> None:
    """With label smoothing the Trainer lays the labels, and of a class that it does not know it shifts none."""
    smoothed = expectation(smoothing=0.1)
    value = smoothed.value()
    assert value is not None
    name = replace(CAUSAL, model_class="VoxtralForConditionalGeneration")
    cause = only(explain(figures(value * SLIPS["shift_less"], smoothed, settings=replace(SETTINGS, smoothing=0.1), reduction=name)))
    assert "does not shift the labels of VoxtralForConditionalGeneration" in cause


def test_the_smoother_that_shifts_what_it_should_not() -> None:
    """The other way round: labels that lie position by position are shifted."""
    smoothed = expectation(smoothing=0.1)
    value = smoothed.value()
    assert value is not None
    shifting = replace(SETTINGS, smoothing=0.1, smoother_shifts=True)
    cause = only(explain(figures(value * SLIPS["shift_more"], smoothed, settings=shifting, reduction=WHISPER)))
    assert "shifts the labels of WhisperForConditionalGeneration, which are not to be shifted" in cause


def test_two_slips_of_one_version() -> None:
    """4.57's Voxtral with smoothing and accumulation: no shift, and not divided; both are said."""
    smoothed = replace(MICRO, items=40.0, smoothing=0.1)
    value = smoothed.value()
    assert value is not None
    causes = explain(figures(2 * value * SLIPS["shift_less"], smoothed, settings=replace(SETTINGS, smoothing=0.1)))
    assert len(causes) == 2
    assert "does not shift" in causes[0]
    assert "not divided by 2" in causes[1]


def test_smoothing_that_is_missing() -> None:
    """A factor that is set and has no effect is named, and so is the name of the labels where that is why."""
    smoothed = expectation(smoothing=0.1)
    settings = replace(SETTINGS, smoothing=0.1, smoother_shifts=True)
    assert only(explain(figures(2.5, smoothed, settings=settings))) == "label_smoothing_factor=0.1 has no effect: the loss is not smoothed"
    assert "looks for `labels`" in only(explain(figures(2.5, smoothed, settings=settings, unnamed=True)))


def test_smoothing_that_nobody_asked_for() -> None:
    """A loss that is smoothed although the factor is 0."""
    assert only(explain(figures(0.9 * 2.5 + 0.1 * 2.5 * UNIFORM))) == "the loss is smoothed by 0.1, and label_smoothing_factor is 0"


def test_labels_at_padding_positions() -> None:
    """They are counted and named although the loss is as expected."""
    padded = expectation(terms=(TermSums(1.0, columns(padding_out=33.0), 40.0),))
    assert only(explain(figures(2.5, padded))).startswith("7 of 40 labels lie at padding positions")


def test_padding_that_cannot_be_told() -> None:
    """Without a way to tell padding nothing is said of it."""
    assert explain(figures(2.5, expectation(terms=(TermSums(1.0, columns(padding_out=0.0), 40.0),)))) == ()


def test_all_labels_masked() -> None:
    """A step without a label has nothing to learn from, and that comes before the NaN that it makes."""
    empty = expectation(terms=(TermSums(1.0, columns((0.0, 0.0)), 0.0),), items=0.0)
    causes = explain(figures(None, empty, nonfinite=2))
    assert causes[0] == "every label of this step is -100: there is nothing to learn from"
    assert causes[1].startswith("the loss of 2 of 2 micro-batches is NaN or Inf")


def test_one_micro_batch_masked() -> None:
    """Some micro-batches without a label are counted, whether the loss agrees or not."""
    assert only(explain(figures(2.5, masked=1))) == "1 of 2 micro-batches have no label to learn from: all of theirs are -100"


@pytest.mark.parametrize(
    ("logged", "hides", "words"),
    [
        (2.4, True, "and logging_nan_inf_filter hides it: the log says 2.4"),
        (None, True, "and logging_nan_inf_filter keeps it out of the log"),
        (None, False, "(first: micro-batch 1)"),
    ],
)
def test_nan_and_who_hides_it(logged: float | None, hides: bool, words: str) -> None:
    """A loss that is not finite is told with its micro-batch, and whether the log shows it."""
    settings = replace(SETTINGS, hides_nonfinite=hides)
    cause = only(explain(figures(None, settings=settings, nonfinite=1, first_nonfinite=1, logged=logged)))
    assert cause.startswith("the loss of 1 of 2 micro-batches is NaN or Inf (first: micro-batch 1)")
    assert cause.endswith(words)


def test_an_auxiliary_loss_in_the_model() -> None:
    """More than the cross-entropy, and the model's own loss already has it."""
    cause = only(explain(figures(2.5 + 0.777, own=2.5 + 0.777)))
    assert (
        cause
        == "something in the model's forward adds 0.777 to the cross-entropy (an auxiliary loss?): the model's own loss is already 3.277"
    )


def test_a_declared_auxiliary_loss_that_accumulates() -> None:
    """A declared auxiliary loss is added in every micro-batch and never divided."""
    declared = expectation(auxiliary=0.3)
    cause = only(explain(figures(2.5 + 0.6, declared)))
    assert cause == "the auxiliary loss of each of the 2 micro-batches is added and not divided: it weighs 2 times as much"


def test_a_subclass_that_changes_the_loss() -> None:
    """What a subclass overrides is named, with the difference and the factor."""
    changed = replace(SETTINGS, overridden=(("compute_loss", "Tripled"),))
    cause = only(explain(figures(7.5, settings=changed, own=2.5)))
    assert cause == "compute_loss is overridden by Tripled: it adds 5 to the cross-entropy, a factor of 3"


def test_a_function_of_the_users() -> None:
    """compute_loss_func is taken for a token mean, and the words say so; when it is something else, that is the cause."""
    mine = replace(SETTINGS, loss_function="focal")
    assert explain(figures(2.5, settings=mine)) == ()
    assert in_words(figures(2.5, settings=mine)) == "token mean over 40 labels, if that is what compute_loss_func=focal takes"
    assert only(explain(figures(1.9, settings=mine))).startswith("compute_loss_func=focal takes another loss than the token mean")


def test_what_is_foretold_comes_before_what_might_be() -> None:
    """Two explanations of the same number: the one that the settings foretell is given."""
    two = replace(SETTINGS, ranks=2, averages_tokens=False)
    expected = replace(MICRO, items=40.0, ranks=2, micro_batches=4)
    value = expected.value()
    assert value is not None
    assert "forward takes **kwargs" in only(explain(figures(2 * value, expected, settings=two, reduction=WHISPER)))


def test_a_foretold_slip_comes_before_any_other_kind() -> None:
    """A shift that the smoother is known to leave out explains the same number as a division would, and is given."""
    halved = {name: value / SLIPS["shift_less"] / 2 if name.startswith("shift_less") and "labelled" not in name else value
              for name, value in columns().items()}  # fmt: skip
    smoothed = expectation(terms=(TermSums(1.0, halved, 40.0),), smoothing=0.1)
    value = smoothed.value()
    assert value is not None
    assert "does not shift the labels" in only(explain(figures(value / 2, smoothed, settings=replace(SETTINGS, smoothing=0.1))))
    assert "divided by the 2 micro-batches" in only(explain(figures(value / 2, smoothed)))


def test_three_slips_at_once_are_not_believed() -> None:
    """So many that nothing foretells would fit almost any number."""
    value = expectation(smoothing=0.1).value(variant="shift_more")
    assert value is not None
    assert only(explain(figures(2 * value))).startswith("something adds")
    assert len(explain(figures(value))) == 2


@pytest.mark.parametrize(
    ("expected", "words"),
    [
        (expectation(), "token mean over 40 labels"),
        (MICRO, "mean of 2 micro-batch means"),
        (replace(MICRO, micro_batches=1), "mean over 40 labels"),
        (expectation(ranks=2, averaged=True), "token mean over 40 labels of all ranks"),
        (expectation(ranks=2), "token mean over 40 labels, mean over 2 ranks"),
        (expectation(smoothing=0.1), "token mean over 40 labels, label smoothing 0.1"),
    ],
)
def test_the_reduction_in_words(expected: Expectation, words: str) -> None:
    """Each rule is said as it was applied."""
    assert in_words(figures(1.0, expected)) == words


AUDIO = TermSums(0.5, columns((20.0, 60.0), (7.4, 5.1)), 80.0, modality="audio")
BOTH = expectation(terms=(TermSums(1.0, columns(), 40.0), AUDIO), items=None)


@pytest.mark.parametrize(
    ("by", "modality", "left"),
    [("items", "audio", 2.5), ("items", "text", 2.8375), ("micro-batch", "audio", 3.0), ("micro-batch", "text", 3.125)],
)
def test_the_loss_of_a_modality_that_is_missing(by: Any, modality: str, left: float) -> None:
    """A loss of the text alone where there are audio labels, and the other way round, is recognised under either reduction."""
    (cause,) = causes_of(figures(left, replace(BOTH, by=by), settings=replace(SETTINGS, takes_kwargs=False)))
    assert cause.kind == modality
    assert cause.sentence == f"the loss of the {modality} tokens is not in the loss, although there are labels for them"


def test_a_modality_without_labels_is_not_missed() -> None:
    """With one modality, or without labels of the other, no loss is said to be missing."""
    empty = columns((0.0, 0.0), (0.0, 0.0))
    alone = expectation(terms=(TermSums(1.0, columns(), 40.0), TermSums(1.0, empty, 0.0, modality="audio")), by="micro-batch", items=None)
    assert not {"audio", "text"} & set(kinds(figures(1.0, alone)))


SMOOTHED = expectation(smoothing=0.1)
SHIFTING = replace(SETTINGS, smoothing=0.1, smoother_shifts=True)
KINDS: list[tuple[str, Figures]] = [
    ("accumulation", figures(6.0, replace(MICRO, items=40.0), reduction=WHISPER)),
    ("accumulation", figures(1.25)),
    ("ranks", figures(5.0, settings=replace(SETTINGS, ranks=2), expected=expectation(micro_batches=1))),
    ("items", figures(3.0)),
    ("shift", figures(2.5 * SLIPS["shift_less"])),
    ("shift", figures(2.5 * SLIPS["shift_more"])),
    ("padding", figures(2.5 * SLIPS["padding_out"])),
    ("padding", figures(2.5, expectation(terms=(TermSums(1.0, columns(padding_out=33.0), 40.0),)))),
    ("smoothing", figures(2.5, SMOOTHED, settings=SHIFTING)),
    ("smoothing", figures(0.9 * 2.5 + 0.1 * 2.5 * UNIFORM)),
    ("masked", figures(2.5, masked=1)),
    ("nonfinite", figures(None, nonfinite=1)),
    ("auxiliary", figures(2.5 + 0.6, expectation(auxiliary=0.3), settings=replace(SETTINGS, takes_kwargs=False))),
    ("loss_function", figures(1.9, settings=replace(SETTINGS, loss_function="focal"))),
    ("forward", figures(2.5 + 0.777, own=2.5 + 0.777)),
    ("override", figures(7.7, settings=replace(SETTINGS, overridden=(("compute_loss", "Mine"),)))),
    ("unexplained", figures(2.0)),
]


@pytest.mark.parametrize(("kind", "found"), KINDS, ids=[f"{kind}-{index}" for index, (kind, _) in enumerate(KINDS)])
def test_every_cause_has_its_kind(kind: str, found: Figures) -> None:
    """Whatever the words are, the kind says what a cause is about."""
    assert kinds(found) == [kind]


def test_the_kind_of_a_log_that_hides() -> None:
    """A log of a share of the loss is a cause of its own beside what it hides."""
    old = replace(SETTINGS, takes_kwargs=False, backward_share=2.0, version="4.46.3")
    assert kinds(figures(6.0, MICRO, settings=old, logged=3.0)) == ["accumulation", "log"]


def test_every_kind_is_tried() -> None:
    """The tests above leave no kind out."""
    assert {kind for kind, _ in KINDS} | {"log", "text", "audio"} == set(get_args(Kind))
