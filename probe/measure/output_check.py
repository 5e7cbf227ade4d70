"""Whether recomputed attention rows explain what a kernel returned: their probabilities times the values, against its output.

Shapes: B batch, S tokens (queries), K keys, H query heads, h key heads, D width of the values, R sampled rows a sample; b, h, r: those of
one block.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from probe.measure import blocks
from probe.measure.blocks import RowBlock, RowSource, check_rows
from probe.measure.masks import RowMasks, View
from probe.measure.probabilities import FromScores


@dataclass(frozen=True, slots=True)
class OutputCheck:
    """What a kernel was given and returned beside q and k, detached and by reference: use it at once, keep none of it.

    Attributes:
        v_BhKD: Values; h divides H.
        output_BSHD: What the kernel returned.
    """

    v_BhKD: Tensor
    output_BSHD: Tensor

    def mismatch(self, source: RowSource, index_BR: Tensor) -> Tensor:
        """Return the largest difference between the rows' P·V and the kernel's output ÷ the largest output of these rows.

        0-dim float64; NaN if something is not finite. Rounding alone makes about 1e-6 in float32 (1e-3 with TF32) and 1e-2 in bfloat16.
        Rows that see no key are left out: kernels return anything there. No sync; temporaries within one and a half ``CHUNK_BYTES``, those
        of the source included.

        Args:
            source: The rows.
            index_BR: Which, int64.
        """
        index_BR = check_rows(index_BR, source.shape)
        with torch.no_grad(), torch.autocast(self.v_BhKD.device.type, enabled=False):
            worst_2 = torch.zeros(2, dtype=torch.float64, device=self.v_BhKD.device)
            for block in source.blocks(index_BR):
                worst_2 = torch.maximum(worst_2, self._difference(block, index_BR[block.samples, block.rows], source.shape).double())
            return worst_2[0] / worst_2[1].clamp_min(torch.finfo(torch.float32).tiny)

    def _difference(self, block: RowBlock, index_br: Tensor, shape: tuple[int, int, int, int]) -> Tensor:
        """Return the largest difference and the largest output in one block, (2,); NaN if there is one."""
        heads, keys = shape[1], shape[3]
        p_bhrK = block.p[..., :keys]
        group = heads // self.v_BhKD.shape[1]
        shared = slice(block.heads.start // group, (block.heads.stop - 1) // group + 1)
        v_bhKD = self.v_BhKD[block.samples, shared]
        p_bhNK = p_bhrK.reshape(v_bhKD.shape[0], v_bhKD.shape[1], -1, keys)
        expected_bhND = p_bhNK.new_zeros((*p_bhNK.shape[:3], v_bhKD.shape[3]))
        at_once = max(1, blocks.CHUNK_BYTES // 2 // max(1, v_bhKD.numel() // keys * p_bhNK.element_size()))
        for start in range(0, keys, at_once):
            piece = slice(start, start + at_once)
            expected_bhND += p_bhNK[..., piece] @ v_bhKD[:, :, piece].to(p_bhNK.dtype)
        output_bShD = self.output_BSHD[block.samples, :, block.heads]
        index = index_br[:, :, None, None].expand(-1, -1, *output_bShD.shape[2:])
        output_bhrD = output_bShD.gather(1, index).transpose(1, 2)
        output_bhrD = output_bhrD.to(p_bhNK.dtype)
        apart_bhrD = expected_bhND.view(output_bhrD.shape) - output_bhrD
        blind_bhr1 = ~(p_bhrK > 0).any(-1, keepdim=True)
        return torch.stack([part.masked_fill(blind_bhr1, 0.0).abs().amax() for part in (apart_bhrD, output_bhrD)])


@dataclass(frozen=True, slots=True)
class CheckedRows:
    """Rows recomputed for a kernel whose calling convention is assumed, with what tells whether the assumption holds."""

    rows: FromScores
    check: OutputCheck

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(B, H, S, K)."""
        return self.rows.shape

    @property
    def device(self) -> torch.device:
        """The queries' device."""
        return self.rows.device

    @property
    def how(self) -> str:
        """As the scores say."""
        return self.rows.how

    @property
    def sinks(self) -> int:
        """1 where the layer has learned sinks."""
        return self.rows.sinks

    @property
    def view(self) -> View:
        """What decides which keys a query sees."""
        return self.rows.view

    def visible(self, index_BR: Tensor) -> Tensor:
        """Return bool (B, R, K), see :class:`~probe.measure.blocks.RowSource`."""
        return self.rows.visible(index_BR)

    def masks(self, index_BR: Tensor) -> RowMasks | None:
        """Return what hides keys from the rows, see :class:`~probe.measure.blocks.RowSource`."""
        return self.rows.masks(index_BR)

    def blocks(self, index_BR: Tensor, masks: RowMasks | None = None) -> Iterator[RowBlock]:
        """Yield the rows, see :class:`~probe.measure.blocks.RowSource`."""
        return self.rows.blocks(index_BR, masks)
