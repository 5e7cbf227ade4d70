"""Scores of a head: what float64 and torch's own cross-entropy say, in bounded memory, whatever stands in logits and labels."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from costs import peak_mib
from probe.capture.microbatch import MicroBatch
from probe.errors import ProbeValueError
from probe.measure.calibration import CALIBRATION, calibration, expected_calibration_error
from probe.measure.heads import COLUMNS, HeadScore, Logits, score, split_codebooks
from probe.records import Site
from probe.sites.facts import ModelFacts
from probe.sites.labels import align
from probe.sites.laying import Aligned

pytestmark = pytest.mark.pure  # of torch and probe alone: the same with every transformers

TEXT = Site("lm_head", "lm_head", "chosen by the test", modality="text")
DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def columns(result: HeadScore) -> dict[str, float]:
    assert result.sums.dtype == torch.float64
    return dict(zip(COLUMNS, result.sums.tolist(), strict=True))


def reference(logits: Tensor, labels: Tensor) -> dict[str, float]:
    """Score in float64 the rows that have a label inside the vocabulary."""
    rows = logits.reshape(-1, logits.shape[-1]).double()
    flat = labels.reshape(-1)
    inside = (flat >= 0) & (flat < rows.shape[1])
    x, y = rows[inside], flat[inside]
    p = x.softmax(-1)
    losses = F.cross_entropy(x, y, reduction="none")
    correct = x.argmax(-1) == y
    return {
        "cross_entropy": losses.sum().item(),
        "correct": correct.sum().item(),
        "top5": ((x > x.gather(1, y[:, None])).sum(-1) < 5).sum().item(),
        "entropy": -torch.special.xlogy(p, p).sum().item(),
        "labelled": inside.sum().item(),
        "squared_cross_entropy": losses.square().sum().item(),
        **in_bins(p.max(-1).values.tolist(), correct.tolist()),
        "labels_outside": ((flat != -100) & ~inside).sum().item(),
        "nonfinite_rows": 0,
    }


def in_bins(confidence: list[float], correct: list[bool]) -> dict[str, float]:
    """Count in plain Python into 15 bins, each open below and closed above."""
    found = dict.fromkeys(CALIBRATION, 0.0)
    for p, right in zip(confidence, correct, strict=True):
        number = next(m for m in range(15) if p <= (m + 1) / 15 + 1e-12)
        found[f"bin_rows_{number}"] += 1
        found[f"bin_confidence_{number}"] += p
        found[f"bin_correct_{number}"] += right
    return found


def example(*shape: int, vocabulary: int = 97, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Logits that often rank the label high, and labels of which some are ignored."""
    labels = torch.randint(0, vocabulary, shape)
    logits = 3 * torch.randn(*shape, vocabulary, dtype=torch.float64)
    logits.scatter_add_(-1, labels[..., None], 6 * torch.rand(*shape, 1, dtype=torch.float64))
    labels[torch.rand(shape) < 0.3] = -100
    return logits.to(dtype), labels


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(3, 41), (5,), (2, 7, 4), ()])
def test_agrees_with_float64(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    """Every column, for every dtype and leading shape, is what float64 gives; predictions are the argmax everywhere."""
    torch.manual_seed(1)
    logits, labels = example(*shape, dtype=dtype)
    result = score(logits, labels, work_mib=0.005, keep=logits.numel())
    assert columns(result) == pytest.approx(reference(logits, labels), rel=1e-5)
    assert torch.equal(result.predictions, logits.argmax(-1).reshape(-1))


def test_large_vocabulary() -> None:
    """With 150,000 tokens float32 sums still agree with float64."""
    torch.manual_seed(2)
    logits, labels = example(2, 5, vocabulary=150_000)
    assert columns(score(logits, labels)) == pytest.approx(reference(logits, labels), rel=1e-5)


@pytest.mark.parametrize("offset", [-3e4, 3e4])
def test_offset_does_not_matter(offset: float) -> None:
    """Logits far from zero neither overflow nor underflow."""
    torch.manual_seed(3)
    logits, labels = example(4, 9)
    logits = (logits + offset).float()
    assert columns(score(logits, labels)) == pytest.approx(reference(logits, labels), rel=1e-5)


VIEWS: dict[str, Any] = {
    "shifted": lambda x: x[:, :-1],
    "transposed": lambda x: x.transpose(0, 1),
    "vocabulary cut": lambda x: x[..., :50],
    "strided rows": lambda x: x[::2, 1::3],
}


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("work_mib", [1e-6, 0.002, 8.0])
def test_strides_and_chunks_do_not_matter(view: str, work_mib: float) -> None:
    """A view scores as its copy does, whatever the chunk."""
    torch.manual_seed(4)
    logits = VIEWS[view](4 * torch.randn(6, 13, 80))
    labels = torch.randint(0, logits.shape[-1], logits.shape[:-1])
    result = score(logits, labels, work_mib=work_mib, keep=17)
    assert columns(result) == pytest.approx(reference(logits, labels), rel=1e-5)
    assert torch.equal(result.predictions, logits.argmax(-1).reshape(-1)[:17])


def test_labels_outside_the_vocabulary() -> None:
    """A label above the vocabulary, or negative and not the ignored one, is counted apart and never gathered."""
    torch.manual_seed(5)
    logits, labels = example(2, 30)
    labels[0, :4] = torch.tensor([97, 10_000_000, -1, -101])
    assert columns(score(logits, labels))["labels_outside"] == 4
    assert columns(score(logits, labels)) == pytest.approx(reference(logits, labels), rel=1e-5)


def test_ignored_index_inside_the_vocabulary() -> None:
    """A padding token chosen as the ignored label is not scored."""
    logits, labels = torch.randn(4, 10), torch.tensor([0, 1, 0, 2])
    found = columns(score(logits, labels, ignore_index=0))
    assert (found["labelled"], found["labels_outside"]) == (2, 0)
    assert found["cross_entropy"] == pytest.approx(F.cross_entropy(logits, labels, ignore_index=0, reduction="sum").item(), rel=1e-5)


def test_suppressed_tokens() -> None:
    """-Inf for suppressed tokens is legitimate: entropy and cross-entropy are those of the rest."""
    torch.manual_seed(6)
    logits, labels = example(3, 20)
    suppressed = torch.ones_like(logits, dtype=torch.bool).scatter_(-1, labels.clamp(min=0)[..., None], False) & (torch.rand(97) < 0.5)
    logits[suppressed] = -math.inf
    found = columns(score(logits, labels))
    assert found == pytest.approx(reference(logits, labels), rel=1e-5)
    assert math.isfinite(found["entropy"])
    assert found["nonfinite_rows"] == 0


def test_far_tokens_keep_their_rank() -> None:
    """Logits so far below the largest that their probability is 0 are still ranked among each other."""
    logits = torch.tensor([[0.0, -300.0, -301.0, -302.0, -303.0, -304.0, -305.0, -306.0]]).expand(2, 8)
    found = columns(score(logits, torch.tensor([4, 5])))
    assert found["top5"] == 1
    assert found["cross_entropy"] == pytest.approx(303 + 304)


def test_every_way_to_lay_labels() -> None:
    """For each way: labelled rows, cross-entropy and the mean of -log p over the vocabulary, as torch's log-softmax gives them."""
    torch.manual_seed(9)
    logits, meant = example(3, 20)
    others = {"shift_more": meant.roll(1, 1), "padding_out": meant.masked_fill(torch.rand(3, 20) < 0.5, -100)}
    found = score(logits, meant, others=others, work_mib=0.01).audit
    log_p = logits.double().log_softmax(-1)
    for way, labels in {"meant": meant, **others}.items():
        kept = labels != -100
        loss = -log_p.gather(-1, labels.clamp(min=0)[..., None]).squeeze(-1)
        expected = [kept.sum().item(), loss[kept].sum().item(), -log_p.mean(-1)[kept].sum().item()]
        assert found[way].tolist() == pytest.approx(expected, rel=1e-5), way
    logits[..., 3] = -math.inf
    infinite = score(logits, torch.full((3, 20), 5), others={"shift_more": torch.full((3, 20), 3)}).audit
    assert infinite["meant"][2] == math.inf
    assert infinite["meant"][1].isfinite()
    assert infinite["shift_more"].tolist() == [0, 0, 0]


def test_what_the_model_does_behind_its_head() -> None:
    """A factor and a softcap change the distribution as the model's own code does."""
    torch.manual_seed(10)
    logits, labels = example(3, 20)
    changed = 5 * torch.tanh(logits.double() * 0.7 / 5)
    found = columns(score(logits, labels, change=Logits(0.7, 5.0)))
    expected = reference(changed, labels)
    assert found == pytest.approx(expected, rel=1e-5)
    assert columns(score(logits, labels, change=Logits(0.25))) == pytest.approx(reference(logits.double() / 4, labels), rel=1e-5)


def test_histogram_of_predictions() -> None:
    """Only predictions at labelled positions with finite logits are counted, over all chunks, and onto what is there."""
    torch.manual_seed(11)
    logits, labels = example(4, 30)
    labels[0, :2], labels[1, 1] = 5, 1000
    logits[0, 0, 3] = math.nan
    counts = torch.ones(97, dtype=torch.int32)
    score(logits, labels, histogram=counts, work_mib=0.01)
    scored = (labels >= 0) & (labels < 97)
    scored[0, 0] = False
    assert torch.equal(counts, 1 + logits.argmax(-1)[scored].bincount(minlength=97).int())


def test_calibration_error() -> None:
    """The error of a head that says 0.75 and is right half the time is a quarter; of many random rows it is that of the definition."""
    logits = torch.tensor([[math.log(3.0), 0.0]]).expand(10, 2)
    found = columns(score(logits, torch.arange(10) % 2))
    assert expected_calibration_error(found) == pytest.approx(0.25)
    torch.manual_seed(12)
    logits, labels = example(8, 200)
    kept = labels != -100
    p, predicted = logits.double().softmax(-1)[kept].max(-1)
    error = 0.0
    for m in range(15):
        inside = (p > m / 15) & (p <= (m + 1) / 15)
        if inside.any():
            error += inside.double().mean().item() * abs((predicted == labels[kept])[inside].double().mean() - p[inside].mean()).item()
    assert expected_calibration_error(columns(score(logits, labels))) == pytest.approx(error, rel=1e-5)
    assert expected_calibration_error(dict.fromkeys(CALIBRATION, 0.0)) is None


def test_the_ends_of_the_bins() -> None:
    """A confidence of 0 is in the first bin, 1 and what rounding puts above it in the last, NaN in none."""
    confidence = torch.tensor([0.0, 1 / 30, 1.0, 1.0000001, math.nan])
    found = calibration(confidence, torch.ones(5, dtype=torch.bool), torch.ones(5, dtype=torch.bool))
    assert found[:15].tolist() == [2, *[0] * 13, 2]


def test_ties_in_bf16() -> None:
    """Only strictly larger logits come before the label."""
    logits = torch.zeros(1, 50, dtype=torch.bfloat16)
    assert columns(score(logits, torch.tensor([49])))["top5"] == 1


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_nonfinite_rows(bad: float) -> None:
    """Labelled rows with NaN or +Inf, or whose label is suppressed, are counted apart and poison no sum."""
    torch.manual_seed(7)
    logits, labels = example(2, 30)
    labels[0, :3], labels[1, 0] = 5, -100
    clean = reference(logits[:, 3:], labels[:, 3:])
    more = reference(logits[1:, 1:3], labels[1:, 1:3])
    logits[0, 0, 9], logits[0, 1, :], logits[0, 2, 5], logits[1, 0, 3] = bad, -math.inf, -math.inf, bad
    expected = {name: clean[name] + more[name] for name in clean} | {"nonfinite_rows": 3}
    assert columns(score(logits, labels)) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("vocabulary", [1023, 1024, 1025, 1300, 5000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_the_argmax_is_the_first_of_the_largest(dtype: torch.dtype, vocabulary: int) -> None:
    """Found in stripes it is where torch finds it in the whole row: among equals too, at both ends, beside -inf, and in a view."""
    generator = torch.Generator().manual_seed(vocabulary)
    logits = torch.randint(-9, 5, (40, vocabulary + 3), generator=generator).to(dtype)[:, 1:-2]  # many equals
    logits[:20] = torch.randn(20, vocabulary, generator=generator).to(dtype)
    for row, place in enumerate((0, vocabulary - 1, vocabulary // 256 * 256 - 1, vocabulary - 256, vocabulary // 2)):
        logits[row, place] = 99.0
    logits[5, : vocabulary - 1] = -torch.inf
    logits[6] = 0.0
    found = score(logits, torch.zeros(40, dtype=torch.int64), keep=40)
    assert torch.equal(found.predictions, logits.argmax(-1))


def test_rows_are_gathered_in_portions() -> None:
    """More rows than are gathered at a time are added up in portions: as many sums as all rows at once have."""
    generator = torch.Generator().manual_seed(11)
    logits = torch.randn(20_000, 6, generator=generator)
    labels = torch.randint(-1, 7, (20_000,), generator=generator).masked_fill(torch.rand(20_000, generator=generator) < 0.2, -100)
    histogram = torch.zeros(6, dtype=torch.int32)
    found = score(logits, labels, histogram=histogram, keep=20_000)
    counted = (labels >= 0) & (labels < 6)
    loss = torch.nn.functional.cross_entropy(logits.double(), labels.where(counted, torch.tensor(-100)), reduction="sum")
    sums = dict(zip(COLUMNS, found.sums.tolist()))
    assert sums["labelled"] == counted.sum()
    assert sums["cross_entropy"] == pytest.approx(loss.item(), rel=1e-6)
    assert histogram.tolist() == torch.bincount(logits[counted].argmax(-1), minlength=6).tolist()


def test_empty() -> None:
    """No rows: zeros and no predictions."""
    result = score(torch.empty(0, 7, 11), torch.empty(0, 7, dtype=torch.int64))
    assert result.sums.tolist() == [0] * len(COLUMNS)
    assert result.predictions.shape == (0,)


@pytest.mark.parametrize(("logits", "labels"), [((2, 3, 5), (2, 4)), ((3, 0), (3,)), ((), ())])
def test_wrong_shapes_are_an_error(logits: tuple[int, ...], labels: tuple[int, ...]) -> None:
    """Shapes that do not lie over each other, or an empty vocabulary, are named."""
    with pytest.raises(ProbeValueError, match="expected"):
        score(torch.zeros(logits), torch.zeros(labels, dtype=torch.int64))


SIZES = [((1, 600_000), 32), ((8, 50_000), 96), ((3, 1_001), 6_000), ((2, 50), 262_144)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize(("shape", "vocabulary"), SIZES)
def test_memory_is_bounded(dtype: torch.dtype, shape: tuple[int, int], vocabulary: int) -> None:
    """Laying the labels in every way and scoring them takes at most 32 MiB, whatever the vocabulary and the batch, sliced or not."""
    if dtype == torch.float64 and vocabulary * math.prod(shape) > 30_000_000:
        pytest.skip("the logits alone would fill the memory of a small machine")
    logits, ids = torch.zeros(*shape, vocabulary, dtype=dtype), torch.zeros(shape, dtype=torch.int64)
    inputs = {"labels": ids, "attention_mask": torch.ones(shape, dtype=torch.int64)}
    facts = ModelFacts("", "", encoder_decoder=False, vocabulary=None, codebooks=0, audio_tokens=(), audio_placeholders=(), label_shift=1)

    def measured(given: Tensor) -> Any:
        found = align(given, site=TEXT, facts=facts, micro=MicroBatch(index=0, kwargs=inputs))
        assert isinstance(found, Aligned)
        assert len(found.others) == 3
        return score(found.logits, found.labels, others=found.others, keep=4096, histogram=torch.zeros(vocabulary, dtype=torch.int32))

    assert peak_mib(lambda: measured(logits)) < 32
    inputs = {name: tensor[:, 1:] for name, tensor in inputs.items()}
    assert peak_mib(lambda: measured(logits[:, :-1])) < 32


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("shape", "vocabulary", "work"), [((4, 33), 60_000, 3.0), ((8, 40_000), 32, 1.0), ((1, 3), 1_000_000, 1.0)])
def test_working_memory(dtype: torch.dtype, shape: tuple[int, int], vocabulary: int, work: float) -> None:
    """Scoring stays in the working memory that it is given, and 4 MiB for what rows take; a row that is larger takes 12 bytes a logit."""
    logits, labels = torch.zeros(*shape, vocabulary, dtype=dtype), torch.zeros(shape, dtype=torch.int64)
    allowed = max(work, vocabulary * 12 / (1 << 20)) + 4
    assert peak_mib(lambda: score(logits, labels, work_mib=work)) < allowed


def test_autocast_and_grad_leave_it_alone() -> None:
    """Inside bf16 autocast, of logits that need a gradient, the numbers are those of float32 and no graph is made."""
    torch.manual_seed(8)
    logits, labels = example(3, 20)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result = score(logits.requires_grad_(), labels)
    assert not result.sums.requires_grad
    assert columns(result) == pytest.approx(reference(logits.detach(), labels), rel=1e-5)


def test_no_sync() -> None:
    """On a device whose values the host cannot read, nothing is read; labels on the CPU are moved."""
    counts = torch.empty(11, dtype=torch.int32, device="meta")
    labels = torch.zeros(2, 5, dtype=torch.int32)
    result = score(torch.empty(2, 5, 11, device="meta"), labels, others={"shift_more": labels}, keep=7, histogram=counts)
    assert result.sums.shape == (len(COLUMNS),)
    assert result.predictions.shape == (7,)


def test_split_codebooks() -> None:
    """Codebooks side by side become a dimension, as a view; what does not divide is an error that names the shape."""
    logits = torch.randn(2, 3, 12)
    split = split_codebooks(logits, 4)
    assert split.shape == (2, 3, 4, 3)
    assert split.data_ptr() == logits.data_ptr()
    assert torch.equal(split[:, :, 1], logits[..., 3:6])
    assert split_codebooks(logits[:, :-1], 4).shape == (2, 2, 4, 3)
    with pytest.raises(ProbeValueError, match=r"\(2, 3, 12\).*5 codebooks"):
        split_codebooks(logits, 5)
    with pytest.raises(ProbeValueError, match="0 codebooks"):
        split_codebooks(logits, 0)
