"""Labels over logits: scored as laid, every model gives its own loss; what does not lie over each other is named."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models import CASES
from models.qwen2_audio import EXPANDS
from probe.capture.microbatch import MicroBatch
from probe.measure.heads import COLUMNS, score
from probe.records import Site
from probe.sites.facts import ModelFacts, read_facts
from probe.sites.labels import NotAligned, align
from probe.sites.laying import Aligned

TEXT = Site("lm_head", "lm_head", "chosen by the test", modality="text")
CAUSAL = ModelFacts(
    "Some", "some", encoder_decoder=False, vocabulary=11, codebooks=3, audio_tokens=(), audio_placeholders=(7, 8), label_shift=1
)
JOINED = replace(CAUSAL, encoder_decoder=True, label_shift=0)


def audio(codebooks: int) -> Site:
    return Site("audio_lm_head", "lm_head", "chosen by the test", modality="audio", codebooks=codebooks)


def mean_loss(found: Aligned | NotAligned) -> float:
    assert isinstance(found, Aligned), found
    assert found.labels.dtype == torch.int64
    assert found.labels.shape == found.logits.shape[:-1]
    sums = dict(zip(COLUMNS, score(found.logits, found.labels).sums.tolist(), strict=True))
    assert sums["labels_outside"] == sums["nonfinite_rows"] == 0
    assert sums["labelled"] > 0
    return sums["cross_entropy"] / sums["labelled"]


def codebook_losses(found: Aligned | NotAligned) -> list[float]:
    assert isinstance(found, Aligned), found
    return [mean_loss(Aligned(found.labels[..., k], found.logits[..., k, :], "")) for k in range(found.labels.shape[-1])]


def aligned(logits: Tensor, site: Site, facts: ModelFacts, kwargs: Mapping[str, Any], output: Any = None) -> Aligned | NotAligned:
    return align(logits, site=site, facts=facts, micro=MicroBatch(index=0, kwargs=kwargs, output=output))


class Run:
    """One training forward of a model of the registry: its inputs, its output, and what each head returned."""

    def __init__(self, case: str, **changed: Any) -> None:
        if not CASES[case].available():
            pytest.skip(f"no {case} in this transformers")
        self.model: nn.Module = CASES[case].build(3).eval()
        self.facts = read_facts(self.model)
        dataset = CASES[case].dataset(3, 5)
        self.inputs = dict(CASES[case].collate([dataset[i] for i in range(3)])) | changed
        self.logits: dict[str, Tensor] = {}
        for name in CASES[case].heads:
            self.model.get_submodule(name).register_forward_hook(lambda module, args, output, name=name: self.logits.update({name: output}))
        with torch.no_grad():
            self.output = self.model(**self.inputs)
        self.loss = self.output.loss.item()

    def align(self, head: str, site: Site, *, returned: bool = False) -> Aligned | NotAligned:
        return aligned(self.logits[head], site, self.facts, self.inputs, self.output if returned else None)


@pytest.mark.parametrize(("case", "how"), [("whisper", "not shifted"), ("llama", "shifted by one"), ("voxtral", "shifted by one")])
def test_the_models_own_loss(case: str, how: str) -> None:
    """Cross-entropy over labels as laid is the model's loss, for an encoder-decoder and for decoders."""
    run = Run(case)
    found = run.align(CASES[case].heads[0], TEXT)
    assert mean_loss(found) == pytest.approx(run.loss, abs=1e-5)
    assert isinstance(found, Aligned)
    assert found.how == how


def test_qwen2_audio() -> None:
    """Qwen2-Audio: its own loss; where it makes room for the frames itself (4.46) that is said, with both shapes."""
    run = Run("qwen2_audio")
    found = run.align(CASES["qwen2_audio"].heads[0], TEXT, returned=True)
    if EXPANDS:
        assert isinstance(found, NotAligned)
        assert not found.later
        assert str(tuple(run.inputs["labels"].shape)) in found.reason
    else:
        assert mean_loss(found) == pytest.approx(run.loss, abs=1e-5)


