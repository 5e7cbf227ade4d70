"""Heads without logits, in pieces: what an output offers, evaluation where nothing can be read, tokens to show, the audit's means.

Shapes: B samples, S positions, D width, V vocabulary.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from costs import peak_mib
from probe.capture.buffer import StepBuffer
from probe.capture.microbatch import MicroBatch
from probe.capture.observer import Call, StepEnd
from probe.capture.observers.head_cells import HEAD_COLUMNS, audit_sums, cells_of, head_cell, rank_means
from probe.capture.observers.head_offered import score_offered
from probe.capture.observers.head_scoring import Scored, whole
from probe.capture.observers.head_tokens import TopTokens, rows_to_show, shown_tokens
from probe.capture.observers.head_unseen import HeadEvaluator
from probe.capture.observers.heads import HeadWatcher
from probe.foreign.sharding import is_whole
from probe.measure.heads import Logits
from probe.measure.variants import COLUMNS, SUMS, VARIANTS
from probe.records import Site
from probe.sites.facts import ModelFacts
from probe.sites.labels import NotAligned

pytestmark = pytest.mark.pure  # of torch and probe alone: the same with every transformers

TEXT = Site("lm_head", "lm_head", "chosen by the test", modality="text")
CODES = Site("audio_head", "lm_head", "chosen by the test", modality="audio", codebooks=3)
FACTS = ModelFacts("", "", encoder_decoder=False, vocabulary=11, codebooks=3, audio_tokens=(), audio_placeholders=(), label_shift=1)


def named(scored: Any, k: int | None = None) -> dict[str, float]:
    assert isinstance(scored, Scored), scored
    return dict(zip(HEAD_COLUMNS, scored.sums[k].tolist(), strict=True))


def micro(output: Any, **inputs: Any) -> MicroBatch:
    return MicroBatch(index=0, kwargs=inputs, output=output)


def offered(positions: int, **more: Tensor) -> dict[str, Tensor]:
    return {"log_probs": -torch.rand(2, positions), **more}


def test_log_probabilities_of_all_but_the_last_position() -> None:
    """(B, S - 1) log-probabilities lie over the shifted labels; what is not finite is counted apart."""
    torch.manual_seed(1)
    labels = torch.randint(0, 11, (2, 6))
    labels[0, :3] = -100
    output = offered(5)
    output["log_probs"][1, 4] = -torch.inf
    mask = torch.tensor([[1, 1, 1, 1, 1, 0], [1] * 6])
    found = named(scored := score_offered(TEXT, micro(output, labels=labels, attention_mask=mask), FACTS))
    kept = labels[:, 1:] != -100
    kept[1, 4] = False
    losses = -output["log_probs"][kept]
    assert (found["labelled"], found["nonfinite_rows"]) == (int(kept.sum()), 1)
    assert found["cross_entropy"] == pytest.approx(float(losses.sum()))
    assert found["squared_cross_entropy"] == pytest.approx(float(losses.square().sum()))
    assert (found["correct_rows"], found["entropy_rows"], found["top5_rows"], found["bin_rows_3"]) == (0, 0, 0, 0)
    audit = scored.audit[None]
    assert set(audit) == {"meant", "padding_out"}
    assert audit["meant"][:2].tolist() == pytest.approx([float(kept.sum()), float(losses.sum())])
    kept[0, 4] = False
    assert audit["padding_out"][:2].tolist() == pytest.approx([float(kept.sum()), -float(output["log_probs"][kept].sum())])
    assert audit["meant"][2].isnan()


def test_log_probabilities_of_every_position() -> None:
    """(B, S) lies over labels that came shifted, or that are not shifted; over others it is not guessed at."""
    labels = torch.randint(0, 11, (2, 6))
    assert named(score_offered(TEXT, micro(offered(6), shift_labels=labels), FACTS))["labelled"] == 12
    assert named(score_offered(TEXT, micro(offered(6), labels=labels), replace(FACTS, label_shift=0)))["labelled"] == 12
    for positions, said in ((6, "shifted by one do not lie over the output's log_probs of shape (2, 6)"), (4, "(2, 6)"), (9, "(2, 9, 1)")):
        found = score_offered(TEXT, micro(offered(positions), labels=labels), FACTS)
        assert isinstance(found, NotAligned)
        assert said in found.reason
    assert score_offered(TEXT, micro(offered(5)), FACTS).absent  # type: ignore[union-attr]


def test_a_mask_of_labels_that_the_output_brings() -> None:
    """The output's own mask wins over labels, and needs none."""
    mask = torch.rand(2, 5) < 0.5
    more = {"label_mask": mask, "is_top1": mask, "entropy": torch.rand(2, 5)}
    output = offered(5, **more)
    for inputs in ({}, {"labels": torch.zeros(2, 9, dtype=torch.int64)}, {"labels": torch.zeros(2, 6, dtype=torch.int64)}):
        found = named(score_offered(TEXT, micro(output, **inputs), FACTS))
        assert found["labelled"] == found["correct"] == found["correct_rows"] == found["entropy_rows"] == int(mask.sum())
        assert found["entropy"] == pytest.approx(float(output["entropy"][mask].sum()))


