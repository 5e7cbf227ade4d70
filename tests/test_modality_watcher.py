from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import models
import probe.observation
from modality_by_hand import by_hand, rows_of
from models import original_training, qwen2_audio
from models.case import Case
from models.running import VARIANTS, assert_identical, run
from probe.capture.buffer import StepBuffer
from probe.capture.microbatch import MicroBatch
from probe.capture.observer import Call, Watcher
from probe.capture.observers.modality import MASSES, TO_REFERENCE, ModalityWatcher, late_modality, modalities
from probe.capture.totals import Totals
from probe.measure.rows import choose_rows
from probe.records import Site, StepRecord
from probe.sites.discovery import Discovery, discover
from probe.sites.facts import ModelFacts
from probe.sites.modality import AUDIO, PADDING, REFERENCE, TEXT, UNKNOWN
from waiting import NoWaiting
from watching import observed_run

CASES = {case.name: case for case in models.available_cases()}


@dataclass
class Asked:
    """What was answered in one micro-batch: by site, at its call and when the root returned, and why there may be no reference."""

    batch: dict[str, Any]
    totals: Totals
    early: dict[str, tuple[Tensor | None, Tensor | None]] = field(default_factory=dict)
    late: dict[str, Tensor | None] = field(default_factory=dict)


class Asker(Watcher):
    """Asks at every attention layer and at the root's return, as the observer of attention does."""

    name = "asker"

    def __init__(self, sites: Sequence[Site]) -> None:
        self.attention = [site for site in sites if site.role == "attention"]
        self.asked: list[Asked] = []

    def sites(self) -> Sequence[str]:
        return ("", *(site.name for site in self.attention))

    def enter(self, call: Call, buffer: StepBuffer) -> None:
        if call.site.name == "":
            self.asked.append(Asked(dict(call.micro.inputs), buffer.totals))
            return
        hidden = call.args[0] if call.args else call.kwargs["hidden_states"]
        keys = call.kwargs.get("key_value_states")
        keys = hidden if keys is None else keys
        self.asked[-1].early[call.site.name] = modalities(call, (hidden.shape[0], 4, hidden.shape[1], keys.shape[1]))

    def leave(self, call: Call, buffer: StepBuffer) -> None:
        if call.site.name == "":
            self.asked[-1].late = {site.name: late_modality(call.micro, site) for site in self.attention}


def ask(case: Case, monkeypatch: pytest.MonkeyPatch, **arguments: Any) -> tuple[list[Asked], tuple[StepRecord, ...], Discovery]:
    """Train a case for two steps of three samples with an asker behind the other observers."""
    made: list[Asker] = []
    observers = probe.observation.all_observers

    def with_asker(model: nn.Module, found: Discovery, *rest: Any, **named: Any) -> list[Any]:
        made.append(Asker(found.sites.sites))
        return [*observers(model, found, *rest, **named), made[-1]]

    monkeypatch.setattr(probe.observation, "all_observers", with_asker)
    result, records = observed_run(case, max_steps=2, samples=6, per_device_train_batch_size=3, **arguments)
    return made[-1].asked, records, discover(result.model)


EARLY = [name for name in ("higgs_audio_v2", "voxtral", *(() if qwen2_audio.EXPANDS else ("qwen2_audio",))) if name in CASES]


