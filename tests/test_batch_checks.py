"""The checks of a batch, observers and assembly together: hand-made micro-batches, merged over micro-batches and ranks."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import costs
from probe.assemble.checks import checks
from probe.assemble.draft import Draft, RunContext
from probe.assemble.text import Decoder
from probe.capture.buffer import StepBuffer
from probe.capture.microbatch import MicroBatch
from probe.capture.observer import Call
from probe.capture.observers.audio_checks import AudioChecker
from probe.capture.observers.batch_checks import BatchChecker
from probe.measure.audio_checks import LogMelScale, first_bin_above
from probe.merge.layout import make_layout
from probe.merge.packing import Transfer, pack
from probe.records import AudioChecks, BatchChecks, LabelChecks, Site
from probe.sites.discovery import SiteMap
from probe.sites.facts import ModelFacts
from probe.sites.tokenizers import TokenizerFacts
from waiting import NoWaiting

pytestmark = pytest.mark.pure  # of torch and probe alone: the same with every transformers

ROOT, ENCODER = Site("", "model", "the root"), Site("tower", "audio_encoder", "by hand")
PROJECTOR = Site("projector", "projector", "by hand")
TEXT_HEAD, AUDIO_HEAD = (
    Site("head", "lm_head", "by hand", modality="text"),
    Site("speech", "lm_head", "by hand", modality="audio", codebooks=2),
)
BINS = 16
FACTS = ModelFacts("Speaks", "qwen2_audio", False, 100, 0, (("audio_token_id", 50),), (50,), 1, padding_token=0, ends_with_padding=False)
CODEC = replace(FACTS, model_type="higgs", codebooks=2)
Batch = Mapping[str, Any]
SCALE = LogMelScale(2.2, first_bin_above(BINS))


class Tower(nn.Module):
    """Has a Whisper's front end."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2, self.layers = nn.Conv1d(BINS, 4, 3), nn.Conv1d(4, 4, 3), nn.ModuleList()


class Bench:
    """Both checkers on a model of these facts and sites; a list of batches is one step."""

    def __init__(
        self,
        facts: ModelFacts = FACTS,
        sites: tuple[Site, ...] = (ENCODER, PROJECTOR, TEXT_HEAD),
        tokenizer: TokenizerFacts | None = None,
        scale: LogMelScale | None = SCALE,
    ) -> None:
        self.modules = {"": nn.Identity(), "tower": Tower(), "projector": nn.Identity()}
        self.observers = [BatchChecker(sites, facts, tokenizer), AudioChecker(sites, facts, self.modules, scale)]
        self.layout = make_layout([cell for observer in self.observers for cell in observer.cells()])
        self.run = RunContext(SiteMap(sites, {}), facts, (), 1, Decoder((), print), tokenizer=tokenizer, log_mel_scale=scale)

    def see(self, batches: list[Batch], *, frames: tuple[int, ...] = ()) -> StepBuffer:
        """Show the batches as micro-batches of one step; each calls the projector once, which gives tensors of shape ``frames``."""
        buffer = StepBuffer(budget_bytes=1 << 20, cells=self.layout.cells)
        buffer.open(1)
        for index, batch in enumerate(batches):
            micro = MicroBatch(index, kwargs=batch)
            root = Call(ROOT, self.modules[""], micro, (), batch)
            for observer in self.observers:
                observer.enter(root, buffer)
            if frames:
                call = Call(PROJECTOR, self.modules["projector"], micro, (), {}, output=torch.zeros(*frames, 8))
                for observer in self.observers:
                    if "projector" in observer.sites():
                        observer.enter(call, buffer)
                        observer.leave(call, buffer)
            for observer in self.observers:
                observer.leave(root, buffer)
        return buffer

    def checks(self, *steps: StepBuffer) -> BatchChecks:
        """Return the checks of a step; several buffers are those of as many ranks, and this rank is the first."""
        packed = [pack(step.totals, self.layout, device=torch.device("cpu")) for step in steps]
        sums, maxima = torch.stack([part[0] for part in packed]).sum(0), torch.stack([part[1] for part in packed]).amax(0)
        self.draft = Draft(Transfer(steps[0].totals, self.layout, sums, maxima).result(), self.run)
        found = checks(self.draft)
        assert found is not None
        return found

    def of(self, *batches: Batch, **arguments: Any) -> BatchChecks:
        return self.checks(self.see(list(batches), **arguments))

    def labels(self, *batches: Batch) -> LabelChecks:
        found = self.of(*batches).labels
        assert found is not None
        return found

    def audio(self, *batches: Batch, **arguments: Any) -> AudioChecks:
        found = self.of(*batches, **arguments).audio
        assert found is not None
        return found