@pytest.mark.parametrize("output", [{}, {"log_probs": None}, {"log_probs": torch.zeros(5)}, {"log_probs": torch.zeros(2, 5).int()}, None])
def test_outputs_that_offer_nothing(output: Any) -> None:
    """Without log-probabilities of positions there is nothing to take; audio heads take none."""
    assert score_offered(TEXT, micro(output, labels=torch.zeros(2, 6, dtype=torch.int64)), FACTS) is None
    assert score_offered(CODES, micro(offered(5), labels=torch.zeros(2, 6, dtype=torch.int64)), FACTS) is None


def evaluated(site: Site, head: nn.Module, hidden: Tensor, facts: ModelFacts = FACTS, **inputs: Any) -> Any:
    evaluator = HeadEvaluator({site.name: head}, {site.name: "body"}, facts)
    opened = micro({}, **inputs)
    body = Site("body", "custom", "")
    for states in (hidden + 1, hidden):  # the last call counts
        evaluator.remember(Call(body, head, opened, (), {}, output=(states,)))
    evaluator.remember(Call(Site("other", "custom", ""), head, opened, (), {}, output=hidden + 2))
    found = evaluator.score(site, opened, salt=3)
    evaluator.forget(opened)
    assert opened.scratch == {}
    return found


def test_evaluating_a_head_of_codebooks() -> None:
    """Each codebook is scored on its own logits and labels."""
    torch.manual_seed(2)
    head, hidden, labels = nn.Linear(8, 33), torch.randn(2, 6, 8), torch.randint(0, 11, (2, 6, 3))
    labels[0, 2], labels[1, 3, 1] = -100, -100
    with torch.no_grad():
        found = evaluated(CODES, head, hidden, audio_labels=labels)
        logits = head(hidden).unflatten(-1, (3, 11))
    for k in range(3):
        expected = F.cross_entropy(logits[:, :-1, k].flatten(0, 1), labels[:, 1:, k].flatten(), reduction="sum")
        columns = named(found, k)
        assert columns["cross_entropy"] == pytest.approx(float(expected), rel=1e-5)
        assert columns["labelled"] == columns["evaluated_rows"] == int((labels[:, 1:, k] != -100).sum())
        later = F.cross_entropy(logits[:, :-2, k].flatten(0, 1), labels[:, 2:, k].flatten(), reduction="sum")
        assert found.audit[k]["shift_more"][1].item() == pytest.approx(float(later), rel=1e-5)
    sums, audit = whole(found)
    assert dict(zip(HEAD_COLUMNS, sums.tolist()))["cross_entropy"] == pytest.approx(sum(named(found, k)["cross_entropy"] for k in range(3)))
    assert audit["meant"][0] == sum(found.audit[k]["meant"][0] for k in range(3))


def test_evaluating_what_the_model_changes() -> None:
    """What the class does to logits behind its head is done to evaluated ones too; a narrower state is cast to the weight's dtype."""
    torch.manual_seed(3)
    head, hidden, labels = nn.Linear(8, 11), torch.randn(2, 6, 8).bfloat16(), torch.randint(0, 11, (2, 6))
    with torch.no_grad():
        found = evaluated(TEXT, head, hidden, replace(FACTS, logit_factor=0.5, logit_softcap=2.0), labels=labels)
        logits = Logits(0.5, 2.0).change_(head(hidden.float()).clone())
    expected = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="sum")
    assert named(found)["cross_entropy"] == pytest.approx(float(expected), rel=1e-5)


