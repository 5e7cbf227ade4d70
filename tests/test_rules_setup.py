"""Rules about setup and modes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from judging import DECODER, in_order, judged, record, repeated, seen
from probe.records import BatchChecks, Inputs, Modes, Optimisation, Part, Setup, StepRecord

pytestmark = pytest.mark.pure  # of torch and probe alone: the same with every transformers


def test_a_tokenizer_with_more_ids_than_rows() -> None:
    """One id too many is a warning, and critical once such an id was fed; as many ids as rows, or unknown, is not."""
    large = replace(DECODER, tokenizer_size=289)
    assert seen("tokenizer-larger-than-model", record(), setup=large) == [("warning", "")]
    fed = record(inputs=Inputs(1, 4, ids_outside_vocabulary=1))
    assert seen("tokenizer-larger-than-model", fed, setup=large) == [("critical", "")]
    assert seen("tokenizer-larger-than-model", record(inputs=Inputs(1, 4, ids_outside_vocabulary=0)), setup=large) == [("warning", "")]
    assert seen("tokenizer-larger-than-model", fed, setup=replace(DECODER, tokenizer_size=288)) == []
    for unknown in (None, DECODER, replace(large, vocabulary=None)):
        assert seen("tokenizer-larger-than-model", record(), setup=unknown) is None


def test_a_warm_up_as_long_as_the_training() -> None:
    """As many steps of warm-up as there are, or more; one less is meant."""
    for warmup, found in ((100, [("warning", "")]), (500, [("warning", "")]), (99, []), (0, [])):
        assert seen("warm-up-never-ends", record(), setup=replace(DECODER, warmup_steps=warmup)) == found
    assert seen("warm-up-never-ends", record(), setup=Setup(warmup_steps=0, max_steps=0)) == []
    for unknown in (None, DECODER, Setup(warmup_steps=5)):
        assert seen("warm-up-never-ends", record(), setup=unknown) is None
    (symptom,) = judged("warm-up-never-ends", record(), setup=replace(DECODER, warmup_steps=400)) or ()
    assert "at most 25%" in symptom.message


def test_a_head_that_is_not_tied() -> None:
    """Only where the config says it is."""
    for ties, tied, found in ((True, False, [("warning", "")]), (True, True, []), (False, False, []), (False, True, [])):
        assert seen("head-untied", record(), setup=Setup(ties_head=ties, head_is_tied=tied)) == found
    for unknown in (None, Setup(ties_head=True), Setup(head_is_tied=False)):
        assert seen("head-untied", record(), setup=unknown) is None


def test_new_tokens_and_a_frozen_embedding() -> None:
    """Added tokens among the ids of the step, and an embedding that does not train."""
    marked, plain = record(checks=BatchChecks(4, added_ids=1)), record(checks=BatchChecks(4, added_ids=0))
    frozen, trained = Setup(embedding_trains=False), Setup(embedding_trains=True)
    assert seen("new-tokens-not-trained", marked, setup=frozen) == [("warning", "")]
    assert seen("new-tokens-not-trained", marked, setup=trained) == []
    assert seen("new-tokens-not-trained", plain, setup=frozen) == []
    for unknown, setup in ((record(), frozen), (record(checks=BatchChecks(4)), frozen), (marked, None), (marked, Setup())):
        assert seen("new-tokens-not-trained", unknown, setup=setup) is None


def modes(**numbers: Any) -> StepRecord:
    return record(modes=Modes(**numbers))


def test_dropout_that_is_off() -> None:
    """None of the layers is active, or there is none although the config names a probability; both are only told."""
    assert seen("dropout-off", modes(dropout_modules=4, dropout_active=0)) == [("info", "")]
    assert seen("dropout-off", modes(dropout_modules=4, dropout_active=1)) == []
    assert seen("dropout-off", modes(), setup=Setup(dropout=0.1)) == [("info", "")]
    assert seen("dropout-off", modes(dropout_modules=1, dropout_active=1), setup=Setup(dropout=0.1)) == []
    for setup in (None, Setup(), Setup(dropout=0.0)):
        assert seen("dropout-off", modes(), setup=setup) == []
    assert seen("dropout-off", record(), setup=Setup(dropout=0.1)) is None


def test_dropout_in_an_evaluation() -> None:
    """Any layer is one too many; without an evaluation nothing is known."""
    assert seen("dropout-in-evaluation", modes(dropout_in_evaluation=1)) == [("warning", "")]
    assert seen("dropout-in-evaluation", modes(dropout_in_evaluation=0)) == []
    assert seen("dropout-in-evaluation", modes()) is None
    assert seen("dropout-in-evaluation", record()) is None


def test_modules_in_eval_mode() -> None:
    """One symptom a module, of the first eight; frozen modules are not meant, and the model itself has the site ""."""
    assert seen("module-in-eval-mode", modes(in_eval_mode=("encoder", "norm"))) == [("warning", "encoder"), ("warning", "norm")]
    assert seen("module-in-eval-mode", modes(in_eval_mode_frozen=("encoder",))) == []
    assert seen("module-in-eval-mode", record()) is None
    (whole,) = judged("module-in-eval-mode", modes(in_eval_mode=("",))) or ()
    assert whole.site == ""
    assert whole.message.startswith("the whole model")
    many = judged("module-in-eval-mode", modes(in_eval_mode=tuple(f"norm{index}" for index in range(11)))) or []
    assert len(many) == 8
    assert many[0].message.endswith("(and 3 more modules)")
    assert many[0].message.startswith("norm0 has parameters")
    assert all(each.message.endswith("forwards") for each in judged("module-in-eval-mode", modes(in_eval_mode=("a",) * 8)) or ())


ADAPTERS = Part("adapters", 1000, 1.0, without_gradient=0, tensors=8, gradient_norm=0.1)
RATE = Optimisation(2.0, (1e-4,))


def adapted(part: Part = ADAPTERS, rest: Part | None = None, optimisation: Optimisation = RATE, **numbers: Any) -> StepRecord:
    found = Modes(**{"adapters": 4, "adapters_zero": 0, **numbers})
    return record(parts=(part, *([rest] if rest is not None else [])), optimisation=optimisation, modes=found)


def test_adapters_that_are_switched_off() -> None:
    """All of them, and they are to train; one that is on, or adapters that are not to train, are no finding."""
    assert seen("adapters-without-effect", adapted(adapters_disabled=4)) == [("critical", "")]
    assert seen("adapters-without-effect", adapted(adapters_disabled=3)) == []
    frozen, trained = replace(ADAPTERS, tensors=0, without_gradient=None), Part("rest", 10, 1.0, without_gradient=0, tensors=2)
    assert seen("adapters-without-effect", adapted(frozen, trained, adapters_disabled=4)) == []
    assert seen("adapters-without-effect", adapted(frozen, adapters_disabled=4)) == [("critical", "")]
    assert seen("adapters-without-effect", adapted(frozen)) == []
    assert seen("adapters-without-effect", adapted(replace(frozen, without_gradient=0))) == []
    assert seen("adapters-without-effect", adapted(adapters=0)) == []
    behind = replace(adapted(adapters_disabled=4), parts=(trained, ADAPTERS))
    assert seen("adapters-without-effect", behind) == [("critical", "")]
    assert seen("adapters-without-effect", record(modes=Modes(adapters=4))) is None
    assert seen("adapters-without-effect", record(parts=(ADAPTERS,))) is None
    assert seen("adapters-without-effect", record(parts=(trained,), modes=Modes(adapters=4, adapters_disabled=4))) is None


def test_adapters_without_a_gradient() -> None:
    """None of their tensors; where the gradients of everything are gone in a loop of one's own, nobody knows."""
    without = replace(ADAPTERS, without_gradient=8)
    assert seen("adapters-without-effect", adapted(without)) == [("critical", "")]
    assert seen("adapters-without-effect", adapted(replace(ADAPTERS, without_gradient=7))) == []
    assert seen("adapters-without-effect", adapted(replace(ADAPTERS, without_gradient=None))) == []
    loop = Optimisation(None, ())
    assert seen("adapters-without-effect", adapted(without, optimisation=loop)) == []
    learning = Part("rest", 10, 1.0, without_gradient=0, tensors=2)
    assert seen("adapters-without-effect", adapted(without, learning, optimisation=loop)) == [("critical", "")]
    for silent in (replace(learning, without_gradient=2), replace(learning, tensors=0, without_gradient=None)):
        assert seen("adapters-without-effect", adapted(without, silent, optimisation=loop)) == []
    assert seen("adapters-without-effect", replace(adapted(without, learning), optimisation=None)) == []