@pytest.mark.parametrize("variant", ["plain", "checkpointing", "accumulation"])
@pytest.mark.parametrize("name", EARLY)
def test_tokens_as_the_samples_were_made(name: str, variant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In real training every joint layer is told, before it runs, what the construction of the samples says of each position."""
    asked, _, _ = ask(CASES[name], monkeypatch, **VARIANTS[variant])
    assert len(asked) == 2 * VARIANTS[variant].get("gradient_accumulation_steps", 1)
    for each in asked:
        expected = by_hand(CASES[name], each.batch)
        assert int((expected >= AUDIO).sum()) > 10
        for site in CASES[name].attention["joint"]:
            query, key = each.early[site]
            assert query is not None
            assert key is not None
            assert torch.equal(query.cpu(), expected)
            assert torch.equal(key.cpu(), expected)


@pytest.mark.parametrize("variant", ["plain", "checkpointing", "accumulation"])
def test_tokens_that_the_original_expands(variant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is claimed while the layers run, whose mask leaves the clips out; the root's output then tells every position."""
    asked, _, found = ask(CASES["original"], monkeypatch, **VARIANTS[variant])
    assert found.mask_takers == ("model.layers.0", "model.layers.1")
    kinds: set[int] = set()
    for each in asked:
        expected = by_hand(CASES["original"], each.batch)
        kinds |= set(expected.unique().tolist())
        for site in CASES["original"].attention["joint"]:
            assert each.early[site] == (None, None)
            late = each.late[site]
            assert late is not None
            assert torch.equal(late.cpu(), expected)
        for site in CASES["original"].attention["encoder"]:
            assert each.late[site] is None
    assert kinds == {PADDING, TEXT, AUDIO, REFERENCE}


def test_the_original_without_any_audio(monkeypatch: pytest.MonkeyPatch) -> None:
    """Zero clips, zero codes and zero labels: all is text, and no part of the probe trips."""
    case = replace(CASES["original"], dataset=original_training.text_dataset)
    asked, _, _ = ask(case, monkeypatch)
    for each in asked:
        late = each.late[case.attention["joint"][0]]
        assert late is not None
        assert torch.equal(late.cpu(), each.batch["attention_mask"].to(torch.int8) * TEXT)


def test_frames_and_tokens_of_whisper(monkeypatch: pytest.MonkeyPatch) -> None:
    """The encoder's frames and the keys of cross-attention sound where the clips do; the decoder's tokens are text up to their end."""
    case = CASES["whisper"]
    asked, _, _ = ask(case, monkeypatch)
    for each in asked:
        labels = each.batch["labels"]
        text = rows_of([[TEXT] * int((row != -100).sum()) for row in labels])
        for site in case.attention["decoder"]:
            query, key = each.early[site]
            assert query is not None
            assert key is not None
            assert torch.equal(query.cpu(), text)
            assert torch.equal(key.cpu(), text)
        for site in case.attention["cross"]:
            query, key = each.early[site]
            assert query is not None
            assert key is not None
            assert torch.equal(query.cpu(), text)
            assert key.unique().tolist() == [PADDING, AUDIO]
            assert bool((key[:, 1:] <= key[:, :-1]).all())
            for encoder in (each.early[name][0] for name in case.attention["encoder"] if name in each.early):
                assert encoder is not None
                assert torch.equal(encoder, key)
        assert all(late is None for late in each.late.values())


class Renaming(nn.Module):
    """A root whose inputs have names of its own, round a model whose layers are told which token is audio."""

    def __init__(self, model: nn.Module, checkpointing: dict[str, Any] | None = None) -> None:
        super().__init__()
        self.model: Any = model
        if checkpointing is not None:
            self.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=checkpointing)

    def forward(self, words: Tensor, kept: Tensor, codes: Tensor, targets: Tensor, **others: Tensor) -> Any:
        """Pass everything on under the names that the model knows."""
        return self.model(input_ids=words, attention_mask=kept, audio_input_ids=codes, labels=targets, **others)


NEW_NAMES = {"input_ids": "words", "attention_mask": "kept", "audio_input_ids": "codes", "labels": "targets"}


def renamed(case: Case, checkpointing: dict[str, Any] | None = None) -> Case:
    """Return a case behind such a root; checkpointing is switched on in the model inside."""

    def collate(samples: Sequence[Any]) -> dict[str, Tensor]:
        return {NEW_NAMES.get(name, name): value for name, value in case.collate(samples).items()}

    return replace(case, build=lambda seed: Renaming(case.build(seed), checkpointing), collate=collate)