def test_a_head_that_its_feeder_does_not_fit() -> None:
    """Another width than the head's input is said; without hidden states or labels there is nothing to say."""
    labels = torch.zeros(2, 6, dtype=torch.int64)
    found = evaluated(TEXT, nn.Linear(9, 11), torch.randn(2, 6, 8), labels=labels)
    assert isinstance(found, NotAligned)
    assert "of shape (2, 6, 8), does not go into it" in found.reason
    assert evaluated(TEXT, nn.Linear(8, 11), torch.randn(2, 6, 8)) is None
    assert HeadEvaluator({"lm_head": nn.Linear(8, 11)}, {}, FACTS).score(TEXT, micro({}, labels=labels), salt=0) is None
    assert evaluated(TEXT, nn.Linear(8, 11), torch.randn(2, 0, 8), labels=labels[:, :0]) is None


def test_positions_that_a_mask_names() -> None:
    """How many positions a mask names cannot be known without waiting: not evaluated, and said."""
    labels, mask = torch.zeros(2, 6, dtype=torch.int64), torch.tensor([True, True, False, True, True, True])
    found = evaluated(TEXT, nn.Linear(8, 11), torch.randn(2, 6, 8), labels=labels, logits_to_keep=mask)
    assert isinstance(found, NotAligned)
    assert "by a mask" in found.reason
    for keep in (0, 6, 9):  # all of them
        assert named(evaluated(TEXT, nn.Linear(8, 11), torch.randn(2, 6, 8), labels=labels, logits_to_keep=keep))["labelled"] == 10


def test_evaluation_reads_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a device whose values the host cannot read, nothing is read, evaluating or taking what is offered."""
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device="cpu": False)  # which does not know that device
    labels = torch.zeros(2, 600, dtype=torch.int64)
    with torch.device("meta"):
        hidden, head = torch.empty(2, 600, 8), nn.Linear(8, 11)
        output = {"log_probs": torch.empty(2, 599), "entropy": torch.empty(2, 599)}
    found = evaluated(TEXT, head, hidden, labels=labels.to("meta"), logits_to_keep=torch.arange(600))
    assert isinstance(found, Scored), found
    assert isinstance(score_offered(TEXT, micro(output, labels=labels.to("meta")), FACTS), Scored)


@pytest.mark.parametrize(("shape", "vocabulary"), [((4, 2_000), 262_144), ((2, 150_000), 32), ((3, 1_000), 6_000)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_memory_of_an_evaluation(shape: tuple[int, int], vocabulary: int, dtype: torch.dtype) -> None:
    """Laying the labels, picking rows, evaluating the head on them and scoring takes at most 32 MiB."""
    head, hidden, labels = nn.Linear(8, vocabulary, bias=False, dtype=dtype), torch.randn(*shape, 8, dtype=dtype), torch.zeros(shape).long()
    assert isinstance(evaluated(TEXT, head, hidden, labels=labels), Scored)
    with torch.no_grad():
        assert peak_mib(lambda: evaluated(TEXT, head, hidden, labels=labels)) < 32


def test_a_gradient_after_an_evaluation() -> None:
    """Inside one autocast the cast of the weight that an evaluation made is not what the model's own next call goes on with."""
    head, hidden, labels = nn.Linear(8, 11), torch.randn(2, 6, 8), torch.randint(0, 11, (2, 6))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        with torch.no_grad():
            found = evaluated(TEXT, head, hidden, labels=labels)
        logits = head(hidden)
        F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten()).backward()
    assert head.weight.grad is not None
    expected = F.cross_entropy(logits.detach()[:, :-1].flatten(0, 1).double(), labels[:, 1:].flatten(), reduction="sum")
    assert named(found)["cross_entropy"] == pytest.approx(float(expected), rel=1e-6)