def test_qwen2_audio_labels_under_padding() -> None:
    """Qwen2-Audio leaves out labels under padding although they are no -100; so do we."""
    if EXPANDS:
        pytest.skip("4.46 makes room for the frames itself")
    plain = Run("qwen2_audio")
    labels = plain.inputs["labels"].masked_fill(plain.inputs["attention_mask"] == 0, 5)
    assert not torch.equal(labels, plain.inputs["labels"])
    run = Run("qwen2_audio", labels=labels)
    assert mean_loss(run.align(CASES["qwen2_audio"].heads[0], TEXT)) == pytest.approx(run.loss, abs=1e-5)


def test_higgs_audio_v2() -> None:
    """Higgs Audio v2: text loss plus the sum of the codebooks' means is the model's loss."""
    run = Run("higgs_audio_v2")
    text, codes = run.align("text_lm_head", TEXT), run.align("audio_lm_head", audio(4))
    assert mean_loss(text) + sum(codebook_losses(codes)) == pytest.approx(run.loss, abs=1e-5)
    assert isinstance(codes, Aligned)
    assert codes.how == "laid over the audio placeholders, shifted by one"


def test_higgs_audio_v2_audio_head_alone() -> None:
    """Without text labels the loss is the sum of the codebooks' means; frames that are not valid lie anywhere."""
    plain = Run("higgs_audio_v2")
    mask, labels = plain.inputs["audio_input_ids_mask"], plain.inputs["audio_labels"]
    assert not mask.all()
    order = torch.arange(mask.shape[1] - 1, -1, -1)  # padding in front, as generation has it
    changed = {"audio_input_ids_mask": mask[:, order], "audio_labels": labels[:, order].masked_fill(~mask[:, order, None], 3)}
    run = Run("higgs_audio_v2", labels=None, audio_input_ids=plain.inputs["audio_input_ids"][:, order], **changed)
    assert sum(codebook_losses(run.align("audio_lm_head", audio(4)))) == pytest.approx(run.loss, abs=1e-5)


def test_the_original_kind() -> None:
    """The original kind: expanded labels when the root returned, and (K, n) audio labels over n audio positions."""
    run = Run("original")
    text_head, audio_head = CASES["original"].heads
    early = run.align(text_head, TEXT)
    assert isinstance(early, NotAligned)
    assert early.later
    text = run.align(text_head, TEXT, returned=True)
    assert isinstance(text, Aligned)
    assert text.how == "expanded_labels, shifted by one"
    assert mean_loss(text) == pytest.approx(run.output.llm_loss.item(), abs=1e-5)
    codes = run.align(audio_head, audio(run.inputs["label_audio_ids"].shape[0]))
    assert isinstance(codes, Aligned)
    assert codes.how == "shifted by one"
    losses = codebook_losses(codes)
    assert sum(losses) / len(losses) == pytest.approx(run.loss - run.output.llm_loss.item(), abs=1e-5)


def test_audio_positions_by_hand() -> None:
    """(n, K*V) and (n, K, V) logits give the same, also with as many positions as codebooks."""
    torch.manual_seed(1)
    for n in (9, 3):
        logits, labels = torch.randn(n, 3 * 11), torch.randint(0, 11, (3, n))
        expected = [F.cross_entropy(logits[:-1, 11 * k : 11 * (k + 1)], labels[k, 1:]).item() for k in range(3)]
        for shape in ((n, 33), (n, 3, 11)):
            found = aligned(logits.view(shape), audio(3), CAUSAL, {"label_audio_ids": labels})
            assert codebook_losses(found) == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("shape", [(1, 9), (9, 1)])
