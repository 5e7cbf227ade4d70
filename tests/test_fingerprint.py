"""Hashes of rows: equal rows are found, any difference is seen, and the arithmetic is splitmix64's."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import costs
from probe.measure.chunks import CHUNK_MIB
from probe.measure.fingerprint import LARGEST, equal_rows, fingerprint, hash_rows, mix, together

pytestmark = pytest.mark.pure  # of torch and probe alone: the same with every transformers

SEED = 5
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64, torch.int32, torch.uint8, torch.bool, torch.complex64)


def rows(*shape: int, dtype: torch.dtype = torch.float32, seed: int = SEED) -> Tensor:
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * 40).abs().to(dtype)


def test_mix_is_splitmix64() -> None:
    """The finaliser equals splitmix64's, worked out with Python's integers."""
    values = torch.randint(-(2**63), 2**63 - 1, (50,), generator=torch.Generator().manual_seed(SEED))
    whole = (1 << 64) - 1

    def expected(number: int) -> int:
        number &= whole
        number = ((number ^ (number >> 30)) * 0xBF58476D1CE4E5B9) & whole
        number = ((number ^ (number >> 27)) * 0x94D049BB133111EB) & whole
        return number ^ (number >> 31)

    assert [value & whole for value in mix(values).tolist()] == [expected(value) for value in values.tolist()]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_equal_rows_are_found(dtype: torch.dtype) -> None:
    """Rows that are the same in every element have the same hash, whatever the dtype; any other pair has not."""
    x = rows(9, 7, 3, dtype=dtype)
    x[4], x[7] = x[1], x[2]
    hashes = hash_rows(x)
    flat = x.reshape(9, -1)
    same = torch.tensor([[bool((flat[i] == flat[j]).all()) for j in range(9)] for i in range(9)])
    assert torch.equal(hashes[:, None] == hashes[None, :], same)
    assert int(equal_rows(hashes)) == int((same.sum(1) > 1).sum()) >= 4


def test_any_bit_and_any_place_count() -> None:
    """A changed last bit, two elements that changed places, another name and another shape give another hash."""
    x = rows(1, 400)
    seen = {int(hash_rows(x)), int(hash_rows(x, salt=1)), int(hash_rows(x.view(1, 20, 20)))}
    for place in range(400):
        changed = x.clone()
        changed[0, place] = torch.nextafter(x[0, place], torch.tensor(1e9))
        seen.add(int(hash_rows(changed)))
        swapped = x.clone()
        swapped[0, place], swapped[0, place - 1] = x[0, place - 1], x[0, place]
        seen.add(int(hash_rows(swapped)))
    assert len(seen) == 3 + 800
    assert int(hash_rows(x)) == int(hash_rows(x.clone()))


def test_many_different_rows_do_not_collide() -> None:
    """Small whole numbers, as token ids are, give as many hashes as there are rows."""
    ids = torch.cartesian_prod(*[torch.arange(40)] * 3)
    assert len(set(hash_rows(ids).tolist())) == 40**3


def test_a_fingerprint_is_of_the_rows_not_of_their_order() -> None:
    """A shuffled batch has the same fingerprint, one with another row a different one; all fit a float64 exactly."""
    x = rows(16, 30)
    order = torch.randperm(16, generator=torch.Generator().manual_seed(SEED))
    one, shuffled = (int(fingerprint(hash_rows(batch)) & LARGEST) for batch in (x, x[order]))
    other = int(fingerprint(hash_rows(torch.cat([x[:-1], x[:1]]))) & LARGEST)
    assert one == shuffled != other
    assert 0 <= one <= 2**53 - 1
    assert int(float(one)) == one


@pytest.mark.parametrize("shape", [(0, 3), (3, 0), (1, 1), (4,)])
def test_odd_shapes(shape: tuple[int, ...]) -> None:
    """Tensors without rows, without elements, of one element, and vectors have one hash a row."""
    hashes = hash_rows(torch.ones(shape))
    assert hashes.shape == shape[:1]
    assert int(equal_rows(hashes)) == (shape[0] if shape[0] > 1 else 0)


def test_chunks_do_not_change_a_hash_and_bound_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Worked through in small chunks, contiguous or not, a tensor has the same hashes; temporaries stay below a few chunks."""
    x = rows(6, 50, 11)
    whole = hash_rows(x)
    with monkeypatch.context() as patch:
        patch.setattr("probe.measure.fingerprint.per_chunk", lambda nbytes, chunk_mib=CHUNK_MIB: max(1, 700 // int(nbytes)))
        assert torch.equal(hash_rows(x), whole)
        assert torch.equal(hash_rows(x.transpose(1, 2).contiguous().transpose(1, 2)), whole)
    large = torch.zeros(12, 1_000_000)
    assert costs.peak_mib(lambda: hash_rows(large)) < 6 * CHUNK_MIB
    assert costs.operations(lambda: hash_rows(torch.zeros(8, 100))) < 25


def test_several_tensors_together() -> None:
    """Rows that are equal in every tensor are equal together; rows that have each other's parts are not."""
    one, other = rows(6, 5), rows(6, 4, seed=SEED + 1)
    one[1], other[1] = one[0], other[0]
    one[2], other[2], one[3], other[3] = one[4], other[5], one[5], other[4]
    hashes = together(torch.stack([hash_rows(one, salt=1), hash_rows(other, salt=2)]))
    assert int(equal_rows(hashes)) == 2
    assert hashes[0] == hashes[1]