def random(*shape: int, low: int = 1, high: int = 50, seed: int = 0) -> Tensor:
    return torch.randint(low, high, shape, generator=torch.Generator().manual_seed(seed))


def text(rows: int = 4, width: int = 12, seed: int = 0) -> dict[str, Tensor]:
    ids = random(rows, width, seed=seed)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.clone()}


def clips(count: int, frames: int = 40, seed: int = 0) -> Tensor:
    return torch.randn(count, BINS, frames, generator=torch.Generator().manual_seed(seed)).mul(0.4).clamp(-0.5, 1.4)


def test_rows_that_equal_another_are_counted_in_every_micro_batch() -> None:
    """Two and three equal rows of two micro-batches make five; a row that differs in one input only is none of them."""
    first, second = text(seed=1), text(5, seed=2)
    for value in first.values():
        value[2] = value[0]
    for value in second.values():
        value[1] = value[4] = value[0]
    assert Bench().of(first, second).duplicated_rows == 5
    first["labels"][2, 0] = 7
    assert Bench().of(first, second).duplicated_rows == 3
    assert Bench().of(text(1)).duplicated_rows == 0
    assert Bench().of(first, second).rows == 9


def test_equal_texts_about_different_audio_are_no_duplicates() -> None:
    """Whether clips lie one a row or not, rows with the same text are duplicates only if there are as many equal clips."""
    batch = text()
    for value in batch.values():
        value[1] = value[0]
    a_row = {**batch, "input_features": clips(4)}
    found = Bench().of(a_row)
    assert (found.duplicated_rows, found.audio and found.audio.duplicated) == (0, 0)
    more = {**batch, "input_features": clips(6)}
    assert Bench().of(more).duplicated_rows == 0
    more["input_features"][3] = more["input_features"][5]
    assert Bench().of(more).duplicated_rows == 2
    a_row["input_features"][1] = a_row["input_features"][0]
    found = Bench().of(a_row)
    assert (found.duplicated_rows, found.audio and found.audio.duplicated) == (2, 2)


def test_joined_codes_without_clips_say_nothing_of_rows() -> None:
    """Where all audio comes as codes that are not laid out by row, equal texts are not called duplicates; segment starts are no content."""
    batch = text()
    for value in batch.values():
        value[1] = value[0]
    assert Bench(CODEC).of({**batch, "audio_in_ids": random(2, 30)}).duplicated_rows == 0
    assert Bench(CODEC).of({**batch, "audio_in_ids_start": torch.arange(4)}).duplicated_rows == 2


def test_the_fingerprint_is_of_the_first_micro_batch_on_this_rank() -> None:
    """Equal batches have equal fingerprints, in whatever order their rows are; any change of any input gives another."""
    bench, one = Bench(), {**text(), "input_features": clips(6)}
    base = bench.of(one).fingerprint
    assert base is not None
    assert 0 <= base < 2**53
    assert bench.of(one, text(seed=3)).fingerprint == base
    assert bench.checks(bench.see([one]), bench.see([text(seed=4)])).fingerprint == base
    order = torch.tensor([2, 0, 3, 1])
    assert bench.of({name: value[order] if len(value) == 4 else value for name, value in one.items()}).fingerprint == base
    others = [text(seed=3), {**one, "labels": one["input_ids"] + 1}, {**one, "input_features": -one["input_features"]}]
    others.append({**one, "input_features": one["input_features"].transpose(1, 2)})
    assert len({bench.of(other).fingerprint for other in others} | {base}) == 5


def test_ids_against_the_tokenizer() -> None:
    """Ids from the tokenizer's size to the embedding's, and ids that were added, are counted; without a tokenizer nothing is known."""
    batch = {"input_ids": torch.tensor([[1, 79, 80, 99, 100], [5, 61, 62, 64, 3]])}
    found = Bench(tokenizer=TokenizerFacts(80, (61, 62, 64))).of(batch, batch)
    assert (found.ids_outside_tokenizer, found.added_ids) == (4, 6)
    assert Bench(tokenizer=TokenizerFacts(80)).of(batch).added_ids is None
    found = Bench().of(batch)
    assert (found.ids_outside_tokenizer, found.added_ids) == (None, None)
    whisper = replace(FACTS, encoder_decoder=True)
    found = Bench(whisper, tokenizer=TokenizerFacts(80, (61,))).of({"labels": torch.tensor([[61, 85, -100]]), "input_features": clips(1)})
    assert (found.ids_outside_tokenizer, found.added_ids) == (1, 1)