def test_one_codebook(shape: tuple[int, int]) -> None:
    """One codebook: labels with or without a dimension for it lie over (n, V) logits and over (B, S, V) logits."""
    torch.manual_seed(2)
    logits, labels = torch.randn(9, 11), torch.randint(0, 11, (9,))
    expected = F.cross_entropy(logits[:-1], labels[1:]).item()
    found = aligned(logits, audio(1), CAUSAL, {"label_audio_ids": labels.view(shape)})
    assert codebook_losses(found) == pytest.approx([expected], abs=1e-5)
    for batched in ((1, 9), (1, 9, 1)):
        found = aligned(logits[None], audio(1), CAUSAL, {"audio_labels": labels.view(batched)})
        assert codebook_losses(found) == pytest.approx([expected], abs=1e-5)


def test_audio_labels_of_every_position() -> None:
    """(B, S, K) labels over (B, S, K*V) logits need no placeholders."""
    torch.manual_seed(3)
    logits, labels = torch.randn(2, 6, 33), torch.randint(0, 11, (2, 6, 3))
    expected = [F.cross_entropy(logits[:, :-1, 11 * k : 11 * (k + 1)].flatten(0, 1), labels[:, 1:, k].flatten()).item() for k in range(3)]
    assert codebook_losses(aligned(logits, audio(3), CAUSAL, {"audio_labels": labels})) == pytest.approx(expected, abs=1e-5)


def test_placeholders_and_frames_that_do_not_match() -> None:
    """More placeholders than frames, more frames than placeholders, no frame: what is over stays without a label, nothing breaks."""
    ids = torch.tensor([[7, 1, 8, 7], [7, 2, 2, 7]])
    logits, labels = torch.randn(2, 4, 33), torch.arange(9).view(1, 3, 3)
    found = aligned(logits, audio(3), JOINED, {"audio_labels": labels, "input_ids": ids})
    ignored = [-100] * 3
    assert isinstance(found, Aligned)
    assert found.labels.tolist() == [[[0, 1, 2], ignored, [3, 4, 5], [6, 7, 8]], [ignored] * 4]
    mask = torch.tensor([[1, 0, 1]])
    found = aligned(logits, audio(3), JOINED, {"audio_labels": labels, "audio_input_ids_mask": mask, "input_ids": ids})
    assert isinstance(found, Aligned)
    assert found.labels.tolist() == [[[0, 1, 2], ignored, [6, 7, 8], ignored], [ignored] * 4]
    mask = torch.tensor([[1, 0, 1, 0]])
    square = torch.arange(12).view(1, 4, 3)  # as many frames as positions: what the mask says still holds
    found = aligned(logits[:1], audio(3), JOINED, {"audio_labels": square, "audio_input_ids_mask": mask, "input_ids": ids[:1]})
    assert isinstance(found, Aligned)
    assert found.labels.tolist() == [[[0, 1, 2], ignored, [6, 7, 8], ignored]]
    found = aligned(logits, audio(3), JOINED, {"audio_labels": labels, "audio_input_ids_mask": mask, "input_ids": ids})
    assert isinstance(found, NotAligned)
    found = aligned(logits, audio(3), JOINED, {"audio_labels": labels, "input_ids": ids.clamp(max=2)})
    assert isinstance(found, Aligned)
    assert (found.labels == -100).all()
    found = aligned(logits, audio(3), JOINED, {"audio_labels": labels[:, :0], "input_ids": ids})
    assert isinstance(found, Aligned)
    assert (found.labels == -100).all()


def test_as_many_samples_as_codebooks() -> None:
    """A batch of as many samples as there are codebooks is not taken for labels by codebook."""
    torch.manual_seed(7)
    ids, labels = torch.tensor([[7, 7, 1, 1]] * 3), torch.randint(0, 11, (3, 2, 3))
    found = aligned(torch.randn(3, 4, 33), audio(3), JOINED, {"audio_labels": labels, "input_ids": ids})
    assert isinstance(found, Aligned)
    assert torch.equal(found.labels[:, :2], labels)


