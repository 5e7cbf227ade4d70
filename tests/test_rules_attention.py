"""Rules about what layers attend to, and about feed-forward branches."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from judging import in_order, judged, record, repeated, seen
from probe.records import Attention, BatchChecks, Branches, HeadwiseAttention, Optimisation, Part, SiteStatistics, StepRecord

pytestmark = pytest.mark.pure  # of torch and probe alone: the same with every transformers


def layer(site: str = "layers.0", kind: Any = "decoder", *, keys: int = 8, per_head: bool = True, **values: Any) -> Attention:
    heads = {name: (value, value) if isinstance(value, float) else value for name, value in values.items()}
    means = {name: sum(value) / len(value) for name, value in heads.items() if value}
    return Attention(site, kind, "", 1, heads=2, keys=keys, per_head=HeadwiseAttention(**heads) if per_head else None, **means)


def layers(*rows: Attention) -> StepRecord:
    return record(attention=rows)


def three(code: str, *rows: Attention) -> list[tuple[str, str]] | None:
    return seen(code, *in_order(*[layers(*rows)] * 3))


OTHER = layer("layers.1", entropy=0.8, first_token=0.1)
WANTING = {
    "attention-collapsed": (layer(entropy=0.009, first_token=0.1), layer(entropy=0.01, first_token=0.1)),
    "attention-uniform": (layer(entropy=1 - 0.9e-6, first_token=0.1), layer(entropy=1 - 1.1e-6, first_token=0.1)),
    "attention-on-first-token": (layer(entropy=0.1, first_token=0.981), layer(entropy=0.1, first_token=0.98)),
}


@pytest.mark.parametrize("code", WANTING)
def test_every_head_three_times_in_a_row(code: str) -> None:
    """Beyond the bound in every head of a layer, three times in a row; at the bound, or once otherwise, is no finding."""
    bad, fine = WANTING[code]
    found = [("warning", "layers.0")]
    assert three(code, bad, OTHER) == found
    assert three(code, fine, OTHER) == []
    assert seen(code, *in_order(*[layers(bad, OTHER)] * 2)) == []
    for order in ((fine, bad, bad), (bad, fine, bad), (bad, bad, fine)):
        assert seen(code, *in_order(*(layers(each, OTHER) for each in order))) == []
    assert seen(code, *in_order(*(layers(each, OTHER) for each in (fine, bad, bad, bad)))) == found
    (symptom,) = judged(code, *in_order(*[layers(bad, OTHER)] * 3)) or ()
    assert symptom.evidence["heads"] == 2


@pytest.mark.parametrize(
    ("code", "values"),
    [
        ("attention-collapsed", {"entropy": (0.001, 0.02)}),
        ("attention-uniform", {"entropy": (1.0, 0.999)}),
        ("attention-on-first-token", {"entropy": 0.1, "first_token": (1.0, 0.97)}),
    ],
)
def test_one_head_that_is_well_is_enough(code: str, values: dict[str, Any]) -> None:
    """A layer of which one head looks elsewhere is not judged."""
    assert three(code, layer(**values), OTHER) == []


@pytest.mark.parametrize("code", WANTING)
def test_few_keys_say_nothing(code: str) -> None:
    """Below eight keys, or without the number, a layer is passed over; with none left nothing is said."""
    bad, _ = WANTING[code]
    assert three(code, replace(bad, keys=7)) is None
    assert three(code, replace(bad, keys=7), OTHER) == []
    assert three(code, Attention("layers.0", "decoder", "", 1, keys=8)) is None
    assert seen(code, *repeated(3)) is None
    for unseen in (replace(WANTING[code][1], keys=7), Attention("layers.0", "decoder", "", 1, keys=8)):
        between = layers(bad, OTHER), layers(bad, OTHER), layers(unseen, OTHER), layers(bad, OTHER)
        assert seen(code, *in_order(*between)) == [("warning", "layers.0")]


@pytest.mark.parametrize("code", WANTING)
def test_heads_that_are_not_told_apart(code: str) -> None:
    """Then the mean of the layer stands for its heads."""
    bad, fine = WANTING[code]
    assert three(code, replace(bad, per_head=None), OTHER) == [("warning", "layers.0")]
    assert three(code, replace(fine, per_head=None), OTHER) == []
    assert three(code, replace(bad, per_head=HeadwiseAttention()), OTHER) == [("warning", "layers.0")]


def test_a_collapse_onto_the_first_key_is_told_once() -> None:
    """It has its own rule."""
    both = layer(entropy=0.001, first_token=0.999)
    assert three("attention-collapsed", both, OTHER) == []
    assert three("attention-on-first-token", both, OTHER) == [("warning", "layers.0")]
    assert three("attention-collapsed", layer(entropy=0.001, first_token=(0.999, 0.1)), OTHER) == [("warning", "layers.0")]
    assert three("attention-collapsed", layer(entropy=0.001), OTHER) == [("warning", "layers.0")]


def test_layers_that_are_left_out_at_random() -> None:
    """Under layerdrop a layer counts with the newest three records, whichever of them it ran in."""
    flat, also, well = layer(entropy=1.0), layer("layers.1", entropy=1.0), layer("layers.1", entropy=0.5)
    assert seen("attention-uniform", *in_order(layers(flat, also), layers(flat), layers(flat, also))) == []
    assert seen("attention-uniform", *in_order(layers(flat, also), layers(flat, also), layers(flat))) == []
    assert seen("attention-uniform", *in_order(layers(flat, well), layers(flat), layers(flat))) == [("warning", "layers.0")]
    assert seen("attention-uniform", *in_order(layers(flat, well), *[layers(flat)] * 3)) == []


def test_all_layers_uniform_have_a_constant_input() -> None:
    """Where every layer of a kind is uniform its input is to blame; layers of another kind, or of few keys, do not count."""
    flat, also = layer(entropy=1.0), layer("layers.1", entropy=1.0)
    assert three("attention-uniform", flat, also) == []
    assert three("attention-uniform", flat, also, layer("encoder.0", "encoder", entropy=0.5)) == []
    assert three("attention-uniform", flat, layer("layers.2", keys=7, entropy=0.5)) == []
    assert three("attention-uniform", flat, Attention("layers.2", "decoder", "", 1, keys=8)) == []
    assert three("attention-uniform", flat, also, layer("layers.2", entropy=0.5)) == [("warning", "layers.0"), ("warning", "layers.1")]


@pytest.mark.parametrize("kind", ["decoder", "joint"])
def test_the_usual_sink_of_language_models(kind: str) -> None:
    """Where the other layers of a decoder have half of their mass there, too, one with all of it is normal; unless all layers are so."""
    stuck = layer("layers.0", kind, first_token=0.99)

    def beside(*masses: float) -> list[tuple[str, str]] | None:
        return three(
            "attention-on-first-token", stuck, *(layer(f"layers.{i + 1}", kind, first_token=mass) for i, mass in enumerate(masses))
        )

    found = [("warning", "layers.0")]
    assert beside(0.5, 0.7) == []
    assert beside(0.4, 0.5, 0.9) == []
    assert beside(0.4, 0.49, 0.9) == found
    assert beside(0.97) == []
    assert beside(0.6, 0.99) == []
    assert beside(0.99) == [*found, ("warning", "layers.1")]
    assert beside() == found
    assert three("attention-on-first-token", stuck, Attention("layers.1", kind, "", 1, keys=8)) == found
    assert three("attention-on-first-token", stuck, layer("e.0", "encoder", first_token=0.9)) == found


@pytest.mark.parametrize("kind", ["encoder", "cross"])
def test_encoders_have_no_sink(kind: str) -> None:
    """There a layer that looks at the first frame alone is told, whatever the others do."""
    rows = layer("layers.0", kind, first_token=0.99), layer("layers.1", kind, first_token=0.9)
    assert three("attention-on-first-token", *rows) == [("warning", "layers.0")]


def padded(*masses: float | None, kind: str = "decoder") -> list[tuple[str, str]] | None:
    return seen("attention-on-padding", *in_order(*(layers(Attention("layers.0", kind, "", 1, padding=mass)) for mass in masses)))  # type: ignore[arg-type]


def test_attention_on_padding() -> None:
    """More than a hundredth, twice in a row, of a decoder; Whisper's encoder hears the silence that pads its clips."""
    for kind in ("decoder", "joint"):
        assert padded(0.011, 0.011, kind=kind) == [("warning", "layers.0")]
    assert padded(0.01, 0.01) == []
    assert padded(0.011) == []
    assert padded(0.011, 0.0) == []
    assert padded(0.0, 0.011) == []
    assert padded(0.011, None) is None
    two = layers(*(Attention(f"layers.{i}", "decoder", "", 1, padding=mass) for i, mass in enumerate((0.0, 0.5))))
    assert seen("attention-on-padding", *in_order(two, two)) == [("warning", "layers.1")]
    assert padded(0.5, 0.5, kind="encoder") is None
    assert padded(0.5, 0.5, kind="cross") is None