def test_labels_of_a_decoder() -> None:
    """Where labels lie is counted over all micro-batches and ranks; what cannot be known is None."""
    ids = torch.tensor([[9, 8, 50, 7, 6, 0], [5, 4, 3, 2, 0, 0]])
    mask = (ids != 0).long()
    labels = torch.tensor([[-100, -100, 50, 7, 6, 0], [-100, 4, 3, 120, 0, 0]])
    batch = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    facts = replace(FACTS, model_type="llama")
    bench = Bench(facts)
    once = bench.labels(batch)
    assert once == LabelChecks(9, 3, 1, 1, 1, 9, 8, 1, 1, 0)
    twice = bench.checks(bench.see([batch]), bench.see([batch])).labels
    assert twice == LabelChecks(18, 6, 2, 2, 2, 18, 16, 2, 2, 0)
    bare = Bench(replace(facts, audio_placeholders=(), padding_token=None, vocabulary=None)).labels({"labels": labels})
    assert bare == LabelChecks(9, common_prefix=0)


def test_labels_that_a_model_leaves_out_are_none() -> None:
    """Qwen2-Audio's loss leaves out labels under padding: they are not among the labelled."""
    batch = text()
    batch["attention_mask"][:, 8:] = 0
    assert Bench().labels(batch) == LabelChecks(32, 0, 0, 0, 0, 32, 32, *_neighbours(batch["labels"][:, :8]), 0)
    assert Bench(replace(FACTS, model_type="llama")).labels(batch).on_padding == 16


def _neighbours(ids: Tensor) -> tuple[int, int]:
    equal = int((ids[:, 1:] == ids[:, :-1]).sum())
    return equal, equal


@pytest.mark.parametrize("by", [-1, 0, 1])
def test_labels_that_were_shifted_equal_another_id(by: int) -> None:
    """Labels shifted by the collator equal the next or the previous id, and not the same one."""
    ids = torch.arange(1, 49).view(4, 12)
    labels = torch.roll(ids, -by, 1)
    found = Bench().labels({"input_ids": ids, "labels": labels})
    assert (found.same, found.next, found.previous) == tuple(48 if by == 0 and way == 0 else 44 if by == way else 0 for way in (0, 1, -1))


def test_labels_of_an_encoder_decoder_are_held_against_the_decoders_ids() -> None:
    """The meant id is the next one of ``decoder_input_ids``; without these nothing is compared; the encoder's mask is not the labels'."""
    labels = random(3, 8, seed=5)
    given = {"decoder_input_ids": torch.cat([torch.full((3, 1), 60), labels[:, :-1]], 1), "labels": labels, "input_features": clips(3)}
    bench = Bench(replace(FACTS, encoder_decoder=True))
    found = bench.labels(given)
    assert (found.compared, found.next, found.on_placeholders) == (24, 21, None)
    found = bench.labels({"labels": labels, "input_ids": labels, "attention_mask": torch.zeros(3, 8)})
    assert (found.compared, found.on_padding) == (0, None)


def test_labels_shifted_beforehand_are_not_compared() -> None:
    """Labels that come shifted by the model's own convention lie over no id of theirs."""
    found = Bench().labels({"input_ids": random(2, 9), "shift_labels": random(2, 9)})
    assert (found.labelled, found.compared) == (18, 0)


def test_labels_at_placeholders_of_predicted_audio_may_be_learnt() -> None:
    """Of a model that predicts audio, only placeholders of given audio count, and only where the config tells them apart."""
    ids = torch.tensor([[1, 50, 51, 2]])
    batch = {"input_ids": ids, "labels": ids}
    speaks = (TEXT_HEAD, AUDIO_HEAD)
    apart = replace(CODEC, audio_tokens=(("audio_in_token_idx", 50), ("audio_out_token_idx", 51)), audio_placeholders=(50, 51))
    assert Bench(apart, speaks).labels(batch).on_placeholders == 1
    assert Bench(replace(CODEC, audio_placeholders=(50, 51)), speaks).labels(batch).on_placeholders is None
    assert Bench(replace(FACTS, audio_placeholders=(50, 51))).labels(batch).on_placeholders == 2