def test_labels_that_never_reached_the_forward() -> None:
    """Labels that label smoothing popped are found in the batch."""
    run = Run("llama")
    labels = run.inputs.pop("labels")
    found = align(run.logits["lm_head"], site=TEXT, facts=run.facts, micro=MicroBatch(index=0, batch={"labels": labels}, kwargs=run.inputs))
    assert mean_loss(found) == pytest.approx(run.loss, abs=1e-5)


def test_shifted_already() -> None:
    """``shift_labels`` among the inputs are not shifted again, and win over ``labels``; an encoder-decoder has none."""
    torch.manual_seed(4)
    logits, labels = torch.randn(2, 6, 11), torch.randint(0, 11, (2, 6))
    inputs = {"labels": labels, "shift_labels": labels.roll(-1, 1)}
    found = aligned(logits, TEXT, CAUSAL, inputs)
    assert mean_loss(found) == pytest.approx(F.cross_entropy(logits.flatten(0, 1), labels.roll(-1, 1).flatten()).item(), abs=1e-5)
    assert isinstance(found, Aligned)
    assert found.how == "already shifted (shift_labels)"
    assert mean_loss(aligned(logits, TEXT, JOINED, inputs)) == pytest.approx(
        F.cross_entropy(logits.flatten(0, 1), labels.flatten()).item(), abs=1e-5
    )


@pytest.mark.parametrize("name", ["logits_to_keep", "num_logits_to_keep"])
def test_logits_to_keep(name: str) -> None:
    """Logits of the last n positions lie over the last n labels, of text and of audio."""
    torch.manual_seed(5)
    logits, labels = torch.randn(2, 4, 33), torch.randint(0, 11, (2, 9, 3))
    found = aligned(logits[..., :11], TEXT, CAUSAL, {"labels": labels[..., 0], name: 4})
    expected = [F.cross_entropy(logits[:, :-1, 11 * k : 11 * (k + 1)].flatten(0, 1), labels[:, -3:, k].flatten()).item() for k in range(3)]
    assert mean_loss(found) == pytest.approx(expected[0], abs=1e-5)
    assert isinstance(found, Aligned)
    assert found.how == "the last 4, shifted by one"
    assert codebook_losses(aligned(logits, audio(3), CAUSAL, {"audio_labels": labels, name: 4})) == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("index", [[1, 5, 6, 8], [0, -1, 3], [7]])
def test_logits_of_chosen_positions(index: list[int]) -> None:
    """Logits of positions that an index tensor names, from the end too, lie over the labels after these, of text and of audio."""
    torch.manual_seed(9)
    every, labels = torch.randn(2, 9, 33), torch.randint(0, 11, (2, 9, 3))
    labels[0, 2] = -100
    inputs = {"labels": labels[..., 0], "audio_labels": labels, "logits_to_keep": torch.tensor(index)}
    found = aligned(every[:, index, :11], TEXT, CAUSAL, inputs)
    whole = aligned(every[..., :11], TEXT, CAUSAL, {"labels": labels[..., 0]})
    assert isinstance(found, Aligned)
    assert isinstance(whole, Aligned)
    assert found.how == f"{len(index)} chosen positions, shifted by one"
    assert torch.equal(found.labels, whole.labels[:, index])
    assert {way: laid.tolist() for way, laid in found.others.items()} == {
        way: laid[:, index].tolist() for way, laid in whole.others.items()
    }
    codes = aligned(every[:, index], audio(3), CAUSAL, inputs)
    assert isinstance(codes, Aligned)
    assert torch.equal(codes.labels[:, :, 0], found.labels)


