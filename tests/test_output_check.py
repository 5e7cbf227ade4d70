"""Whether rows explain a kernel's output: P·V against it, block by block."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from costs import peak_mib
from probe.measure import blocks
from probe.measure.output_check import CheckedRows, OutputCheck
from probe.measure.probabilities import FromScores
from probe.measure.scores import Scores

pytestmark = pytest.mark.pure  # of torch and probe alone: the same with every transformers

B, S, K, H, h, D = 2, 6, 9, 4, 2, 5


def call(**more: Any) -> tuple[FromScores, Tensor, Tensor]:
    """Return rows, values (B, h, K, D) and the output that belongs to them (B, S, H, D), in float64 from the definition."""
    generator = torch.Generator().manual_seed(1)
    q, k, v = (torch.randn(B, heads, length, D, generator=generator) for heads, length in ((H, S), (h, K), (h, K)))
    may = torch.ones(S, K).tril(K - S).bool()
    may[1] = False
    scores = (q.double() @ k.double().repeat_interleave(2, 1).mT) * D**-0.5
    p = torch.softmax(scores.masked_fill(~may, float("-inf")), -1).nan_to_num()
    output = (p @ v.double().repeat_interleave(2, 1)).transpose(1, 2)
    return FromScores(Scores(q, k, mask=may, **more)), v, output


def mismatch(rows: FromScores, v: Tensor, output: Tensor, index_BR: Tensor | None = None) -> float:
    every = torch.arange(S).expand(B, S)
    return float(OutputCheck(v, output).mismatch(rows, every if index_BR is None else index_BR))


def test_the_kernels_own_output_agrees_to_rounding() -> None:
    """In float32 the difference is that of rounding, in bfloat16 below a hundredth."""
    rows, v, output = call()
    assert mismatch(rows, v, output.float()) < 1e-6
    assert 1e-5 < mismatch(rows, v, output.bfloat16()) < 1e-2


def test_the_difference_is_relative_to_the_largest_output() -> None:
    """One element off by a tenth of the largest output is a mismatch of a tenth, in whatever unit the values are."""
    rows, v, output = call()
    largest = output.abs().max()
    output[1, 4, 3, 2] -= 0.1 * largest * output[1, 4, 3, 2].sign()
    for unit in (1.0, 1e-4, 1e4):
        assert mismatch(rows, v * unit, output.float() * unit) == pytest.approx(0.1, rel=0.02)


def test_only_chosen_rows_count_and_rows_that_see_nothing_do_not() -> None:
    """Rows that are not looked at, and what a kernel returns for a row without keys, do not matter."""
    rows, v, output = call()
    output[:, 1] = 1e6
    assert mismatch(rows, v, output.float()) < 1e-6
    output[:, 4] = 1e6
    assert mismatch(rows, v, output.float(), torch.tensor([[0, 5], [2, 3]])) < 1e-6
    assert mismatch(rows, v, output.float()) > 0.9
    output[:, 1] = torch.nan
    assert mismatch(rows, v, output.float(), torch.tensor([[0, 1], [2, 1]])) < 1e-6


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_what_is_not_finite_shows(value: float) -> None:
    """A NaN or an infinity in a row that is looked at makes the result NaN."""
    rows, v, output = call()
    output[0, 3, 1, 0] = value
    assert mismatch(rows, v, output.float()) != mismatch(rows, v, output.float())


def test_an_output_of_zeros_is_no_agreement() -> None:
    """A kernel that returns nothing but zeros does not agree with rows that say otherwise; for values of zero it does."""
    rows, v, output = call()
    assert mismatch(rows, v, torch.zeros_like(output)) > 1e6
    assert mismatch(rows, torch.zeros_like(v), torch.zeros_like(output)) == 0


def test_blocks_and_pieces_of_keys_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """However small the blocks, down to heads of one group and pieces of the keys, the result is the same."""
    rows, v, output = call(sinks_H=None)
    output[1, 4, 3, 2] += 0.3
    whole = mismatch(rows, v, output.float())
    for size in (4096, 512, 64, 1):
        monkeypatch.setattr(blocks, "CHUNK_BYTES", size)
        assert mismatch(rows, v, output.float()) == pytest.approx(whole, rel=1e-6)


def test_sinks_are_no_values() -> None:
    """The probability of a learned sink has no value: the output is what the keys give."""
    rows, v, _ = call(sinks_H=torch.randn(H))
    every = torch.arange(S).expand(B, S)
    output = torch.zeros(B, S, H, D)
    for block in rows.blocks(every):
        p = block.p[..., :K]
        output[block.samples, :, block.heads] = (p @ v.repeat_interleave(2, 1)[block.samples, block.heads]).transpose(1, 2)
    assert mismatch(rows, v, output) < 1e-6


def test_memory_stays_within_chunks() -> None:
    """Values of 64 MiB in bfloat16 are converted by the piece."""
    keys = 1 << 18
    q, k = torch.randn(1, 2, 4, 64, dtype=torch.bfloat16), torch.randn(1, 2, keys, 64, dtype=torch.bfloat16)
    rows, check = FromScores(Scores(q, k)), OutputCheck(k, torch.randn(1, 4, 2, 64))
    assert k.numel() * k.element_size() == 64 << 20
    assert peak_mib(lambda: check.mismatch(rows, torch.arange(4)[None])) < 3 * blocks.CHUNK_BYTES / 2**20


def test_checked_rows_are_the_rows() -> None:
    """The source with a check hands over what the rows hand over."""
    rows, v, output = call()
    checked = CheckedRows(rows, OutputCheck(v, output))
    every = torch.arange(S).expand(B, S)
    assert (checked.shape, checked.device, checked.how, checked.sinks) == (rows.shape, rows.device, rows.how, rows.sinks)
    assert torch.equal(checked.visible(every), rows.visible(every))
    assert all(torch.equal(a.p, b.p) for a, b in zip(checked.blocks(every), rows.blocks(every), strict=True))