def test_autocast_that_the_feeder_did_not_run_under() -> None:
    """A body that ran without autocast has a head that does, too."""
    head, hidden, labels = nn.Linear(8, 11), torch.randn(2, 6, 8), torch.randint(0, 11, (2, 6))
    evaluator, opened = HeadEvaluator({"lm_head": head}, {"lm_head": "body"}, FACTS), micro({}, labels=labels)
    evaluator.remember(Call(Site("body", "custom", ""), head, opened, (), {}, output=hidden))
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        found = evaluator.score(TEXT, opened, salt=3)
    expected = F.cross_entropy(head(hidden).detach()[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="sum")
    assert named(found)["cross_entropy"] == pytest.approx(float(expected), rel=1e-6)


def test_what_is_whole() -> None:
    """A weight is whole unless it is distributed, empty, or a vector that stands for a share; vectors that are nobody's share are."""

    class DTensor(Tensor):
        pass

    marked, vector = nn.Parameter(torch.zeros(3, 4)), nn.Parameter(torch.zeros(12))
    assert is_whole(marked)
    assert is_whole(vector)
    marked._fsdp_flattened = vector._fsdp_flattened = True
    assert is_whole(marked)
    assert not is_whole(vector)
    assert not is_whole(torch.zeros(3, 4).as_subclass(DTensor))
    assert not is_whole(nn.Parameter(torch.zeros(0)))


def watcher(*sites: Site, facts: ModelFacts = FACTS) -> tuple[HeadWatcher, StepBuffer]:
    found = HeadWatcher(sites, facts, evaluator=HeadEvaluator({}, {}, facts), keep_text=True)
    buffer = StepBuffer(budget_bytes=1 << 20, cells=found.cells())
    buffer.open(1)
    return found, buffer


def columns_of(buffer: StepBuffer, site: str) -> dict[str, float]:
    return dict(zip(HEAD_COLUMNS, buffer.totals.sums[head_cell(site)].tolist(), strict=True))


def leave(found: HeadWatcher, buffer: StepBuffer, site: Site, opened: MicroBatch, output: Any) -> None:
    found.leave(Call(site, nn.Identity(), opened, (), {}, output=output), buffer)


ROOT = Site("", "model", "")


def test_logits_that_the_root_returns_are_changed_already() -> None:
    """A softcap is not put twice on logits that are known only from the root's output."""
    torch.manual_seed(4)
    facts = replace(FACTS, logit_softcap=2.0)
    found, buffer = watcher(TEXT, facts=facts)
    raw, labels = 5 * torch.randn(2, 6, 11), torch.randint(0, 11, (2, 6))
    changed = 2 * torch.tanh(raw / 2)
    expected = F.cross_entropy(changed[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="sum")
    for kept in (raw.clone(), None):
        opened = MicroBatch(index=0)
        leave(found, buffer, TEXT, opened, raw.clone() if kept is None else kept)
        opened.output = {"logits": changed, "expanded_labels": labels}
        before = columns_of(buffer, "lm_head")["cross_entropy"] if kept is None else 0.0
        leave(found, buffer, ROOT, opened, opened.output)
        assert columns_of(buffer, "lm_head")["cross_entropy"] - before == pytest.approx(float(expected), rel=1e-5)


def test_a_step_begins_without_the_counts_of_one_that_was_cut_off() -> None:
    """When a step is tried again its first forward forgets what the first try had predicted."""
    found, buffer = watcher(TEXT)
    logits, labels = torch.eye(11)[None, :6], torch.zeros(1, 6, dtype=torch.int64)
    for _ in range(2):
        buffer.open(1)
        opened = MicroBatch(index=0, kwargs={"labels": labels}, output={"logits": logits})
        found.enter(Call(ROOT, nn.Identity(), opened, (), {}), buffer)
        leave(found, buffer, TEXT, opened, logits)
        leave(found, buffer, ROOT, opened, opened.output)
    found.step_end(StepEnd(), buffer)
    assert columns_of(buffer, "lm_head")["top_token"] == 1
    assert columns_of(buffer, "lm_head")["top_token_rows"] == 5


def test_log_probabilities_of_one_head_among_several() -> None:
    """With two text heads nobody can tell whose log-probabilities the output offers."""
    other = replace(TEXT, name="second_head")
    for sites, labelled in (((TEXT,), 10), ((TEXT, other), 0)):
        found, buffer = watcher(*sites)
        found._evaluator = HeadEvaluator({site.name: nn.Identity() for site in sites}, {}, FACTS)
        opened = micro(offered(5), labels=torch.zeros(2, 6, dtype=torch.int64))
        leave(found, buffer, ROOT, opened, opened.output)
        assert (columns_of(buffer, "lm_head")["labelled"] if labelled else len(buffer.totals.sums)) == labelled


def test_shown_tokens() -> None:
    """The labelled positions of the first samples come first, in order, and nothing is lost behind a long prompt."""
    labels = torch.full((10, 2000), -100)
    labels[:, 1990:] = torch.arange(100).view(10, 10)
    assert rows_to_show(labels) == 8 * 2000
    predictions = torch.arange(8 * 2000)
    ours, theirs = shown_tokens(predictions, labels)
    assert theirs.shape == (8, 512)
    assert theirs[3, :11].tolist() == [*range(30, 40), -100]
    assert ours[3, :10].tolist() == list(range(3 * 2000 + 1990, 3 * 2000 + 2000))
    flat = torch.tensor([-100, 4, -100, 6])
    assert rows_to_show(flat) == 4
    ours, theirs = shown_tokens(torch.tensor([0, 1, 2, 3]), flat)
    assert (ours[:, :2].tolist(), theirs[:, :2].tolist()) == ([[1, 3]], [[4, 6]])


def test_most_frequent_prediction_within_the_budget() -> None:
    """Counts are held in the budget and given back; what does not fit is named; a step that came to no end leaves nothing."""
    buffer = StepBuffer(budget_bytes=20_000, cells=cells_of(CODES))
    buffer.open(1)
    tops, before = TopTokens(), buffer.bytes
    for k in range(2):
        for _ in range(2):
            blank = tops.blank("audio_head", k, vocabulary=5, device=torch.device("cpu"), buffer=buffer)
            assert blank is not None
            blank += torch.tensor([0, 2, k, 0, 1], dtype=torch.int32)
            tops.add("audio_head", k, blank)
    assert buffer.bytes == before + 2 * 4 * 5
    assert tops.blank("audio_head", 2, vocabulary=10_000, device=torch.device("cpu"), buffer=buffer) is None
    assert "budget" in buffer.totals.reasons["head:audio_head/top_token"]
    tops.finish(buffer, keep=True)
    for name, expected in ((head_cell("audio_head", 0), 4), (head_cell("audio_head"), 8)):
        assert dict(zip(HEAD_COLUMNS, buffer.totals.sums[name].tolist()))["top_token"] == expected
    assert buffer.totals.local["top_token:head:audio_head:1"].tolist() == [1]
    assert buffer.bytes == before + 2 * 8
    tops.finish(buffer, keep=True)
    assert dict(zip(HEAD_COLUMNS, buffer.totals.sums[head_cell("audio_head")].tolist()))["top_token"] == 8


def test_means_for_the_audit() -> None:
    """Each micro-batch adds its means, the end of a step that of all; what has no label adds 0, an infinite sum stays infinite."""
    first = audit_sums({"meant": torch.tensor([4.0, 8.0, 12.0]), "shift_more": torch.tensor([0.0, 0.0, 0.0])})
    second = audit_sums({"meant": torch.tensor([1.0, 5.0, torch.inf])})
    columns = dict(zip(COLUMNS, (first + second).tolist(), strict=True))
    assert {name: columns[f"meant:{name}"] for name in SUMS} == {"labelled": 5, "cross_entropy": 13, "uniform": torch.inf}
    assert columns["meant:micro_cross_entropy"] == 2 + 5
    assert columns["meant:micro_uniform"] == torch.inf
    assert [columns[f"{way}:{name}"] for way in VARIANTS[1:] for name in ("labelled", "micro_cross_entropy")] == [0] * 6
    total = first + second
    columns = dict(zip(COLUMNS, (total + rank_means(total)).tolist(), strict=True))
    assert columns["meant:rank_cross_entropy"] == pytest.approx(13 / 5)
    assert columns["meant:micro_cross_entropy"] == 7
    assert columns["shift_more:rank_cross_entropy"] == 0