def test_slips() -> None:
    """One shift less and one more lie a position to either side; an encoder-decoder has no less, and audio no padding."""
    labels = torch.arange(12).view(2, 6)
    found = aligned(torch.randn(2, 6, 11), TEXT, CAUSAL, {"labels": labels})
    assert isinstance(found, Aligned)
    assert found.labels.tolist() == [[1, 2, 3, 4, 5, -100], [7, 8, 9, 10, 11, -100]]
    assert {way: laid.tolist() for way, laid in found.others.items()} == {
        "shift_less": labels.tolist(),
        "shift_more": [[2, 3, 4, 5, -100, -100], [8, 9, 10, 11, -100, -100]],
    }
    joined = aligned(torch.randn(2, 6, 11), TEXT, JOINED, {"labels": labels})
    assert isinstance(joined, Aligned)
    assert joined.labels.tolist() == labels.tolist()
    assert {way: laid.tolist() for way, laid in joined.others.items()} == {"shift_more": found.labels.tolist()}
    codes = aligned(torch.randn(1, 4, 33), audio(3), CAUSAL, {"audio_labels": labels.view(1, 4, 3), "attention_mask": torch.zeros(1, 4)})
    assert isinstance(codes, Aligned)
    assert set(codes.others) == {"shift_less", "shift_more"}
    assert codes.others["shift_more"].tolist() == [[[6, 7, 8], [9, 10, 11], [-100] * 3, [-100] * 3]]
    ready = aligned(torch.randn(2, 6, 11), TEXT, CAUSAL, {"shift_labels": labels, "attention_mask": torch.tensor([[1] * 5 + [0]] * 2)})
    assert isinstance(ready, Aligned)
    assert {way: laid[0].tolist() for way, laid in ready.others.items()} == {
        "shift_less": [-100, 0, 1, 2, 3, 4],
        "shift_more": [1, 2, 3, 4, 5, -100],
        "padding_out": [0, 1, 2, 3, -100, 5],
    }


def test_labels_at_padding() -> None:
    """What the mask hides is left out, of labels before the shift; a 2-D mask of the encoder says nothing of a decoder's labels."""
    labels, mask = torch.arange(12).view(2, 6), torch.tensor([[1, 1, 1, 1, 0, 0], [0, 0, 1, 1, 1, 1]])
    found = aligned(torch.randn(2, 6, 11), TEXT, CAUSAL, {"labels": labels, "attention_mask": mask})
    assert isinstance(found, Aligned)
    assert found.others["padding_out"].tolist() == [[1, 2, 3, -100, -100, -100], [-100, 8, 9, 10, 11, -100]]
    joined = aligned(torch.randn(2, 6, 11), TEXT, JOINED, {"labels": labels, "attention_mask": mask})
    assert isinstance(joined, Aligned)
    assert "padding_out" not in joined.others
    joined = aligned(torch.randn(2, 6, 11), TEXT, JOINED, {"labels": labels, "decoder_attention_mask": mask})
    assert isinstance(joined, Aligned)
    assert joined.others["padding_out"].tolist() == [[0, 1, 2, 3, -100, -100], [-100, -100, 8, 9, 10, 11]]
    kept = aligned(torch.randn(2, 2, 11), TEXT, CAUSAL, {"labels": labels, "attention_mask": mask, "logits_to_keep": 2})
    assert isinstance(kept, Aligned)
    assert kept.others["padding_out"].tolist() == [[-100, -100], [11, -100]]
    output = {"expanded_labels": labels, "attention_mask": mask}
    expanded = aligned(torch.randn(2, 6, 11), TEXT, CAUSAL, {"labels": labels[:, :4], "attention_mask": mask[:, :4]}, output)
    assert isinstance(expanded, Aligned)
    assert torch.equal(expanded.others["padding_out"], found.others["padding_out"])