def test_adapters_that_stay_zero() -> None:
    """After two updates that were made with a learning rate above 0; before that they are 0 as they should be."""
    zero = adapted(adapters_zero=4)
    assert seen("adapters-without-effect", *in_order(zero, zero, zero)) == [("critical", "")]
    assert seen("adapters-without-effect", *in_order(zero, zero)) == []
    assert seen("adapters-without-effect", *in_order(zero, zero, adapted(adapters_zero=3))) == []
    no_rate = replace(zero, optimisation=Optimisation(2.0, (0.0,)))
    assert seen("adapters-without-effect", *in_order(no_rate, zero, zero)) == []
    for unknown in (replace(zero, optimisation=None), replace(zero, parts=())):
        assert seen("adapters-without-effect", *in_order(unknown, zero, zero)) == []
    skipped = adapted(replace(ADAPTERS, nonfinite=True), adapters_zero=4)
    assert seen("adapters-without-effect", *in_order(skipped, zero, zero)) == []


def test_healthy_records_have_none() -> None:
    """A model of the usual kind: no rule of setup and modes says anything."""
    setup = replace(DECODER, tokenizer_size=280, warmup_steps=10, ties_head=True, head_is_tied=True, embedding_trains=True, dropout=0.1)
    fine = {"modes": Modes(dropout_modules=9, dropout_active=9, dropout_in_evaluation=0), "checks": BatchChecks(4, added_ids=3)}
    codes = ("tokenizer-larger-than-model", "warm-up-never-ends", "head-untied", "new-tokens-not-trained")
    for code in (*codes, "dropout-off", "dropout-in-evaluation", "module-in-eval-mode"):
        assert seen(code, *repeated(4, **fine), setup=setup) == []