def test_the_longest_common_prefix_of_any_micro_batch_counts() -> None:
    """Of several micro-batches and ranks the longest opening counts; batches that say nothing do not."""
    alike, unlike, equal = (random(3, 9, seed=seed) for seed in (1, 2, 3))
    alike[:, :5], unlike[:, 0], equal[:] = alike[0, :5], torch.arange(3), equal[0].clone()
    alike[:, 5] = torch.arange(3)
    bench = Bench()
    assert bench.labels({"labels": unlike}, {"labels": alike}, {"labels": equal}).common_prefix == 5
    assert bench.labels({"labels": equal}).common_prefix is None
    merged = bench.checks(bench.see([{"labels": equal}]), bench.see([{"labels": alike}])).labels
    assert merged is not None
    assert merged.common_prefix == 5


def test_audio_labels_are_counted_over_real_frames() -> None:
    """All codebooks of all frames that the mask leaves are counted; joined labels have no mask; without any there is no number."""
    labels = random(2, 5, 2)
    labels[0, :2, 1] = -100
    mask = torch.tensor([[1, 1, 1, 1, 0], [1, 1, 0, 0, 0]]).bool()
    batch = {
        "input_ids": torch.zeros(2, 9, dtype=torch.long),
        "audio_input_ids": labels,
        "audio_labels": labels,
        "audio_input_ids_mask": mask,
    }
    bench = Bench(CODEC, (TEXT_HEAD, AUDIO_HEAD))
    assert bench.of(batch).audio_labels == 2 * 6 - 2
    assert bench.of({"label_audio_ids": torch.tensor([[1, -100, 2], [-100, -100, 3]])}).audio_labels == 3
    assert bench.of(text()).audio_labels is None
    assert Bench().of(batch).audio_labels is None
    only_audio = Bench(CODEC, (AUDIO_HEAD,)).of({"input_ids": random(2, 4), "labels": random(2, 4, 2)})
    assert (only_audio.audio_labels, only_audio.labels) == (16, None)
    one_codebook = Bench(replace(CODEC, codebooks=1), (AUDIO_HEAD,)).of({"input_ids": random(2, 4), "labels": random(2, 4)})
    assert (one_codebook.audio_labels, one_codebook.labels) == (8, None)


def test_clips_of_all_micro_batches_and_ranks() -> None:
    """Counts of clips add up, extremes are of all, and a batch without clips is named by their number."""
    bench, broken = Bench(), clips(3, seed=1)
    broken[0, 0, 0], broken[1], broken[2, 0, 0] = torch.nan, 0.5, 3.5
    found = bench.checks(
        bench.see([{"input_features": clips(2)}, {"input_features": broken}]), bench.see([{"input_features": broken}])
    ).audio
    assert found is not None
    assert (found.kind, found.clips, found.nonfinite, found.constant, found.off_scale) == ("log-mel", 8, 2, 2, 2)
    assert (found.minimum, found.maximum, found.mel_bins, found.clipped) == (-0.5, 3.5, BINS, None)
    empty = bench.audio({"input_ids": random(2, 4), "input_features": torch.zeros(0, BINS, 40)})
    assert (empty.clips, empty.minimum, empty.maximum) == (0, None, None)
    assert bench.of(text()).audio is None


def test_a_scale_that_is_not_known_is_said() -> None:
    """Without knowing the extractor scale and band are None, and the reason is given."""
    bench = Bench(scale=None)
    found = bench.audio({"input_features": 50 * clips(2)})
    assert (found.off_scale, found.band_limited, found.constant) == (None, None, 0)
    assert "inputs/audio_scale" in bench.draft.reasons


def test_waveforms_and_features_of_unknown_layout() -> None:
    """``input_values`` of two dimensions (three with channels) are waveforms; other two-dimensional features are not judged."""
    wave = torch.randn(3, 500, generator=torch.Generator().manual_seed(1)).clamp(-1, 1)
    for batch in ({"input_values": wave}, {"input_values": wave.view(3, 2, 250)}):
        found = Bench().audio(batch)
        assert (found.kind, found.clips, found.clipped, found.off_scale, found.mel_bins) == ("waveform", 3, 3, None, None)
    assert Bench().of({"input_features": wave}).audio is None
    assert Bench().audio({"input_values": torch.randn(2, 40, BINS)}).kind == "log-mel"


