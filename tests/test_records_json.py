"""Records to JSON and back."""

from __future__ import annotations

import json
import math
import random
from dataclasses import fields, is_dataclass, replace
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import numpy as np
import pytest

from probe.errors import ProbeTypeError, ProbeValueError
from probe.records import Finding, Head, Part, StepRecord
from probe.records_json import from_json, parse, to_json
from records_factory import finding, speech_record, text_record, whisper_record

pytestmark = pytest.mark.pure  # of torch and probe alone: the same with every transformers


def random_value(hint: Any, rng: random.Random) -> Any:
    """Return a random value of any type that a record field can have."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        return None if rng.random() < 0.3 else random_value(next(kind for kind in arguments if kind is not type(None)), rng)
    if origin is Literal:
        return rng.choice(arguments)
    if origin is tuple:
        kinds = [arguments[0]] * rng.randrange(4) if arguments[-1] is Ellipsis else arguments
        return tuple(random_value(kind, rng) for kind in kinds)
    if origin is dict:
        return {f"key {index}": random_value(arguments[1], rng) for index in range(rng.randrange(4))}
    if is_dataclass(hint):
        hints = get_type_hints(hint)
        return hint(**{field.name: random_value(hints[field.name], rng) for field in fields(hint)})
    if hint is float:
        return rng.choice((rng.gauss(0, 1e6), -0.0, 5e-324, 1.7976931348623157e308, float(rng.randrange(100))))
    if hint is bool:
        return rng.random() < 0.5
    if hint is int:
        return rng.randrange(-(2**62), 2**62)
    assert hint is str
    return "".join(rng.choice('aé\n\r\t\x1b\x9b\u2028\u202e\ud800😀"\\') for _ in range(rng.randrange(8)))


@pytest.mark.parametrize("seed", range(30))
def test_every_field_comes_back(seed: int) -> None:
    """Whatever a record holds comes back equal, in every field of every nested dataclass, as one ASCII line."""
    record = random_value(StepRecord, random.Random(seed))
    line = to_json(record)
    assert "\n" not in line
    assert line.isascii()
    assert from_json(line) == record


def test_types_come_back() -> None:
    """Tuples come back as tuples (not lists), nested dataclasses as themselves, and the record is hashable where it was."""
    record = from_json(to_json(speech_record()))
    assert record == speech_record()
    assert isinstance(record.heads[1], Head)
    assert isinstance(record.heads[1].codebooks, tuple)
    assert record.conditioning is not None
    assert record.conditioning.tokens == (("audio_in_token_id", 1500), ("audio_out_token_id", 812))


def test_none_and_empty_tables_are_left_out() -> None:
    """``None`` and empty tables take no room in a line; zero, False-like numbers and empty strings stay."""
    data = json.loads(to_json(text_record()))
    assert set(data) == {"step", "time", "ranks", "not_measured"}
    assert data["time"] == 0.0
    assert json.loads(to_json(whisper_record()))["inputs"]["ids_outside_vocabulary"] == 0


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_no_literal_that_is_not_json(bad: float) -> None:
    """A number that is not finite never reaches the file: the key is left out, and a place in a list is null."""
    record = whisper_record(metrics={"probe/loss": bad, "probe/grad/norm": 1.0})
    assert record.optimisation is not None
    record = replace(
        record,
        optimisation=replace(record.optimisation, loss=bad, learning_rates=(bad, 0.5)),
        parts=(Part("empty", 0, bad),),
        findings=(replace(finding(), evidence={"x": bad}),),
    )
    data = json.loads(to_json(record), parse_constant=lambda name: pytest.fail(f"{name} in the file"))
    assert data["metrics"] == {"probe/grad/norm": 1.0}
    assert "loss" not in data["optimisation"]
    assert data["optimisation"]["learning_rates"] == [None, 0.5]
    back = from_json(to_json(record))
    assert back.optimisation is not None
    assert back.optimisation.loss is None
    assert math.isnan(back.optimisation.learning_rates[0])
    assert back.optimisation.learning_rates[1] == 0.5
    assert back.findings[0].evidence == {}
    assert math.isnan(back.parts[0].trainable_share)


@pytest.mark.parametrize("literal", ["NaN", "Infinity", "-Infinity", "1e999"])
def test_reading_is_strict(literal: str) -> None:
    """NaN and Infinity are refused on reading too, also as a number too large."""
    with pytest.raises(ProbeValueError):
        from_json(f'{{"step":1,"time":{literal},"ranks":1}}')
    if literal != "1e999":
        with pytest.raises(ProbeValueError):
            from_json(f'{{"step":1,"time":0,"ranks":1,"novelty":{literal}}}')


def test_unknown_keys_are_ignored() -> None:
    """A line of a newer minor schema is read, whatever it has more, at any depth."""
    data = json.loads(to_json(whisper_record()))
    data["novelty"] = {"a": [1]}
    data["inputs"]["novelty"] = None
    data["heads"][0]["novelty"] = 3
    assert from_json(json.dumps(data)) == whisper_record()


def test_cut_off_line_is_refused_at_every_length() -> None:
    """No proper beginning of a line passes for a record."""
    line = to_json(text_record())
    for length in range(len(line)):
        with pytest.raises(ProbeValueError):
            from_json(line[:length])


@pytest.mark.parametrize(
    ("change", "where"),
    [
        ({"step": "1"}, "StepRecord.step"),
        ({"step": True}, "StepRecord.step"),
        ({"step": 1.5}, "StepRecord.step"),
        ({"time": "now"}, "StepRecord.time"),
        ({"time": 10**400}, "StepRecord.time"),
        ({"metrics": {"a": "b"}}, "StepRecord.metrics['a']"),
        ({"metrics": []}, "StepRecord.metrics"),
        ({"heads": [{"site": "x", "modality": "smell", "calls": 1}]}, "StepRecord.heads[0].modality"),
        ({"heads": [{"modality": "text", "calls": 1}]}, "StepRecord.heads[0].site is missing"),
        ({"conditioning": {"tokens": [["a", 1, 2]]}}, "StepRecord.conditioning.tokens[0]"),
        ({"inputs": 3}, "StepRecord.inputs"),
    ],
)
def test_wrong_types_are_named(change: dict[str, Any], where: str) -> None:
    """A value of another type than the field is an error that names the field."""
    with pytest.raises(ProbeValueError) as error:
        from_json(json.dumps({"step": 1, "time": 0.0, "ranks": 1, **change}))
    assert where in str(error.value)


def test_deep_nesting_is_an_error_of_ours() -> None:
    """A line made to exhaust the stack is refused like any broken line."""
    with pytest.raises(ProbeValueError):
        from_json("[" * 200_000)


def test_a_tensor_is_refused_by_name() -> None:
    """What is no plain data is an error that names the place, not a broken file."""
    with pytest.raises(ProbeTypeError, match=r"StepRecord\.metrics\['probe/loss'\] holds a object"):
        to_json(whisper_record(metrics={"probe/loss": object()}))
    with pytest.raises(ProbeTypeError, match="keys are strings"):
        to_json(whisper_record(metrics={1: 1.0}))


def test_numpy_numbers_are_numbers() -> None:
    """NumPy scalars that slip into a record are written as the numbers they are."""
    record = whisper_record(metrics={"a": np.float32(0.5), "b": np.float64(0.25), "c": np.int64(3), "d": np.float32("nan")})
    assert from_json(to_json(record)).metrics == {"a": 0.5, "b": 0.25, "c": 3.0}


def test_any_record_dataclass() -> None:
    """The same format holds for a finding on a line of its own."""
    assert parse(to_json(finding()), Finding) == finding()