def test_a_run_of_padding_tokens() -> None:
    """Without a decoder mask: the run of padding ids that ends a row, all but its first where padding also ends a text."""
    labels = torch.tensor([[3, 9, 4, 9, 9, 9], [3, 4, 9, 9, -100, -100], [1, 2, 3, 4, 5, 9], [9, 9, 9, 9, 9, 4]])
    for ends, expected in (
        (True, [[3, 9, 4, 9, -100, -100], [3, 4, 9, -100, -100, -100], [1, 2, 3, 4, 5, 9], [9, 9, 9, 9, 9, 4]]),
        (False, [[3, 9, 4, -100, -100, -100], [3, 4, -100, -100, -100, -100], [1, 2, 3, 4, 5, -100], [9, 9, 9, 9, 9, 4]]),
    ):
        facts = replace(JOINED, padding_token=9, ends_with_padding=ends)
        found = aligned(torch.randn(4, 6, 11), TEXT, facts, {"labels": labels})
        assert isinstance(found, Aligned)
        assert found.others["padding_out"].tolist() == expected


@pytest.mark.parametrize("keep", [3, torch.tensor([1, 5, 6]), torch.tensor([1, 0, 1, 0, 1, 0, 1, 0, 0]) != 0, torch.ones(4), None])
def test_lengths_that_do_not_match(keep: Any) -> None:
    """Logits shorter than the labels without a matching ``logits_to_keep`` are not guessed at: the reason holds the numbers."""
    found = aligned(torch.randn(2, 4, 11), TEXT, CAUSAL, {"labels": torch.zeros(2, 9, dtype=torch.int64), "logits_to_keep": keep})
    assert isinstance(found, NotAligned)
    assert found.later
    assert "labels of shape (2, 9)" in found.reason
    assert "(2, 4, 11)" in found.reason
    assert ("logits_to_keep" in found.reason) == (keep is not None)
    assert not isinstance(aligned(torch.randn(2, 4, 11), TEXT, CAUSAL, {"labels": torch.zeros(3, 4, dtype=torch.int64)}), Aligned)
    for shape in ((3, 9), (2, 3)):
        other = {"labels": torch.zeros(shape, dtype=torch.int64), "logits_to_keep": 4}
        assert not isinstance(aligned(torch.randn(2, 4, 11), TEXT, CAUSAL, other), Aligned)


def test_expanded_labels_win() -> None:
    """Expanded labels in the root's output are used, also as a plain mapping; of another length than the logits they are not."""
    torch.manual_seed(6)
    logits, labels, expanded = torch.randn(2, 8, 11), torch.randint(0, 11, (2, 5)), torch.randint(0, 11, (2, 8))
    expected = F.cross_entropy(logits[:, :-1].flatten(0, 1), expanded[:, 1:].flatten()).item()
    for own in (labels, expanded.flip(1)):
        assert mean_loss(aligned(logits, TEXT, CAUSAL, {"label_ids": own}, {"expanded_labels": expanded})) == pytest.approx(
            expected, abs=1e-5
        )
    found = aligned(logits, TEXT, CAUSAL, {"label_ids": labels}, {"expanded_labels": expanded[:, :7]})
    assert isinstance(found, NotAligned)
    assert not found.later
    found = aligned(logits, TEXT, CAUSAL, {"label_ids": expanded}, {"expanded_labels": expanded[:, :7]})
    assert mean_loss(found) == pytest.approx(expected, abs=1e-5)


def test_nothing_found() -> None:
    """Without labels the reason says which names were looked for; text labels are not taken for an audio head's."""
    found = aligned(torch.randn(2, 4, 11), TEXT, CAUSAL, {"input_ids": torch.ones(2, 4)})
    assert isinstance(found, NotAligned)
    assert found.later
    assert "labels, label_ids, shift_labels" in found.reason
    assert isinstance(aligned(torch.randn(2, 4, 11), TEXT, CAUSAL, {}, {}), NotAligned)
    assert not aligned(torch.randn(2, 4, 11), TEXT, CAUSAL, {}, {}).later  # type: ignore[union-attr]
    found = aligned(torch.randn(2, 4, 33), audio(3), CAUSAL, {"labels": torch.zeros(2, 4, dtype=torch.int64)})
    assert isinstance(found, NotAligned)
    assert not found.later
    assert "audio_labels, label_audio_ids" in found.reason


