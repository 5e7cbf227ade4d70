"""Scores of a head: what float64 and torch's own cross-entropy say, in bounded memory, whatever stands in logits and labels."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from costs import peak_mib
from probe.errors import ProbeValueError
from probe.measure.heads import COLUMNS, HeadScore, score, split_codebooks

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
    return {
        "cross_entropy": F.cross_entropy(x, y, reduction="sum").item(),
        "correct": (x.argmax(-1) == y).sum().item(),
        "top5": ((x > x.gather(1, y[:, None])).sum(-1) < 5).sum().item(),
        "entropy": -torch.special.xlogy(p, p).sum().item(),
        "labelled": inside.sum().item(),
        "labels_outside": ((flat != -100) & ~inside).sum().item(),
        "nonfinite_rows": 0,
    }


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
    result = score(logits, labels, chunk_mib=0.005)
    assert columns(result) == pytest.approx(reference(logits, labels), rel=1e-5)
    assert torch.equal(result.predictions, logits.argmax(-1))


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
@pytest.mark.parametrize("chunk_mib", [1e-6, 0.002, 8.0])
def test_strides_and_chunks_do_not_matter(view: str, chunk_mib: float) -> None:
    """A view scores as its copy does, whatever the chunk."""
    torch.manual_seed(4)
    logits = VIEWS[view](4 * torch.randn(6, 13, 80))
    labels = torch.randint(0, logits.shape[-1], logits.shape[:-1])
    result = score(logits, labels, chunk_mib=chunk_mib)
    assert columns(result) == pytest.approx(reference(logits, labels), rel=1e-5)
    assert torch.equal(result.predictions, logits.argmax(-1))


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


def test_empty() -> None:
    """No rows: zeros and no predictions."""
    result = score(torch.empty(0, 7, 11), torch.empty(0, 7, dtype=torch.int64))
    assert result.sums.tolist() == [0] * len(COLUMNS)
    assert result.predictions.shape == (0, 7)


@pytest.mark.parametrize(("logits", "labels"), [((2, 3, 5), (2, 4)), ((3, 0), (3,)), ((), ())])
def test_wrong_shapes_are_an_error(logits: tuple[int, ...], labels: tuple[int, ...]) -> None:
    """Shapes that do not lie over each other, or an empty vocabulary, are named."""
    with pytest.raises(ProbeValueError, match="expected"):
        score(torch.zeros(logits), torch.zeros(labels, dtype=torch.int64))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("shape", "vocabulary"), [((4, 33), 60_000), ((8, 40_000), 5), ((1, 3), 1_000_000)])
def test_memory_is_bounded(dtype: torch.dtype, shape: tuple[int, int], vocabulary: int) -> None:
    """Beyond predictions the peak stays below four chunks, or four rows, for contiguous logits and for a slice of them."""
    logits, labels = torch.zeros(*shape, vocabulary, dtype=dtype), torch.zeros(shape, dtype=torch.int64)
    allowed = 4 * max(1.0, vocabulary * 4 / (1 << 20)) + labels.numel() * 8 / (1 << 20)
    assert peak_mib(lambda: score(logits, labels, chunk_mib=1.0)) < allowed
    # Labels that are no contiguous tensor are copied, 8 bytes a row.
    allowed += labels.numel() * 8 / (1 << 20)
    assert peak_mib(lambda: score(logits[:, :-1], labels[:, 1:], chunk_mib=1.0)) < allowed


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
    result = score(torch.empty(2, 5, 11, device="meta"), torch.zeros(2, 5, dtype=torch.int32))
    assert result.sums.shape == (len(COLUMNS),)
    assert result.predictions.shape == (2, 5)


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