def branched(
    *, text: int = 20, audio: int = 30, labels: int | None = 30, rms: float | None = 1.0, rate: float = 1e-3, **more: Any
) -> StepRecord:
    rows = (
        SiteStatistics("layers.0.mlp", "feed_forward", 1, elements=20, rms=1.0),
        SiteStatistics("layers.0.audio_mlp", "feed_forward", 1, elements=30, rms=rms),
    )
    parts = (
        Part("rest", 9, 1.0, 0, 1.0, tensors=3),
        Part("text_branch", 9, 1.0, 0, 1.0, tensors=3),
        Part("audio_branch", 9, 1.0, 0, 1.0, tensors=3),
    )
    checks = BatchChecks(4, audio_labels=labels)
    table = (Branches("layers.0", text, audio),)
    return record(
        **{"statistics": rows, "branches": table, "parts": parts, "checks": checks, "optimisation": Optimisation(1.0, (rate,)), **more}
    )


def dead(*records: StepRecord) -> list[tuple[str, str]] | None:
    return seen("branch-dead", *in_order(*records))


def test_a_branch_that_gives_nothing() -> None:
    """An output of exactly 0, three times in a row with a learning rate above 0."""
    nothing, little = branched(rms=0.0), branched(rms=1e-30)
    assert dead(nothing, nothing, nothing) == [("warning", "layers.0.audio_mlp")]
    assert dead(little, little, little) == []
    assert dead(nothing, nothing) == []
    assert dead(nothing, branched(), nothing) == []
    assert dead(*[branched(rms=0.0, rate=0.0)] * 4) == []
    assert dead(branched(rms=0.0, rate=0.0), nothing, nothing) == []
    assert dead(*[branched(rms=0.0, optimisation=None)] * 3) == [("warning", "layers.0.audio_mlp")]
    assert dead(*[branched(rms=0.0, optimisation=Optimisation(1.0, (0.0, 1e-3)))] * 3) == [("warning", "layers.0.audio_mlp")]
    assert dead(*[branched(rms=None)] * 3) == []
    assert dead(*[branched()] * 3) == []
    unused = SiteStatistics("layers.0.audio_mlp", "feed_forward", 1, elements=0, rms=0.0)
    assert dead(*[branched(statistics=(unused,))] * 3) == []
    head = SiteStatistics("lm_head", "lm_head", 1, elements=30, rms=0.0)
    assert dead(*[branched(statistics=(head,))] * 3) == []