@pytest.mark.parametrize(
    ("logits", "labels"),
    [((9, 33), (3, 8)), ((9, 32), (3, 9)), ((2, 4, 33), (3, 9)), ((2, 4, 33), (2, 3, 3)), ((9, 33), (9,)), ((33,), (9,)), ((33,), (3, 9))],
)
def test_audio_that_does_not_match(logits: tuple[int, ...], labels: tuple[int, ...]) -> None:
    """Audio labels that do not lie over the logits are named with both shapes, and nothing breaks."""
    for name in ("label_audio_ids", "audio_labels"):
        found = aligned(torch.randn(logits), audio(3), CAUSAL, {name: torch.zeros(labels, dtype=torch.int64)})
        assert isinstance(found, NotAligned)
        assert str(logits) in found.reason


def test_unknown_placeholders() -> None:
    """Frames cannot be laid over placeholders that the config does not name: said, not scored as nothing."""
    inputs = {"audio_labels": torch.zeros(2, 5, 3, dtype=torch.int64), "input_ids": torch.full((2, 9), 7)}
    found = aligned(torch.randn(2, 9, 33), audio(3), replace(CAUSAL, audio_placeholders=()), inputs)
    assert isinstance(found, NotAligned)


def test_masks_of_another_shape() -> None:
    """A mask that does not lie over the labels (four dimensions, or none at all) hides none of them."""
    labels = torch.zeros(2, 6, dtype=torch.int64)
    for mask in (torch.zeros(2, 1, 6, 6), torch.zeros(2, 9), None):
        found = aligned(torch.randn(2, 6, 11), TEXT, replace(CAUSAL, model_type="qwen2_audio"), {"labels": labels, "attention_mask": mask})
        assert isinstance(found, Aligned)
        assert (found.labels[:, :-1] == 0).all()


def test_soft_labels_are_no_token_ids() -> None:
    """Floating-point labels are not taken for ids."""
    assert isinstance(aligned(torch.randn(2, 6, 11), TEXT, CAUSAL, {"labels": torch.zeros(2, 6)}), NotAligned)


@pytest.mark.parametrize("positions", [0, 1])
def test_single_position(positions: int) -> None:
    """One position, or none, predicts nothing after a shift: no rows, no crash."""
    found = aligned(torch.randn(2, positions, 11), TEXT, CAUSAL, {"labels": torch.zeros(2, positions, dtype=torch.int64)})
    assert isinstance(found, Aligned)
    assert found.labels.shape == (2, positions)
    assert (found.labels == -100).all()
    assert found.logits.shape == (2, positions, 11)


def test_views_not_copies() -> None:
    """The logits that come back are a view of the head's own, without its graph."""
    logits = torch.randn(2, 6, 11, requires_grad=True) * 1
    found = aligned(logits, TEXT, CAUSAL, {"labels": torch.zeros(2, 6, dtype=torch.int32)})
    assert isinstance(found, Aligned)
    assert found.logits.data_ptr() == logits.data_ptr()
    assert not found.logits.requires_grad


def test_no_sync() -> None:
    """On a device whose values the host cannot read, nothing is read, and labels on the CPU are moved there."""
    ids = torch.zeros(2, 6, dtype=torch.int64)
    inputs = {"labels": ids, "audio_labels": torch.zeros(2, 5, 3, dtype=torch.int64), "input_ids": ids.to("meta")}
    inputs["audio_input_ids_mask"] = torch.ones(2, 5, dtype=torch.bool)
    inputs["logits_to_keep"] = torch.tensor([1, 2])
    for site, width in ((TEXT, 11), (audio(3), 33)):
        for positions in (2, 6):
            found = aligned(torch.empty(2, positions, width, device="meta"), site, replace(CAUSAL, padding_token=3), inputs)
            assert isinstance(found, Aligned)
            assert found.labels.device.type == "meta"
            assert {laid.device.type for laid in found.others.values()} == {"meta"}