@pytest.mark.skipif("higgs_audio_v2" not in CASES, reason="transformers has no Higgs Audio v2")
@pytest.mark.parametrize("variant", ["plain", "checkpointing", "checkpointing_reentrant"])
def test_tokens_that_only_the_layers_are_told(variant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the root's inputs tell nothing, the layers' mask does before the attention runs; what is watched for it is no site."""
    case = CASES["higgs_audio_v2"]
    asked, records, found = ask(renamed(case, VARIANTS[variant].get("gradient_checkpointing_kwargs")), monkeypatch)
    layers = {"model.model.layers.0", "model.model.layers.1"}
    assert set(found.mask_takers) == layers
    assert layers <= set(found.watched)
    assert not layers & {site.name for site in found.sites.sites}
    assert not layers & {row.site for record in records for row in record.statistics}
    for each in asked:
        expected = by_hand(case, {**each.batch, "input_ids": each.batch["words"], "attention_mask": each.batch["kept"]})
        assert int((expected == REFERENCE).sum()) > 5
        for name in case.attention["joint"]:
            query, key = each.early[f"model.{name}"]
            assert query is not None
            assert query is key
            assert torch.equal(query.cpu(), expected)


@pytest.mark.skipif("higgs_audio_v2" not in CASES, reason="transformers has no Higgs Audio v2")
def test_training_is_the_same_with_layers_watched() -> None:
    """Bit for bit, with and without."""
    case = renamed(CASES["higgs_audio_v2"])
    bare = run(case, max_steps=3)
    seen, _ = observed_run(case, max_steps=3)
    assert_identical(bare, seen)


REASONS = {
    "whisper": "the decoder reads the audio through cross-attention",
    "voxtral": "the model predicts no audio: all its audio is input, see text_to_audio",
    "qwen2_audio": "the model predicts no audio: all its audio is input, see text_to_audio",
    "higgs_audio_v2": "no run of audio in this step is without labels",
    "original": "no run of audio in this step is without labels",
    "llama": None,
}


@pytest.mark.parametrize("name", CASES)
def test_why_there_is_no_reference(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The reason that stands ready, should no mass on reference audio come out."""
    asked, _, _ = ask(CASES[name], monkeypatch)
    assert [each.totals.reasons.get(TO_REFERENCE[0]) for each in asked] == [REASONS[name]] * 2


FACTS = ModelFacts("Any", "any", False, 32, 2, (("audio_token_id", 7),), (7,), 1)
JOINT = Site("layer", "attention", "test", kind="joint")


def entered(
    facts: ModelFacts = FACTS, sites: Sequence[Site] = (JOINT,), **inputs: Tensor
) -> tuple[MicroBatch, StepBuffer, ModalityWatcher]:
    """Return what is there when a watcher has seen the root begin with these inputs."""
    micro, buffer, watcher = MicroBatch(0, {}, inputs), StepBuffer(budget_bytes=1 << 20), ModalityWatcher(sites, facts)
    watcher.enter(call_of("", micro), buffer)
    return micro, buffer, watcher


def call_of(name: str, micro: MicroBatch, site: Site | None = None, **kwargs: Any) -> Call:
    return Call(site or Site(name, "model" if name == "" else "custom", "test"), nn.Identity(), micro, (), kwargs)


def test_a_speaker_without_labels_of_audio() -> None:
    """Everything stays audio, and the reason says that nothing tells the two apart; text labels are no labels of audio."""
    ids = torch.tensor([[1, 7, 7, 2, 7]])
    micro, buffer, watcher = entered(input_ids=ids, labels=ids)
    query, _ = modalities(call_of("layer", micro, JOINT), (1, 4, 5, 5))
    assert query is not None
    assert query.tolist() == [[TEXT, AUDIO, AUDIO, TEXT, AUDIO]]
    watcher.leave(call_of("", micro), buffer)
    assert {buffer.totals.reasons[name] for name in TO_REFERENCE} == {"no audio labels among the inputs tell reference from target"}


def why(facts: ModelFacts, sites: Sequence[Site], **inputs: Tensor) -> str | None:
    """Return the reason that stands when a root without output has returned."""
    micro, buffer, watcher = entered(facts, sites, **inputs)
    watcher.leave(call_of("layer", micro, JOINT), buffer)
    assert not buffer.totals.reasons
    watcher.leave(call_of("", micro), buffer)
    return buffer.totals.reasons.get(TO_REFERENCE[0])


def test_reasons_go_by_what_the_model_is() -> None:
    """Given by definition, no label is asked for; cross-attention beside joint attention in a decoder-only model is no reason."""
    given = replace(FACTS, audio_tokens=(("audio_in_token_idx", 7), ("audio_out_token_idx", 8)))
    ids = torch.ones(1, 5, dtype=torch.int64)
    assert why(given, [JOINT], input_ids=ids) == REASONS["original"]
    both = [JOINT, replace(JOINT, name="other", kind="cross")]
    assert why(FACTS, both, input_ids=ids) == "no audio labels among the inputs tell reference from target"
    assert why(FACTS, [replace(JOINT, kind="decoder")], input_ids=ids) is None


def test_no_reason_where_no_token_is_known() -> None:
    """Where nothing told which token is audio, the layers say that; labels are beside the point."""
    embeds = torch.zeros(1, 5, 8)
    assert why(FACTS, [JOINT], inputs_embeds=embeds, audio_labels=torch.zeros(1, 5, 2, dtype=torch.int64)) is None
    assert why(replace(FACTS, codebooks=0), [JOINT], inputs_embeds=embeds) == REASONS["voxtral"]


def test_audio_at_places_that_nobody_names() -> None:
    """Audio stands among the tokens and the config names no token for it: padding is known, no token is called text, and it is said."""
    silent = replace(FACTS, audio_tokens=(), audio_placeholders=())
    given = {"input_ids": torch.tensor([[4, 5, 6, 0], [4, 5, 0, 0]]), "attention_mask": torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0]])}
    micro, buffer, watcher = entered(silent, **given)
    codes, _ = modalities(call_of("layer", micro, JOINT), (2, 4, 4, 4))
    assert codes is not None
    assert codes.tolist() == [[UNKNOWN] * 3 + [PADDING], [UNKNOWN] * 2 + [PADDING] * 2]
    choice = choose_rows(codes, rows=8)
    taken = [sorted(row[weight > 0].tolist()) for row, weight in zip(choice.index_BR, choice.weight_BR)]
    assert taken == [[0, 1, 2], [0, 1]]
    watcher.leave(call_of("", micro), buffer)
    reason = "the config names no audio token, and no mask among the inputs tells which tokens are audio"
    assert {buffer.totals.reasons[name] for name in MASSES} == {reason}
    mask = torch.tensor([[False, True, True, False], [True, False, False, False]])
    expected = [[TEXT, AUDIO, AUDIO, PADDING], [AUDIO, TEXT, PADDING, PADDING]]
    for where in ("root", "layer"):
        micro, buffer, watcher = entered(silent, **given, **({"speech_mask": mask} if where == "root" else {}))
        watcher.enter(call_of("layers.0", micro, **({"speech_mask": mask} if where == "layer" else {})), buffer)
        codes, _ = modalities(call_of("layer", micro, JOINT), (2, 4, 4, 4))
        assert codes is not None
        assert codes.tolist() == expected
        watcher.leave(call_of("", micro), buffer)
        assert set(buffer.totals.reasons) == set(TO_REFERENCE)
    micro, buffer, _ = entered(silent, [replace(JOINT, kind="decoder")], **given)
    codes, _ = modalities(call_of("layer", micro, replace(JOINT, kind="decoder")), (2, 4, 4, 4))
    assert codes is not None
    assert codes.tolist() == [[TEXT] * 3 + [PADDING], [TEXT] * 2 + [PADDING] * 2]