def parts(name: str, **changes: Any) -> dict[str, Any]:
    return {"parts": tuple(replace(part, **changes) if part.name == name else part for part in branched().parts)}


@pytest.mark.parametrize("name", ["text_branch", "audio_branch"])
def test_a_branch_without_gradient(name: str) -> None:
    """No gradient, or one of exactly 0, three times in a row while the rest has one; not a frozen branch, nor one without tokens."""
    found = [("warning", name)]
    assert dead(*[branched(**parts(name, gradient_norm=0.0))] * 3) == found
    assert dead(*[branched(**parts(name, gradient_norm=None, without_gradient=3))] * 3) == found
    assert dead(*[branched(**parts(name, gradient_norm=0.1, without_gradient=2))] * 3) == []
    assert dead(*[branched(**parts(name, gradient_norm=None, without_gradient=None))] * 3) == []
    assert dead(*[branched(**parts(name, gradient_norm=None, without_gradient=0, tensors=0))] * 3) == []
    assert dead(*[branched(**parts(name, gradient_norm=0.0, trainable_share=0.0))] * 3) == []
    bad, unread = branched(**parts(name, gradient_norm=0.0)), branched(**parts(name, gradient_norm=None, without_gradient=None))
    assert dead(bad, unread, bad, bad) == found
    assert dead(*[branched(**parts(name, gradient_norm=0.0))] * 2) == []
    assert dead(branched(), *[branched(**parts(name, gradient_norm=0.0))] * 2) == []
    silent = tuple(replace(part, gradient_norm=0.0) for part in branched().parts)
    assert dead(*[branched(parts=silent)] * 3) == []
    none = {"text": 0} if name == "text_branch" else {"audio": 0, "labels": 0}
    assert dead(*[branched(**parts(name, gradient_norm=0.0), **none)] * 3) == []
    assert dead(*[branched(parts=())] * 3) == []


def test_audio_that_takes_the_other_branch() -> None:
    """Audio labels and no token in any audio branch, twice in a row; without audio labels there is nothing to route."""
    astray = branched(audio=0)
    assert dead(astray, astray) == [("warning", "audio_branch")]
    assert dead(astray) == []
    assert dead(branched(), astray) == []
    assert dead(*[branched(audio=0, labels=0)] * 2) == []
    assert dead(*[branched(audio=0, labels=None)] * 2) == []
    assert dead(*[branched(audio=0, checks=None)] * 2) == []
    two = (Branches("layers.0", 50, 0), Branches("layers.1", 20, 30))
    assert dead(*[branched(branches=two)] * 2) == []
    assert dead(*[branched(branches=())] * 3) is None
    assert dead(astray, branched(audio=0, labels=0), astray) == [("warning", "audio_branch")]