def test_placeholders_against_frames() -> None:
    """Placeholders, all frames that the projector gave, and those that the mask leaves by the model's own rule, over all micro-batches."""
    ids = torch.full((2, 20), 50)
    ids[:, 15:] = 3
    mask = torch.tensor([[1] * 31 + [0] * 9, [1] * 40])
    batch = {"input_ids": ids, "input_features": clips(2), "feature_attention_mask": mask}
    valid = sum(((length - 1) // 2 + 1 - 2) // 2 + 1 for length in (31, 40))
    found = Bench().audio(batch, batch, frames=(2, 10))
    assert (found.placeholders, found.frames, found.valid_frames) == (60, 40, 2 * valid)
    found = Bench(replace(FACTS, model_type="voxtral")).audio(batch, frames=(20,))
    assert (found.placeholders, found.frames, found.valid_frames) == (30, 20, 20)
    assert Bench(replace(FACTS, model_type="other")).audio(batch, frames=(2, 10)).valid_frames is None
    del batch["feature_attention_mask"]
    assert Bench().audio(batch, frames=(2, 10)).valid_frames is None


def test_one_placeholder_a_clip_says_nothing_of_frames() -> None:
    """Older models ask with one placeholder for room that they make themselves."""
    ids = torch.tensor([[1, 50, 2], [1, 50, 3]])
    batch = {"input_ids": ids, "input_features": clips(2), "feature_attention_mask": torch.ones(2, 40)}
    found = Bench().audio(batch, frames=(2, 10))
    assert (found.placeholders, found.frames, found.valid_frames) == (2, 20, None)


def test_placeholders_without_an_encoder_are_not_counted() -> None:
    """Codec models and encoder-decoders fill no placeholder with frames; of two projectors nobody knows which does."""
    batch = {"input_ids": torch.full((2, 5), 50), "input_features": clips(2)}
    two = (ENCODER, PROJECTOR, replace(PROJECTOR, name="another"))
    for bench in (Bench(sites=(TEXT_HEAD,)), Bench(replace(FACTS, encoder_decoder=True)), Bench(sites=two)):
        found = bench.audio(batch, frames=(2, 10))
        assert (found.placeholders, found.frames, found.valid_frames) == (None, None, None)
    assert Bench().audio(batch, frames=(2, 10)).placeholders == 10


def _rows(same: bool) -> tuple[ModelFacts, Batch]:
    """Two samples, codes side by side: reference of 6 and target of 8 frames; then two targets without a reference, of 7 frames."""
    codes = random(2, 14, 2, high=30, seed=8)
    if same:
        codes[0, 6:12] = codes[0, :6]
    labels = codes.clone()
    labels[0, :6] = -100
    mask = torch.ones(2, 14, dtype=torch.bool)
    mask[1, 7:] = False
    labels[1, 7:] = -100
    ids = torch.tensor([[1, *[50] * 6, 2, *[50] * 8], [1, 2, *[50] * 7, *[3] * 7]])
    return CODEC, {"input_ids": ids, "audio_input_ids": codes, "audio_labels": labels, "audio_input_ids_mask": mask}


def _joined(same: bool) -> tuple[ModelFacts, Batch]:
    """Three samples: reference among the given codes, no audio, and a reference among the predicted codes, masked in the labels."""
    given, out = random(2, 5, high=30, seed=8), random(2, 18, high=30, seed=9)
    if same:
        out[:, :5], out[:, 12:18] = given, out[:, 6:12]
    labels = out.clone()
    labels[:, 6:12] = -100
    ids = torch.tensor([[1, 60, 2, 61], [1, 2, 3, 4], [1, 61, 2, 61]])
    facts = replace(CODEC, audio_tokens=(("audio_in_token_idx", 60), ("audio_out_token_idx", 61)), audio_placeholders=(60, 61))
    starts = {"audio_in_ids_start": torch.tensor([0]), "audio_out_ids_start": torch.tensor([0, 6, 12])}
    return facts, {"input_ids": ids, "audio_in_ids": given, "audio_out_ids": out, "label_audio_ids": labels, **starts}


@pytest.mark.parametrize(("make", "compared"), [(_rows, 1), (_joined, 2)])
def test_reference_codes_against_target_codes(make: Callable[[bool], tuple[ModelFacts, Batch]], compared: int) -> None:
    """In both layouts of codes, a reference that is the target is a match, another voice's is not, and others are not compared."""
    for same in (False, True):
        facts, batch = make(same)
        found = Bench(facts, (TEXT_HEAD, AUDIO_HEAD)).of(batch, batch)
        assert (found.reference_compared, found.reference_matches) == (2 * compared, 2 * compared * same)
    assert Bench(facts, (TEXT_HEAD,)).of(text()).reference_compared is None


@pytest.mark.parametrize("target_first", [False, True])
def test_frames_without_a_placeholder_belong_to_nothing(target_first: bool) -> None:
    """Frames beyond the placeholders, and beyond the tokens, leave the segments as they are."""
    half, more = random(1, 5, 2, high=30, seed=3), random(1, 9, 2, high=30, seed=4)
    codes = torch.cat([half, half, more], 1)
    labels = codes.clone()
    labels[:, slice(5, 10) if target_first else slice(0, 5)] = -100
    batch = {"input_ids": torch.tensor([[*[50] * 5, 2, *[50] * 5, 3]]), "audio_input_ids": codes, "audio_labels": labels}
    found = Bench(CODEC, (TEXT_HEAD, AUDIO_HEAD)).of(batch)
    assert (found.reference_compared, found.reference_matches) == (1, 1)


def _changed(name: str, value: Tensor) -> tuple[ModelFacts, Batch]:
    facts, batch = (_joined if name in ("label_audio_ids", "audio_in_ids", "audio_out_ids_start") else _rows)(True)
    return facts, {**batch, name: value}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("audio_input_ids_mask", torch.ones(2, 9, dtype=torch.bool)),
        ("audio_labels", torch.ones(2, 9, 2, dtype=torch.long)),
        ("audio_labels", None),
        ("input_ids", torch.full((3, 20), 50)),
        ("input_ids", None),
        ("label_audio_ids", torch.ones(2, 9, dtype=torch.long)),
        ("audio_in_ids", torch.ones(3, 5, dtype=torch.long)),
        ("audio_out_ids_start", None),
    ],
)
def test_codes_that_do_not_fit_are_not_compared(name: str, value: Tensor) -> None:
    """Where labels, mask, ids or codes are of other shapes, or missing, nothing is compared, and nothing fails."""
    facts, batch = _changed(name, value)
    assert Bench(facts, (TEXT_HEAD, AUDIO_HEAD)).of(batch).reference_compared is None