def test_answers_only_for_tokens_of_that_shape() -> None:
    """Another number of tokens or samples (an expanded sequence, beams) is not known; nor is anything once the root has returned."""
    micro, buffer, watcher = entered(input_ids=torch.ones(2, 5, dtype=torch.int64))
    layer = call_of("layer", micro, JOINT)
    assert all(codes is not None for codes in modalities(layer, (2, 4, 5, 5)))
    assert modalities(layer, (2, 4, 6, 6)) == (None, None)
    assert modalities(layer, (4, 4, 5, 5)) == (None, None)
    query, key = modalities(layer, (2, 4, 5, 9))
    assert query is not None
    assert key is None
    watcher.leave(call_of("", micro), buffer)
    assert modalities(layer, (2, 4, 5, 5)) == (None, None)
    assert late_modality(micro, JOINT) is None
    assert not micro.scratch


def test_a_layer_is_asked_only_where_the_root_told_nothing() -> None:
    """The root's inputs win over a layer's mask of as many tokens (that costs nothing), and the first layer wins over later ones."""
    mask = torch.tensor([[True, False, False]])
    micro, buffer, watcher = entered(input_ids=torch.tensor([[1, 7, 1]]))
    with NoWaiting() as watch:
        watcher.enter(call_of("layers.0", micro), buffer)
        watcher.enter(call_of("layers.0", micro, audio_token_mask=mask), buffer)
    assert watch.operators == 0
    known, _ = modalities(call_of("layer", micro, JOINT), (1, 4, 3, 3))
    assert known is not None
    assert known.tolist() == [[TEXT, AUDIO, TEXT]]
    watcher.enter(call_of("layers.0", micro, audio_token_mask=mask.repeat(1, 2)), buffer)
    longer, _ = modalities(call_of("layer", micro, JOINT), (1, 4, 6, 6))
    assert longer is not None
    assert longer.tolist() == [[AUDIO, TEXT, TEXT] * 2]
    micro, buffer, watcher = entered()
    watcher.enter(call_of("layers.0", micro), buffer)
    watcher.enter(call_of("layers.1", micro, audio_token_mask=mask), buffer)
    watcher.enter(call_of("layers.2", micro, audio_token_mask=~mask), buffer)
    known, _ = modalities(call_of("layer", micro, JOINT), (1, 4, 3, 3))
    assert known is not None
    assert known.tolist() == [[AUDIO, TEXT, TEXT]]
    micro.output = object()
    assert late_modality(micro, JOINT) is known
    assert late_modality(micro, replace(JOINT, kind="cross")) is None


def test_without_attention_nothing_is_watched() -> None:
    """A model without attention layers costs no hook; one with them costs those of the root and of the modules that are given masks."""
    assert ModalityWatcher([], FACTS, mask_takers=["layers.0"]).sites() == ()
    assert ModalityWatcher([JOINT], FACTS, mask_takers=["layers.0"]).sites() == ("", "layers.0")