def test_more_segments_than_placeholders() -> None:
    """Segments of codes for which no placeholder stands in the ids belong to no sample."""
    facts, batch = _joined(True)
    batch = {**batch, "input_ids": torch.tensor([[1, 60, 2, 61], [1, 2, 3, 4], [1, 61, 2, 5]])}
    found = Bench(facts, (TEXT_HEAD, AUDIO_HEAD)).of(batch)
    assert (found.reference_compared, found.reference_matches) == (1, 1)


def test_a_model_that_predicts_no_audio_has_no_reference() -> None:
    """All audio of such a model is input, whatever is called a label of audio."""
    _, batch = _rows(True)
    assert Bench(FACTS, (TEXT_HEAD,)).of(batch).reference_compared is None


def test_inputs_that_only_training_step_saw_are_checked_too() -> None:
    """Labels that label smoothing took out of the forward's arguments are found in the batch."""
    bench = Bench()
    buffer = StepBuffer(budget_bytes=1 << 20, cells=bench.layout.cells)
    batch = text()
    labels = batch.pop("labels")
    micro = MicroBatch(0, batch={"labels": labels}, kwargs=batch)
    for observer in bench.observers:
        observer.enter(Call(ROOT, bench.modules[""], micro, (), batch), buffer)
    found = bench.checks(buffer).labels
    assert found is not None
    assert found.same == 48


def test_nothing_waits_and_little_is_done() -> None:
    """No check reads a tensor, indexes by a mask or asks for a size that only the device knows; the cost is a few hundred operations."""
    batch = {**text(), "input_features": clips(4), "feature_attention_mask": torch.ones(4, 40)}
    _, codes = _rows(True)
    text_bench, code_bench = Bench(tokenizer=TokenizerFacts(80, (61,))), Bench(CODEC, (TEXT_HEAD, AUDIO_HEAD))
    with NoWaiting():
        text_bench.see([batch], frames=(4, 10))
        code_bench.see([codes])
    assert costs.kernels(lambda: text_bench.see([batch], frames=(4, 10))) < 260
    assert costs.kernels(lambda: code_bench.see([codes])) < 260
